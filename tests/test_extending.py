"""The page on extending: its files and edits, made in a copy of the tree, and its build."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
FOLDERS = ("microdit", "model", "pipeline", "trainer", "configs")
LINES = 40  # of a source or a scorer, its imports included


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.timeout(300)
def test_the_page_builds_with_its_source_and_its_scorer(tmp_path: Path) -> None:
    tree, folder = tmp_path / "tree", tmp_path / "photos"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for code in blocks("python"):
        name = code.splitlines()[0].removeprefix("# ")
        assert not (ROOT / name).exists()
        assert sum(1 for line in code.splitlines() if line) <= LINES
        (tree / name).write_text(code)
    for diff in blocks("diff"):
        subprocess.run(["patch", "-p1", "--batch", "--fuzz=0"], cwd=tree, input=diff, text=True, check=True)
    folder.mkdir()
    for name, colour in (("gray", (128, 128, 128)), ("red", (255, 0, 0))):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} picture")
    (config,) = blocks("yaml")
    (tmp_path / "extended.yaml").write_text(config)

    program = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    for command in blocks("sh")[0].splitlines():
        words = [*program, *shlex.split(command)[1:]]
        run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
    lines = [line for line in run.stdout.splitlines() if "picture" in line]
    assert "red" in lines[0] and "gray" in lines[1]
    assert float(re.findall(r"[\d.]+", lines[0])[-1]) > 80 and float(re.findall(r"[\d.]+", lines[1])[-1]) == 0
