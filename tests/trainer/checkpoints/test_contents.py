import contextlib
import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from microdit.model.checkpoint import CheckpointError
from microdit.model.loading import find_parts
from microdit.model.network import MicroDiT
from microdit.trainer.checkpoints import folder as checkpoint_folder
from microdit.trainer.checkpoints.contents import Checkpoint, load_optimizer, parse_state, snapshot
from microdit.trainer.checkpoints.folder import FolderCheckpoints
from microdit.trainer.checkpoints.saver import Saver, load_latest
from microdit.trainer.processes import Team
from microdit.trainer.train import train
from tests.trainer.conftest import MODEL, STAGE

ALONE = Team(0, 1, torch.device("cpu"))


def made(seed: int = 0) -> tuple[MicroDiT, torch.optim.AdamW]:
    torch.manual_seed(seed)
    net = MicroDiT(input_size=4, caption_channels=16, **MODEL)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return net, optimizer


def save(out: Path, step: int, keep: int = 2, seed: int = 0, hours: float = 0.0, keep_hours: float | None = None):
    """A checkpoint in `out`, and what is kept beside it."""
    net, optimizer = made(seed)
    ema = {name: p.detach() * 2 for name, p in net.named_parameters()}
    tensors = snapshot(net, [ema], optimizer)
    with Saver(FolderCheckpoints(out), keep, keep_hours, pytest.fail) as saver:
        state = {"note": seed, "progress": {"seconds": 3600 * hours}}
        saver.save(step, tensors, state, {"latent_shape": [4, 4, 4]})
        saver.finish()
    return out / f"step-{step:08d}"


def latest(out: Path, tell=pytest.fail) -> Checkpoint | None:
    return load_latest(FolderCheckpoints(out), tell, ALONE)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, 7, seed=3)
    found = latest(tmp_path)
    assert found is not None and found.name == str(folder)
    files = found.state.pop("files")
    assert found.state == {"version": 1, "step": 7, "note": 3, "progress": {"seconds": 0.0}}
    assert {name: entry["size"] for name, entry in files.items()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "state.json"
    }
    net, optimizer = made(3)
    assert found.model.keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in found.model.items())
    weight = "blocks.0.attn.qkv.weight"
    assert len(found.averages) == 1 and torch.equal(found.averages[0][weight], 2 * found.model[weight])
    other, fresh = made(4)
    load_optimizer(other, fresh, found.optimizer)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state[b][key])), key


def test_only_the_last_are_kept_and_nothing_is_left_half(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    partial = tmp_path / "step-00000031.partial"
    partial.mkdir(parents=True)
    (partial / "state.json").write_text("{")
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]


def test_of_every_so_many_hours_the_last_one_stays(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step, hours=0.7 * step, keep_hours=2.0)
    # hours .7 1.4 | 2.1 2.8 3.5 | 4.2 4.9 5.6 | 6.3 7
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [2, 5, 8, 9, 10]
    (tmp_path / "step-00000005" / "state.json").write_text("{")
    save(tmp_path, 11, keep_hours=2.0, hours=8.1)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [2, 8, 10, 11]


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_cut_in_half_is_passed_over_and_said_so(tmp_path: Path, file: str) -> None:
    save(tmp_path, 10)
    cut = save(tmp_path, 20) / file
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    said: list[str] = []
    found = latest(tmp_path, said.append)
    assert found is not None and found.state["step"] == 10
    assert len(said) == 1 and "step-00000020 cannot be read and is passed over" in said[0]


@pytest.mark.parametrize("file", ["model", "ema", "optimizer", "generate"])
def test_a_lost_file_or_a_flipped_bit_is_passed_over_and_said_so(tmp_path: Path, file: str) -> None:
    save(tmp_path, 10)
    path = next(save(tmp_path, 20).glob(f"{file}.*"))
    data = path.read_bytes()
    for at in (0, len(data) // 3, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        said: list[str] = []
        found = latest(tmp_path, said.append)
        assert found is not None and found.state["step"] == 10
        assert len(said) == 1 and f"step-00000020 cannot be read and is passed over: {path.name} is damaged" in said[0]
    path.unlink()
    found = latest(tmp_path, said.append)
    assert found is not None and found.state["step"] == 10 and path.name in said[-1]


def test_a_state_with_a_flipped_bit_is_never_taken_for_another(tmp_path: Path) -> None:
    path = save(tmp_path, 20) / "state.json"
    text = path.read_bytes()
    whole = parse_state(text)
    assert "sha256" not in whole
    same = 0
    for at in range(len(text)):
        for bit in (1, 4):
            try:
                found = parse_state(text[:at] + bytes([text[at] ^ bit]) + text[at + 1 :])
            except (ValueError, KeyError, TypeError):
                continue
            assert {name: found[name] for name in whole} == whole  # white space, or the name of the hash
            same += 1
    assert same < len(text) / 4


def test_a_checkpoint_without_a_list_of_files_is_read_but_not_without_the_average_that_it_must_have(tmp_path) -> None:
    folder = save(tmp_path, 20)
    state = parse_state((folder / "state.json").read_bytes())
    del state["files"]
    (folder / "state.json").write_text(json.dumps(state))
    found = latest(tmp_path)
    assert found is not None and len(found.averages) == 1
    state["recipe"] = {"stages": [{"ema_half_life": [10, 20]}]}
    state["progress"] |= {"stage": 0, "stage_step": 3}
    (folder / "state.json").write_text(json.dumps(state))
    said: list[str] = []
    with pytest.raises(CheckpointError):
        latest(tmp_path, said.append)
    assert "it has 1 of 2 moving averages" in said[0]


def test_nothing_is_drawn_from_the_weights_in_place_of_a_lost_average(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    (folder / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"it has no ema\.safetensors; take another checkpoint"):
        find_parts(folder)


def test_missing_files_and_other_versions_are_passed_over_and_none_left_is_an_error(tmp_path: Path) -> None:
    (save(tmp_path, 10) / "optimizer.safetensors").unlink()
    state = save(tmp_path, 20) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"version": 99}))
    said: list[str] = []
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        latest(tmp_path, said.append)
    assert len(said) == 2 and "version 99" in said[0]


def test_a_run_goes_on_from_the_last_good_checkpoint(recipe, tmp_path: Path, capsys) -> None:
    train(recipe(out=str(tmp_path / "whole")))
    train(recipe())
    newest = tmp_path / "run" / "checkpoints" / "step-00000012" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train(recipe())["steps"] == 12
    said = capsys.readouterr().out
    assert "step-00000012 cannot be read" in said and "going on after 128 of 192 images" in said
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("run", "whole")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 10, seed=1)
    for number in range(1, 12):  # before each of the writes and syncs
        count = 0

        def die(*args, number=number, real=checkpoint_folder.sync):
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_folder, "sync", die)
            with contextlib.suppress(KeyboardInterrupt):
                save(tmp_path, 20 + number, keep=1, seed=2)
        found = latest(tmp_path)
        assert found is not None and found.state["step"] in (10, *range(21, 21 + number))


def test_a_disk_that_is_full_costs_a_checkpoint_and_not_the_run(recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    """The limit on a file's size stands for the disk: the weights fit, AdamW's state does not, but for the last one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    written, real = [], FolderCheckpoints.write

    def write(self, step, *args):
        written.append(step)
        full = step in (8,)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 if full else limits[0], limits[1]))
        try:
            return real(self, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(FolderCheckpoints, "write", write)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        summary = train(recipe())
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert written == [4, 8, 12] and summary["steps"] == 12
    assert "the checkpoint of step 8 cannot be written" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000012"]
    with monkeypatch.context() as patch:

        def never(*args):
            raise OSError(28, "No space left on device")

        patch.setattr(FolderCheckpoints, "write", never)
        with pytest.raises(CheckpointError, match=r"step 4 cannot be written: .*No space left"):
            train(recipe(out=str(tmp_path / "other"), stages=[STAGE | {"steps": 4}]))
