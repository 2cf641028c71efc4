"""The whole road, smaller: killed on the way, run again to the end, and run once more with nothing to do."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from microdit.pipeline.cli.demo import COLUMNS
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources.openmoji.server import prepare
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify import verify

pytestmark = pytest.mark.timeout(600)
DRAWINGS = 150
LEFT_OUT = {"captions/long", "text/minilm@long", "latents/demo-128"}  # of configs/demo.yaml: nothing is trained on them

TRAIN = [
    "stages.0.batch=64",
    "stages.1.batch=64",
    "stages.0.images=1280",
    "stages.1.images=5120",
    "checkpoint_every=5",
    "hold_out=16",
    "model.dim=64",
    "model.patch_mixer_dim=64",
]


def start(out: Path, cache: Path) -> subprocess.Popen[bytes]:
    build = ["shard_samples=32", "sources.openmoji.unit_inputs=64", f"sources.openmoji.limit={DRAWINGS}"]
    build.append(f"sources.openmoji.cache={cache}")
    code = (
        "import sys; from pathlib import Path; from microdit.pipeline.cli.demo import run_demo; "
        f"sys.exit(run_demo(Path({str(out)!r}), {build!r}, {TRAIN!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    output = process.communicate(timeout=500)[0].decode()
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen[bytes], reached: Path, pattern: str, pause: float) -> None:
    """SIGKILL the whole process group a moment after a file that matches is there."""
    deadline = time.monotonic() + 400
    while not any(reached.rglob(pattern)):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline, f"no {pattern} below {reached}"
        time.sleep(0.05)
    time.sleep(pause)
    assert process.poll() is None, "it was over before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_demo_killed_twice_and_run_again(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    pauses = random.Random(seed)
    out, cache = tmp_path / "demo", tmp_path / "cache"

    kill_when(start(out, cache), out / "corpus/commits", "*.json", pauses.uniform(0, 1))
    assert not (out / "run").exists(), "the first kill came in the middle of the build"
    kill_when(start(out, cache), out / "run", "state.json", pauses.uniform(0, 0.5))
    assert not (out / "report.html").exists(), "the second kill came in the middle of the training"
    said = finish(start(out, cache))
    assert "this machine trains on about" in said

    corpus = Corpus.open(out / "corpus")
    checked = verify(corpus)
    assert checked.ok, checked.problems
    listed = prepare(cache / f"openmoji-{DRAWINGS}", DRAWINGS)
    counts = checked.totals.samples
    built = {name: column for name, column in counts.items() if name not in LEFT_OUT}
    assert all(column.inputs == listed.inputs == column.out + column.failed for column in built.values())
    dropped = sum(len(urls) for kind, urls in listed.bad.items() if kind != "duplicate")
    assert {column.failed for column in built.values()} == {dropped}
    assert set(built) == set(COLUMNS)
    left = {name: {entry.left for entry in column.values()} for name, column in status(corpus).columns.items()}
    assert {name for name, shards in left.items() if shards != {0}} == LEFT_OUT
    plan = json.loads((out / "run/plan.json").read_text())
    assert plan["every"] and plan["drawings"] > 100  # so few are all taken

    figures = json.loads((out / "run/evaluation.json").read_text())
    assert figures["psnr"] > figures["untrained"]["psnr"]  # even so short a training learns something
    assert Image.open(out / "run/grid.png").width > 500
    assert "data:image/" in (out / "report.html").read_text()

    (asked,) = [line for line in said.splitlines() if "your turn" in line]
    command = shlex.split(asked.partition("microdit ")[2])
    assert command[-1] == "a red apple"  # no caption of the selection's form, but one that it was trained on too
    program = "from microdit.pipeline.cli.app import main; main()"
    subprocess.run([sys.executable, "-c", program, *command, "--out", str(tmp_path / "apple")], check=True)
    assert Image.open(next((tmp_path / "apple").glob("*.png"))).size == (64, 64)

    before = {path: path.stat().st_mtime_ns for path in (out / "corpus").rglob("*.tar")}
    output = finish(start(out, cache))
    assert "nothing to do" in output
    assert {path: path.stat().st_mtime_ns for path in (out / "corpus").rglob("*.tar")} == before
