"""Processes that end before their time, and decoding that survives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from microdit.pipeline.content.images import BadImage, Prepared
from microdit.pipeline.stages.isolated_decode import IsolatedDecoder

ROOT = Path(__file__).parents[3]

HANG = """
import time
from microdit.pipeline.base.liveness import alive, watched
with watched(2.0):
    for _ in range(8):
        alive()
        time.sleep(0.5)
print("outlived", flush=True)
time.sleep(3)
print("unwatched", flush=True)
with watched(0.5):
    def hang():
        time.sleep(60)
    hang()
"""

POINT = """
from microdit.pipeline.base.fail_points import fail_point
for step in range(5):
    fail_point("writing")
    fail_point("written")
    print(step, flush=True)
"""


def run(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_what_makes_no_headway_ends_and_says_where() -> None:
    found = run(HANG)
    assert found.returncode == 1
    assert found.stdout == "outlived\nunwatched\n"
    assert "Timeout" in found.stderr and "in hang" in found.stderr


def test_a_fail_point_kills_at_the_nth_passing_and_nothing_without_one() -> None:
    assert run(POINT).stdout == "0\n1\n2\n3\n4\n"
    found = run(POINT, MICRODIT_FAIL_POINT="written:3")
    assert (found.returncode, found.stdout) == (-signal.SIGKILL, "0\n1\n")


def decode(data: bytes) -> Prepared:
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"stall":
        time.sleep(600)
    if data == b"bad":
        raise BadImage("truncated", "half of it is missing")
    if data == b"odd":
        raise RuntimeError("out of luck")
    return Prepared(data, 1, 1, 1, 1, "png")


def test_an_image_that_kills_its_decoder_fails_alone() -> None:
    reasons = []
    with IsolatedDecoder(decode, timeout=3.0) as isolated:
        for data in (b"one", b"crash", b"two", b"bad", b"stall", b"three"):
            try:
                reasons.append(isolated(data).data)
            except BadImage as error:
                reasons.append(error.reason)
        with pytest.raises(ValueError, match="RuntimeError: out of luck"):
            isolated(b"odd")
        assert isolated(b"four").data == b"four"
    assert reasons == [b"one", "crash", b"two", "truncated", "stall", b"three"]
