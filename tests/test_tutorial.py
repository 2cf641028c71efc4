"""The tutorial, as a reader would follow it: its config, its commands, on a folder of 200 drawings."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from microdit.pipeline.sources.openmoji.drawings import catalogue, rasterise

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/tutorial.md").read_text()
PICTURES = 200
SMALLER = {
    "train": ["stages.0.images=256", "stages.1.images=512", "model.dim=64", "model.patch_mixer_dim=64"],
    "generate": ["--steps", "4"],
}  # fmt: skip


def draw_folder(folder: Path) -> None:
    """Write 200 drawings with their names beside them; one file is no image."""
    folder.mkdir()
    for number, emoji in enumerate(catalogue()[:: len(catalogue()) // PICTURES][:PICTURES]):
        rasterise(emoji.svg.read_text(), 96).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(f"{emoji.name}, {emoji.group}\n")
    (folder / "0007.png").write_bytes(b"no image")


@pytest.mark.timeout(600)
def test_the_tutorial_from_a_folder_to_pictures(tmp_path: Path) -> None:
    draw_folder(tmp_path / "photos")
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(config)
    program = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said = {}
    commands = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    assert commands.pop(0) == "microdit demo"  # tests/test_demo.py
    assert "--checkpoint runs/demo/run" in commands.pop(0)  # the same
    for command in commands:
        words = shlex.split(command)
        words = [*program, *words[1:], *SMALLER.get(words[1], [])] if words[0] == "microdit" else words
        run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
        said[command] = run.stdout
    reasons = next(text for command, text in said.items() if "SELECT reason" in command)
    assert "not_an_image" in reasons and str(PICTURES - 1) in reasons
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 10_000
    assert (tmp_path / "runs/mine/run/log.jsonl").exists()
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3  # two and their sheet
