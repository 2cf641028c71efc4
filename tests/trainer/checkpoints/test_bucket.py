"""Checkpoints on a bucket: machines that vanish, buckets that fail, objects that are damaged."""

import itertools
import json
import random
import resource
import shutil
import signal
import tempfile
import uuid
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import boto3
import pytest
import torch

from microdit.model.checkpoint import CheckpointError, load_model
from microdit.model.loading import find_parts
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.folder_lock import folder_lock
from microdit.pipeline.cli.bucket_checkpoint import on_this_machine
from microdit.pipeline.cli.generate import generate
from microdit.pipeline.storage import bucket as bucket_store
from microdit.pipeline.storage import bucket_lock, ranges
from microdit.pipeline.storage.bucket_lock import BucketLock
from microdit.pipeline.storage.store import open_store
from microdit.trainer.checkpoints import bucket as bucket_module
from microdit.trainer.checkpoints.bucket import BucketCheckpoints
from microdit.trainer.checkpoints.contents import Checkpoint, TensorSnapshot, snapshot
from microdit.trainer.checkpoints.saver import Saver, load_latest
from microdit.trainer.learner import Learner
from microdit.trainer.train import train
from tests.pipeline.helpers.small_disks import small_disk
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3 import BUCKET, environ, environment
from tests.trainer.checkpoints.test_contents import ALONE, made
from tests.trainer.conftest import STAGE


@pytest.fixture
def checkpoints(s3_url: str, tmp_path: Path) -> BucketCheckpoints:
    return BucketCheckpoints(open_store(s3_url), tmp_path / "scratch")


def saved(checkpoints: BucketCheckpoints, step: int, keep: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that is there now."""
    net, optimizer = made(seed)
    ema = {name: p.detach() * 2 for name, p in net.named_parameters()}
    with Saver(checkpoints, keep, None, pytest.fail) as saver:
        saver.save(step, snapshot(net, [ema], optimizer), {"note": seed}, {"latent_shape": [4, 4, 4]})
        saver.finish()
    return net.state_dict()


def latest(checkpoints: BucketCheckpoints, tell=pytest.fail) -> Checkpoint | None:
    return load_latest(checkpoints, tell, ALONE)


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())}


def test_what_is_saved_is_loaded_and_the_last_are_kept(checkpoints: BucketCheckpoints) -> None:
    assert latest(checkpoints) is None
    for step in (10, 20, 30):
        weights = saved(checkpoints, step, seed=step)
    found = latest(checkpoints)
    assert found is not None and found.name == f"{checkpoints}/step-00000030" and found.state["note"] == 30
    assert all(torch.equal(found.model[name], value) for name, value in weights.items())
    assert torch.equal(found.averages[0]["blocks.0.attn.qkv.weight"], 2 * weights["blocks.0.attn.qkv.weight"])
    names = sorted(checkpoints.store.names())
    assert [name for name in names if "/" not in name] == ["step-00000020.json", "step-00000030.json"]
    assert len(names) == 2 * (1 + 4)
    assert not list(checkpoints.scratch.iterdir())


def test_what_is_damaged_is_passed_over_and_said_so(checkpoints: BucketCheckpoints) -> None:
    for step in (10, 20, 30, 40, 50):
        saved(checkpoints, step, keep=9)
    states = {step: checkpoints.state(f"step-{step:08d}") for step in (20, 30)}
    cut = states[20]["files"]["ema.safetensors"]["object"]
    half = checkpoints.store.get(cut)[:-1] + b"x"
    gone = [states[30]["files"]["optimizer.safetensors"]["object"], "step-00000040.json", "step-00000050.json", cut]
    checkpoints.store.delete(gone)
    checkpoints.store.create(cut, half)
    checkpoints.store.create("step-00000040.json", b'{"version": 1, "step')
    checkpoints.store.create(
        "step-00000050.json", b'{"version": 1, "files": {"../../x": {"object": "a", "sha256": "b"}}}'
    )
    said: list[str] = []
    found = latest(checkpoints, said.append)
    assert found is not None and found.state["step"] == 10
    assert [message.partition(" cannot be read")[0][-2:] for message in said] == ["50", "40", "30", "20"]
    assert "SHA-256" in said[3] and "ema.safetensors" in said[3] and "no known form" in said[0]
    # the run writes step 20 again, and this one is whole
    weights = saved(checkpoints, 20, keep=9, seed=7)
    checkpoints.store.delete(["step-00000040.json", "step-00000050.json", "step-00000030.json"])
    again = latest(checkpoints)
    assert again is not None and again.state["note"] == 7
    assert all(torch.equal(again.model[name], value) for name, value in weights.items())


def test_a_kill_at_any_request_leaves_the_one_before_and_leftovers_are_swept(
    checkpoints: BucketCheckpoints, monkeypatch
) -> None:
    saved(checkpoints, 10)
    for number in range(1, 7):  # three files, generate.json, state
        asked = itertools.count(1)

        def until(real, number=number, asked=asked):
            def request(self, *args):
                if next(asked) == number:
                    raise KeyboardInterrupt
                return real(self, *args)

            return request

        with monkeypatch.context() as patch:
            for name in ("create", "publish"):
                patch.setattr(bucket_store.Bucket, name, until(getattr(bucket_store.Bucket, name)))
            try:
                saved(checkpoints, 20 + number, keep=9)
            except KeyboardInterrupt:
                assert number < 6
        found = latest(checkpoints)
        assert found is not None and found.state["step"] == (10 if number < 6 else 26)
    client = boto3.client("s3")
    prefix = checkpoints.store.url.removeprefix(f"s3://{BUCKET}/")
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/step-00000021-0123456789abcdef/model.safetensors")
    checkpoints.store.create("step-00000026.json.x", b"not ours")
    checkpoints.store.create("step-00000027.json", b"[1]")  # damaged: what may be its own stays
    checkpoints.store.create("step-00000027-0123456789abcdef/ema.safetensors", b"x")
    left = len(list(checkpoints.store.names()))
    checkpoints.sweep()
    assert len(list(checkpoints.store.names())) == left > 2 * 5 + 3
    monkeypatch.setattr(bucket_module, "OLD", timedelta(seconds=-3600))
    checkpoints.sweep()
    assert len(list(checkpoints.store.names())) == 2 * 5 + 3
    checkpoints.remove("step-00000027")
    checkpoints.sweep()
    assert len(list(checkpoints.store.names())) == 2 * 5 + 1
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)


def test_large_files_go_in_parts_both_ways(checkpoints: BucketCheckpoints, monkeypatch) -> None:
    tensors = {"w": torch.randn(5, 1 << 20)}  # 20 MiB
    monkeypatch.setattr(ranges, "RANGE", 3 << 20)
    checkpoints.write(3, TensorSnapshot({"model.safetensors": tensors, "optimizer.safetensors": {}}, {}), {}, {})
    found = checkpoints.read("step-00000003")
    assert torch.equal(found.model["w"], tensors["w"])
    bucket, _, prefix = checkpoints.store.url.removeprefix("s3://").partition("/")
    entry = checkpoints.state("step-00000003")["files"]["model.safetensors"]["object"]
    assert "-" in boto3.client("s3").head_object(Bucket=bucket, Key=f"{prefix}/{entry}")["ETag"]  # of several parts


def test_a_new_machine_goes_on_where_the_old_one_was_lost_on_a_bucket_that_fails(
    recipe, s3_server: str, s3_url: str, tmp_path: Path, monkeypatch
) -> None:
    train(recipe(out=tmp_path / "whole"))
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    monkeypatch.setattr(bucket_store, "PAUSE", 0.01)
    monkeypatch.setattr(bucket_store, "LONGEST_PAUSE", 0.05)
    rates = dict.fromkeys(("error_500", "error_503", "reset", "cut_upload", "cut_answer"), 0.05)
    original, machine = Learner.step, 0

    def lost(self, batch, stage, *args):
        if self.optimizer.state and next(iter(self.optimizer.state.values()))["step"] == (6, 10, 99)[machine]:
            raise KeyboardInterrupt
        return original(self, batch, stage, *args)

    monkeypatch.setattr(Learner, "step", lost)
    with FaultyS3(s3_server, seed, rates) as proxy, environ(environment(proxy.url)):
        for machine in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                train(recipe(out=tmp_path / f"machine-{machine}", checkpoints=s3_url))
        machine = 2
        summary = train(recipe(out=tmp_path / "machine-2", checkpoints=s3_url))
    assert sum(proxy.faults.values()) > 0
    assert summary["checkpoint"] == f"{s3_url}/step-00000012"
    assert not [*tmp_path.glob("machine-*/checkpoints"), *tmp_path.glob("machine-*/*.download")]
    whole = losses(tmp_path / "whole")
    for number, first in enumerate((1, 5, 9)):
        found = losses(tmp_path / f"machine-{number}")
        assert min(found) == first and found == {step: whole[step] for step in found}
    with pytest.raises(RequestError, match=r"there are checkpoints in s3://.*--resume auto"):
        train(recipe(checkpoints=s3_url), resume=False)

    # what is drawn with comes to this machine, once
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = on_this_machine(s3_url)
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "ema.safetensors", "generate.json", "state.json"}
    assert find_parts(folder).weights == folder / "ema.safetensors"
    load_model(folder / "ema.safetensors")
    monkeypatch.setattr(BucketCheckpoints, "download", None)
    assert on_this_machine(f"{s3_url}/step-00000012") == folder == on_this_machine(s3_url)
    with pytest.raises(RequestError, match=r"s3://.*/step-00000001: .*step-00000001\.json"):
        generate(f"{s3_url}/step-00000001", ["a snail"], out=tmp_path / "pictures")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        on_this_machine(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def test_a_bucket_that_is_down_costs_a_checkpoint_and_not_the_run(
    recipe, s3_server: str, s3_url: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(bucket_store, "PAUSE", 0.01)
    monkeypatch.setattr(bucket_store, "PATIENCE", 0.2)
    real, down = BucketCheckpoints.write, [2]
    with FaultyS3(s3_server, 0, rates={}) as proxy, environ(environment(proxy.url)):

        def write(self, step, *args):
            proxy.rates = {"error_503": 1.0} if step in down else {}
            try:
                real(self, step, *args)
            finally:
                proxy.rates = {}

        monkeypatch.setattr(BucketCheckpoints, "write", write)
        fields = {"stages": [STAGE | {"steps": 3}], "checkpoint_every": 1, "checkpoints": s3_url}
        assert train(recipe(**fields))["steps"] == 3
        assert "the checkpoint of step 2 cannot be written" in capsys.readouterr().out
        checkpoints = BucketCheckpoints(open_store(s3_url), Path("unused"))
        assert checkpoints.names() == ["step-00000003", "step-00000001"]
        with pytest.raises(RequestError, match="was made with seed"):
            train(recipe(**fields, seed=4))
        checkpoints.remove("step-00000003")
        down[:] = [3]
        with pytest.raises(CheckpointError, match=r"step 3 cannot be written: .*tries to"):
            train(recipe(**fields))
        assert checkpoints.names() == ["step-00000002", "step-00000001"]


@pytest.mark.parametrize("kind", ["full disk", "limit on a file's size"])  # for the first one has to be root
def test_a_full_temporary_folder_costs_a_checkpoint_and_not_the_run(
    recipe, s3_url: str, tmp_path: Path, monkeypatch, capsys, kind: str
) -> None:
    real, full = BucketCheckpoints.write, [2]
    with ExitStack() as stack:
        if kind == "full disk":
            folder = stack.enter_context(small_disk(tmp_path / "disk", "8m"))
        else:
            folder = tmp_path / "temporary"
            folder.mkdir()
            stack.callback(signal.signal, signal.SIGXFSZ, signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def write(self, step, *args):
            if step in full:
                if kind == "full disk":  # the weights have room, AdamW's state has none
                    (folder / "others").write_bytes(bytes(shutil.disk_usage(folder).free - 600_000))
                else:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
            try:
                real(self, step, *args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                (folder / "others").unlink(missing_ok=True)
                assert not list(folder.glob(f"{bucket_store.SCRATCH}*"))

        monkeypatch.setattr(BucketCheckpoints, "write", write)
        fields = {"stages": [STAGE | {"steps": 3}], "checkpoint_every": 1, "checkpoints": s3_url}
        assert train(recipe(**fields))["steps"] == 3
        told = [line for line in capsys.readouterr().out.splitlines() if "cannot be written" in line]
        (line,) = told
        assert line.startswith("the checkpoint of step 2 cannot be written: ") and (
            "No space left" in line if kind == "full disk" else "too large" in line
        )
        checkpoints = BucketCheckpoints(open_store(s3_url), tmp_path / "scratch")
        assert checkpoints.names() == ["step-00000003", "step-00000001"]
        # the last one of a run: an error, and the one before is what the next run goes on from
        checkpoints.remove("step-00000003")
        full[:] = [3]
        with pytest.raises(CheckpointError, match="the checkpoint of step 3 cannot be written: "):
            train(recipe(**fields))
        assert checkpoints.names() == ["step-00000002", "step-00000001"]
        for name in checkpoints.names():
            checkpoints.read(name)  # whole: each file's SHA-256 is checked
        full.clear()
        assert train(recipe(**fields))["steps"] == 3


def test_sigterm_saves_on_the_bucket_in_time(recipe, s3_url: str, tmp_path: Path, team) -> None:
    fields = {"checkpoints": s3_url, "checkpoint_every": 1000, "parallel": "fsdp", "stages": [STAGE | {"steps": 9}]}
    assert team(recipe(**fields), at=(1, 4, signal.SIGTERM)) == [143, 143]
    store = open_store(s3_url)
    assert [name for name in store.names() if "/" not in name] == ["step-00000004.json"]
    assert train(recipe(out=tmp_path / "other", **fields))["steps"] == 9
    train(recipe(out=tmp_path / "whole", **fields | {"checkpoints": None, "parallel": "ddp"}))
    assert losses(tmp_path / "other") == pytest.approx(
        {s: losses(tmp_path / "whole")[s] for s in range(5, 10)}, rel=1e-5
    )


def test_addresses_of_no_known_kind_are_refused(recipe) -> None:
    with pytest.raises(RequestError, match="checkpoints = 'ftp://x/y': scheme 'ftp' is not known"):
        train(recipe(checkpoints="ftp://x/y"))
    assert on_this_machine("runs/demo") == Path("runs/demo")


def test_two_runs_with_one_bucket(recipe, s3_url: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bucket_lock, "BEAT", 0.3)
    fields = {"stages": [STAGE | {"steps": 2}], "checkpoints": s3_url}
    with (
        BucketLock(open_store(s3_url), "run"),
        pytest.raises(RequestError, match=r"another run works in s3://.* take another prefix"),
    ):
        train(recipe(out=tmp_path / "second", **fields))
    assert train(recipe(out=tmp_path / "first", **fields))["steps"] == 2
    assert [name for name in open_store(s3_url).names() if "/" not in name] == ["step-00000002.json"]
    assert not [name for name in open_store(s3_url).names() if name.startswith("lock")]
    shared = tmp_path / "shared"
    with folder_lock(shared, "run"), pytest.raises(RequestError, match=r"another run works in .*shared"):
        train(recipe(out=tmp_path / "third", checkpoints=str(shared)))
