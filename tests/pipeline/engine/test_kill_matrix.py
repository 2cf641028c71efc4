"""SIGKILL at every step of a shard's life, without Ray; then it goes on: nothing lost or twice, the same bytes."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.view import query
from microdit.pipeline.upkeep.gc import gc
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.small_corpus import Hashes, hashes, named_objects
from tests.pipeline.helpers.whole_build import COLUMNS, INPUTS, SHARDS, UNITS, build_whole

ROOT = Path(__file__).parents[3]


# the step, and how often an undisturbed build comes by
POINTS = {
    "fetching": SHARDS,
    "writing": 40,
    "written": SHARDS * len(COLUMNS),
    "committing": SHARDS * len(COLUMNS),
    "linking": SHARDS * len(COLUMNS) + UNITS,
    "committed": SHARDS * len(COLUMNS),
    "committing-unit": UNITS,
    "committed-unit": UNITS,
    "publishing-table": 1,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Hashes:
    url = tmp_path_factory.mktemp("undisturbed") / "corpus"
    assert build_whole(url) == SHARDS * len(COLUMNS)
    return hashes(Corpus.open(url), COLUMNS)


@pytest.mark.parametrize("point", POINTS)
def test_killed_there_it_goes_on(point: str, tmp_path: Path, undisturbed: Hashes) -> None:
    seed = random.randrange(2**32)
    number = random.Random(seed).randint(1, POINTS[point])
    print(f"seed {seed}: {point}:{number}")
    url = tmp_path / "corpus"
    killed = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.helpers.whole_build", str(url)],
        cwd=ROOT,
        env=os.environ | {"MICRODIT_FAIL_POINT": f"{point}:{number}"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=250,
    )
    assert killed.returncode == -signal.SIGKILL, f"the fault did not fire: {killed.stderr}"

    corpus = Corpus.open(url)
    assert verify(corpus).problems == []  # in this state, too
    before = {str(path): path.read_bytes() for path in (url / "commits").rglob("*.json")}
    there = hashes(corpus, COLUMNS)
    named = named_objects(corpus, COLUMNS)
    orphans = {item.name for c in COLUMNS for item in corpus.store.list(c)} - named
    assert len(orphans) <= 2  # the objects of the one attempt that was in flight
    made = build_whole(url)

    assert made == SHARDS * len(COLUMNS) - len(there)  # no more than was missing
    assert hashes(corpus, COLUMNS) == undisturbed
    after = {str(path): path.read_bytes() for path in (url / "commits").rglob("*.json")}
    assert before.items() <= after.items()
    assert len(after) == SHARDS * len(COLUMNS) + UNITS
    assert verify(corpus).problems == []
    assert query(corpus, "SELECT count(*) AS n, count(DISTINCT id) AS ids FROM samples").to_pylist() == [
        {"n": UNITS * INPUTS, "ids": UNITS * INPUTS}
    ]
    gc(corpus, older_than_hours=0)
    assert not orphans & {item.name for item in corpus.store.list()}
    assert not list(corpus.store.unfinished())
    assert verify(corpus).problems == []
