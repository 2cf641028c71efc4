"""What an earlier version made is read, verified and resumed (tests/data/compat, README.md there)."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from microdit.pipeline.cli.app import app
from microdit.trainer.recipe import load_recipe
from microdit.trainer.train import train

DATA = Path(__file__).parent / "data" / "compat"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())
CLOSE = 1e-4  # relative: other processors and versions of torch move the last bits


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in: paths in it are relative, and resuming replaces the checkpoint."""
    shutil.copytree(DATA, tmp_path / "compat")
    for path in (tmp_path / "compat").rglob("*"):  # a table older than its commits would be made again
        os.utime(path, (1_700_000_000 + ("tables" in path.parts),) * 2)
    monkeypatch.chdir(tmp_path / "compat")
    return tmp_path / "compat"


def microdit(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def answer(*arguments: str) -> dict[str, Any]:
    found = json.loads(microdit(*arguments, "--json"))
    found.pop("corpus", None)
    return found


def test_the_corpus_is_read_and_nothing_is_made_again(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert answer("verify", "corpus") == EXPECTED["verify"]
    devices = {"latents/demo-64": {"cpu": 1}, "text/minilm@source": {"cpu": 1}}  # added since
    assert answer("status", "corpus") == EXPECTED["status"] | {"devices": devices}
    built = answer("build", "build.yaml")  # a declaration or a fingerprint that changed would be refused or made again
    for name, wanted in EXPECTED["build_again"].items():
        if name != "columns":
            assert built[name] == wanted, name
    for column, wanted in EXPECTED["build_again"]["columns"].items():
        assert {key: built["columns"][column][key] for key in wanted} == wanted
    queried = answer("query", "corpus", EXPECTED["query"]["sql"])
    assert queried == {key: EXPECTED["query"][key] for key in queried}
    selected = answer("select", "corpus", EXPECTED["select"]["name"], EXPECTED["select"]["sql"])
    assert (selected["hash"], selected["rows"]) == (EXPECTED["select"]["hash"], EXPECTED["select"]["rows"])
    for column, names in EXPECTED["ls"].items():
        assert [str(Path(name).relative_to(folder)) for name in microdit("ls", "corpus", column).split()] == names
    parts = folder / "corpus/tables/samples"  # the table in one piece that is there is not used
    assert [path for path in sorted(folder.rglob("*")) if path != parts and path.parent != parts] == before


def test_a_picture_is_drawn_from_the_checkpoint(folder: Path) -> None:
    wanted = EXPECTED["generate"]
    microdit("generate", *wanted["arguments"])
    picture = Image.open(wanted["file"])
    assert json.loads(picture.text["parameters"]) == wanted["parameters"]  # type: ignore[attr-defined]
    assert np.asarray(picture.convert("RGB")).mean((0, 1)) == pytest.approx(wanted["channel_means"], abs=0.5)


def test_the_run_is_resumed_to_the_same_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = EXPECTED["resumed"]
    summary = train(load_recipe("recipe.yaml"))
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith(("going on", "finished"))] == wanted["says"]
    for name, value in wanted["summary"].items():
        close = isinstance(value, float)
        assert summary[name] == (pytest.approx(value, rel=CLOSE) if close else value), name
    assert [path.name for path in Path("run/checkpoints").iterdir()] == wanted["checkpoints"]
    weights = load_file("run/checkpoints/step-00000012/model.safetensors")
    norms = {name: value.double().norm().item() for name, value in weights.items()}
    assert norms.keys() == wanted["norms"].keys()
    assert all(math.isclose(norms[name], wanted["norms"][name], rel_tol=CLOSE, abs_tol=CLOSE) for name in norms)
