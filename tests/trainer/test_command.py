"""Training as a command."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from microdit.pipeline.cli.command import torchrun
from microdit.trainer.train import train
from tests.trainer.conftest import STAGE, losses


def command(path: Path, *overrides: str, processes: int = 0) -> list[str]:
    start = torchrun(processes) if processes else [sys.executable]
    return [*start, "-m", "microdit.trainer", str(path), *overrides]


def unknown_host() -> list[str]:
    """Return the start of a command that runs under a host name which no name server knows, if that can be had."""
    prefix = ["unshare", "--uts", "sh", "-ec", 'hostname nowhere.invalid; exec "$@"', "sh"]
    can = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if can else []


def test_two_processes_give_the_losses_of_one(recipe, yaml_recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 3, "mask_ratio": 0.5, "micro_batch": 5}, STAGE | {"steps": 2}]
    train(recipe(stages=stages, out=str(tmp_path / "one")))
    path = yaml_recipe(stages=stages)
    two = [*unknown_host(), *command(path, processes=2)]
    done = subprocess.run(two, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert two.keys() == one.keys()
    # and one process goes on where two were
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000005")
    done = subprocess.run(command(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after 64 of 80 images" in done.stdout and "finished: 80 of 80 images" in done.stdout
    assert list(losses(tmp_path / "run").values()) == pytest.approx(list(one.values()), rel=1e-5)


def test_sigkill_and_sigterm_of_the_real_command(recipe, yaml_recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 150}]
    path = yaml_recipe(stages=stages, checkpoint_every=5)
    whole = recipe(stages=stages, out=str(tmp_path / "whole"), checkpoint_every=1000)
    train(whole)

    def run_until(step: int, number: int) -> int:
        process = subprocess.Popen(command(path), stdout=subprocess.DEVNULL)
        log = tmp_path / "run" / "log.jsonl"
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= step):
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait()

    assert run_until(12, signal.SIGKILL) == -signal.SIGKILL
    assert run_until(40, signal.SIGTERM) == 143
    done = subprocess.run(command(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_wrong_request_ends_with_status_2_and_one_message(yaml_recipe) -> None:
    done = subprocess.run(command(yaml_recipe(), "corpus=/nowhere"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "corpus /nowhere: there is no corpus.json" in done.stderr
