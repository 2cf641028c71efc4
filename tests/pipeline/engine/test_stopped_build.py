"""Builds that are killed or stopped by a signal: what is committed stays, and the same call goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine.build import carry_out
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.build_checks import MADE, check_adds_up, check_whole
from tests.pipeline.helpers.fake_stages import Pictures, ingest, open_corpus, source_words, upper_words

ROOT = Path(__file__).parents[3]


# a build in a process of its own: its folder, seconds a shard, units
PROGRAM = """
import sys
from pathlib import Path
from microdit.pipeline.base.signals import Stopped
from microdit.pipeline.engine.build import carry_out
from tests.pipeline.helpers.small_corpus import write_images
from tests.pipeline.helpers.fake_stages import Pictures, ingest, open_corpus, source_words, upper_words
url, seconds, count = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
sources, stages = [Pictures(count=count)], [source_words(seconds=seconds), upper_words(seconds=seconds)]
try:
    summary = carry_out(open_corpus(url, sources, stages), sources, stages, ingest)
except Stopped as stopped:
    print(stopped)
    sys.exit(128 + stopped.signum)
print(summary.worked, "ray" in sys.modules)
"""


def start(url: Path, seconds: float, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, str(url), str(seconds), str(count)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def commits(url: Path, column: str) -> list[Path]:
    return [path for path in (url / "commits" / column).rglob("*.json") if path.is_file()]


def wait_for_commits(process: "subprocess.Popen[str]", url: Path, column: str, number: int) -> None:
    until = time.monotonic() + 280
    while len(commits(url, column)) < number:
        assert process.poll() is None, f"the build ended too early: {process.stdout and process.stdout.read()}"
        assert time.monotonic() < until, "the build did not get that far"
        time.sleep(0.02)


def test_killed_in_the_middle_it_goes_on_and_a_third_run_has_nothing_to_do(cluster: None, tmp_path: Path) -> None:
    url, shards = tmp_path / "corpus", 16
    process = start(url, seconds=0.2, count=shards // 2)
    try:
        wait_for_commits(process, url, "captions/upper", 3)
    finally:
        process.kill()
        process.wait()
    time.sleep(1.0)  # workers end within a tenth of a second
    before = {column: {path.name: path.read_bytes() for path in commits(url, column)} for column in MADE}
    assert 3 <= len(before["captions/upper"]) < shards  # the kill came in the middle
    time.sleep(1.0)
    assert all(len(commits(url, column)) == len(before[column]) for column in MADE), "a worker outlived its driver"

    sources, stages = [Pictures(count=shards // 2)], [source_words(), upper_words()]
    corpus = open_corpus(url, sources, stages)
    summary = carry_out(corpus, sources, stages, ingest)
    check_whole(corpus, shards)
    check_adds_up(summary)
    for column in MADE:
        assert summary.columns[column].built == shards - len(before[column])
        kept = {path.name: path.read_bytes() for path in commits(url, column)}
        assert before[column].items() <= kept.items()  # nothing was made twice

    with start(url, seconds=0, count=shards // 2) as third:
        said = third.communicate(timeout=60)[0]
    assert (third.returncode, said.split()) == (0, ["False", "False"])  # nothing done, ray not even imported


STOPPED = 30  # seconds after a signal in which a build ends, whatever is in flight


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_the_shards_in_flight_end(number: signal.Signals, tmp_path: Path) -> None:
    url = tmp_path / "corpus"
    process = start(url, seconds=0.2, count=20)
    try:
        wait_for_commits(process, url, "captions/source", 3)
        process.send_signal(number)
        said = process.communicate(timeout=STOPPED)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert said.strip() == f"stopped by {number.name}; run the same command again and it goes on"
    assert len(commits(url, "captions/source")) < 40  # it came in the middle
    assert not list((url / "captions").rglob("*#*"))  # the shards in flight came to their end


def test_signals_while_ray_starts_end_with_their_number(tmp_path: Path) -> None:
    process = start(tmp_path / "corpus", seconds=600, count=2)
    try:
        children = ["pgrep", "-P", str(process.pid)]
        until = time.monotonic() + 120
        while subprocess.run(children, stdout=subprocess.DEVNULL).returncode != 0:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        said = process.communicate(timeout=STOPPED)[0]
    finally:
        process.kill()
    assert process.returncode in (143, -signal.SIGTERM), said  # a shell calls both 143
    assert said.strip() == "stopped by SIGTERM; run the same command again and it goes on"


@pytest.mark.slow
def test_a_signal_drops_the_shards_that_take_too_long(tmp_path: Path) -> None:
    url = tmp_path / "corpus"
    process = start(url, seconds=600, count=2)
    try:
        wait_for_commits(process, url, "images", 4)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=STOPPED)[0]
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert "stopped by SIGTERM" in said
    assert not commits(url, "captions/source")
    corpus = Corpus.open(url)
    assert verify(corpus).problems == []  # what was dropped does not exist for a reader
