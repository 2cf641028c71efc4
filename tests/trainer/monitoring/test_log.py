"""W&B as it is, offline: nothing here asks the network. Skipped where it is not installed."""

import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.monitoring.log import Log
from microdit.trainer.monitoring.progress import Progress
from microdit.trainer.train import train
from tests.trainer.conftest import STAGE

BLOCK, HEADER = 32768, 7  # of the log of records, in LevelDB's form


def records(path: Path) -> Iterator[bytes]:
    """What a `.wandb` file holds: pieces behind headers (checksum, length, kind), none over the end of a block."""
    data, at, record = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def history(path: Path) -> dict[int, dict]:
    """Values by step, as they are in an offline run's file."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found: dict[int, dict] = {}
    for data in records(path):
        record = messages.Record.FromString(data)
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found.setdefault(items["_step"], {}).update(items)
    return found


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    module = pytest.importorskip("wandb")
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    module.teardown()  # its settings are read once
    yield module
    module.teardown()


def test_an_offline_run_holds_what_the_log_says_and_goes_on_as_itself(wandb, recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fields = {"stages": [STAGE | {"steps": 4}], "wandb": "tests", "hold_out": 4, "validate_every": 2}
    train(recipe(**fields, checkpoint_every=2))
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    found = history(next(run.glob("*.wandb")))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert {line["step"] for line in lines} == set(found) == set(range(5))
    for line in lines:
        told = found[line["step"]]
        if "loss" in line:
            for name in ("loss", "grad_norm", "learning_rate", "images"):
                assert told[name] == line[name], (line["step"], name)
            assert told["loss_by_noise/0..1"] == line["loss_by_noise"]["0..1"]
        else:
            assert told["validation/loss"] == line["validation"]["loss"]
    # killed after step 2 and run again: another folder, for the same run
    for name in ("00000003", "00000004"):
        for path in (tmp_path / "run" / "checkpoints").glob(f"step-{name}"):
            path.rename(tmp_path / path.name)
    train(recipe(**fields, checkpoint_every=2))
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({path.name.rpartition("-")[2] for path in runs}) == 1
    again = history(next(next(path for path in runs if path != run).glob("*.wandb")))
    assert {step: values["loss"] for step, values in again.items()} == {step: found[step]["loss"] for step in (3, 4)}


def test_pictures_go_there_too(wandb, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log, progress = Log(tmp_path, True, "tests"), Progress([1])
    log.open(-1, progress)
    log.line(1, loss=0.5)
    log.picture(1, Image.new("RGB", (8, 8), "red"))
    log.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (picture,) = run.glob("files/media/images/samples_1_*.png")
    with Image.open(picture) as opened:
        assert opened.convert("RGB").getpixel((4, 4)) == (255, 0, 0)
    assert history(next(run.glob("*.wandb")))[1]["loss"] == 0.5


def test_who_is_not_logged_in_is_told_at_the_start(wandb, recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sys, "stdin", None)  # no terminal to ask
    with pytest.raises(RequestError, match=r"wandb = tests: cannot log in there \(.*\); or set WANDB_MODE=offline"):
        train(recipe(wandb="tests"))
    assert not (tmp_path / "run").exists()


def test_where_it_is_not_installed_that_is_told_at_the_start(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RequestError, match=r'wandb = tests: pip install "microdit\[wandb\]" first'):
        train(recipe(wandb="tests"))
    assert not (tmp_path / "run").exists()
