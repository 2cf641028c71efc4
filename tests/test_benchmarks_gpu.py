"""The command that measures on a GPU, rehearsed on a CPU: every part, what is missing, and how it goes on."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parent.parent
PACKAGES = ["torch==2.11.*", "transformers", "safetensors", "pillow", "numpy", "pydantic", "pyyaml", "typer"]


def run(out: Path, *options: str, python: str | Path = sys.executable, path: str = "") -> dict[str, Any]:
    """Rehearse; return what the command prints, which is what it has written."""
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"PYTHONPATH": path}
    command = [str(python), "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(out), *options, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode in (0, 1), done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    assert results == json.loads((out / "gpu.json").read_text())
    assert done.returncode == int(any(part["status"] != "measured" for part in results["parts"].values()))
    return results


def check(parts: dict[str, Any]) -> None:
    """Check that the parts that were measured have the figures that they owe."""
    for name, part in parts.items():
        assert part["status"] == "measured", (name, part)
        assert part["seconds"] > 0 and part["command"].startswith("python -m ")
    figures = {name: part["figures"] for name, part in parts.items()}
    assert not figures["tests"]["failed"]  # without a GPU they are skipped
    (row,) = figures["train_step_256"]["rows"]
    assert row["ratio_reference"] > 0 and row["mfu"] > 0 and len(row["slowest"]) == 3
    assert figures["encode"]["ratio_ceiling"] > 0 and figures["encode"]["ratio_common"] > 0
    assert figures["generate"]["ratio_plain"] > 0 and figures["generate"]["samplers"]["heun 3"]["calls"] == 5
    assert figures["caption"]["ratio_bare"] > 0
    assert 0 <= figures["feed"]["data_wait"] <= 1 and figures["feed"]["alone"]["loader"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_of_every_part(tmp_path: Path) -> None:
    some = ("tests", "train_step_256", "encode", "generate", "caption", "feed")  # the other two differ in options alone
    check(run(tmp_path, "--only", *some)["parts"])
    left = run(tmp_path, "--budget", "1")["parts"]  # what is measured is not measured again
    assert tuple(left) == tuple(gpu.PARTS)
    for name, part in left.items():
        if name in some:
            assert part["status"] == "measured"
        else:
            assert part["status"] == "not measured" and re.fullmatch(r"\d seconds were left: run again", part["reason"])


def test_a_part_that_does_not_end_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.run_bounded(command, 1.0, dict(os.environ))


def test_a_module_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PARTS, "feed", gpu.Part("benchmarks.no_such_part", 10))
    row = gpu.measure_part("feed", "cpu", True, 60, dict(os.environ, PYTHONPATH=str(ROOT)))
    assert row["status"] == "not measured" and "benchmarks.no_such_part" in row["reason"]


def test_what_fails_says_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PARTS, "feed", gpu.Part("tokenize", 10, takes_device=False))
    row = gpu.measure_part("feed", "cpu", True, 60, dict(os.environ))
    assert row["status"] == "failed" and "unrecognized arguments: --json" in row["reason"]


def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    gpu.write_results(tmp_path / "gpu.json", {"machine": {"gpu": "other"}, "tiny": False, "parts": {}})
    with pytest.raises(SystemExit, match="give another --out"):
        gpu.read_results(tmp_path / "gpu.json", {"machine": {"gpu": "this"}, "tiny": False})


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_rehearsal_in_an_environment_with_the_named_packages_alone(tmp_path: Path) -> None:
    """What else is needed is carried as wheels, as the command's help says."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", *PACKAGES], check=True, timeout=1800)
    bare = run(tmp_path / "bare", "--only", "train_step_256", "generate", "feed", python=python)["parts"]
    assert [part["status"] for part in bare.values()] == ["measured", "measured", "not measured"]
    assert "no module pyarrow here: carry its wheel" in bare["feed"]["reason"]
    named = re.search(r"pip download (.*?)\n\n", (gpu.__doc__ or "").replace("\\\n", " "), re.DOTALL)
    assert named is not None
    words = named[1].replace("DIR", str(tmp_path / "wheels")).split()
    subprocess.run([python, "-m", "pip", "download", "-q", *words], check=True, timeout=600)
    parts = run(tmp_path / "carried", "--wheels", str(tmp_path / "wheels"), "--budget", "1500", python=python)["parts"]
    check(parts)
