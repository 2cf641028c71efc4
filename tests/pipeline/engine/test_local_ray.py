"""Ray on a machine that others share: it listens on loopback alone, and nobody else knows its token."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

PROGRAM = """
import json, os, subprocess, sys
import ray
from microdit.pipeline.engine.cluster import joined

@ray.remote
def token():
    return os.environ["RAY_AUTH_TOKEN"], os.environ["OMP_NUM_THREADS"]

def tree(process):
    children = subprocess.run(["pgrep", "-P", process], capture_output=True, text=True).stdout.split()
    return [process, *(one for child in children for one in tree(child))]

with joined():
    answer = ray.get(token.remote())
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    own = {f"pid={process}," for process in tree(str(os.getpid()))}
    addresses = [line.split()[3:] for line in listening if any(one in line for one in own)]
    ask = f"from ray._raylet import GcsClient; GcsClient({ray.get_runtime_context().gcs_address!r})"
    stranger = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True,
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64},
    )
    folder = ray._private.worker._global_node.get_session_dir_path()
    root = os.path.dirname(os.path.dirname(folder))
    modes = [oct(os.stat(path).st_mode & 0o777) for path in (root, folder)]
left = "RAY_AUTH_TOKEN" in os.environ or os.path.exists(root)
print(json.dumps([answer, addresses, left, stranger.stderr, modes]))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    home = tmp_path_factory.mktemp("home")
    left_out = {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment | {"HOME": str(home)},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return home, json.loads(done.stdout.splitlines()[-1])


def test_it_listens_on_loopback_alone(report: tuple[Path, list]) -> None:
    addresses = report[1][1]
    programs = {re.search(r'\("([^"]+)"', users)[1] for _, _, users in addresses}  # type: ignore[index]
    assert {"gcs_server", "raylet"} <= programs
    assert [one for one in addresses if not one[0].startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:", "[::1]:"))] == []


def test_its_token_is_the_builds_alone_and_in_no_file(report: tuple[Path, list]) -> None:
    home, ((token, threads), _, left, refused, modes) = report
    assert re.fullmatch("[0-9a-f]{64}", token) and threads == "1"
    assert modes[0] == "0o700"  # Ray itself opens to everybody what it makes: modes[1]
    assert not left and not list(home.rglob("*token*"))
    assert "InvalidAuthToken" in refused  # of another token
