"""The commands of README and of three guides, in their order, as a reader would type them; only made smaller."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

ROOT = Path(__file__).parent.parent

PAGES = ["README.md", *(f"docs/guides/{name}.md" for name in ("building", "choosing", "clusters"))]

BUILD = [
    "shard_samples=16", "max_failures=0.5", "sources.openmoji.unit_inputs=32", "sources.openmoji.limit=32",
    "sources.openmoji.fetch.timeout=4", "sources.openmoji.fetch.idle_timeout=2",
]  # fmt: skip

TRAIN = [
    "stages.0.images=64",
    "stages.1.images=128",
    "hold_out=4",
    "lanes=16",
    "model.dim=64",
    "model.patch_mixer_dim=64",
]

ELSEWHERE = {  # what runs the commands that are not microdit's
    "pip ": "tests/test_package.py",  # a wheel of the sdist, installed and used
    "make demo": "tests/test_demo.py",  # the demo that it starts
    "make test": ".ci/run",
    "microdit build configs/microdit-": "tests/pipeline/config/test_shipped_configs.py",
    "microdit select s3://my-bucket/microdit-37m": "tests/pipeline/selection/test_selections.py",
    "hf auth login": "tests/pipeline/config/test_shipped_configs.py",  # with a token in the environment
    "sbatch": "tests/infra/test_slurm.py",
}


def commands() -> list[str]:
    """The commands of all pages; one that comes again is left out."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    return list(dict.fromkeys(lines))


@pytest.mark.timeout(600)
def test_every_command_runs(tmp_path: Path, s3_server: str) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    boto3.client("s3").create_bucket(Bucket="my-bucket")
    program = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ran = set()
    for command in commands():
        words = shlex.split(command)
        if where := [path for start, path in ELSEWHERE.items() if command.startswith(start)]:
            assert (ROOT / where[0]).exists()
            continue
        assert words[0] == "microdit", f"nothing runs {command!r}"
        smaller = {"build": BUILD, "train": TRAIN}.get(words[1], [])
        run = subprocess.run(
            [*program, *words[1:], *smaller], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
        assert run.stdout.strip(), command
        ran.add(words[1])
    assert {"build", "plan", "status", "query", "verify", "report", "dedup", "select", "train", "generate", "ls"} <= ran
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "pictures").glob("*.png"))
