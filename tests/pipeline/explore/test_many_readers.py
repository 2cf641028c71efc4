"""Twenty readers at once while a build writes, one of them with heavy SQL: two minutes, so marked slow."""

import itertools
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.corpus.presence import presence
from microdit.pipeline.corpus.records import ShardRef
from tests.pipeline.explore.serving import Served, served
from tests.pipeline.helpers.small_corpus import SHARD_SAMPLES, SOURCE, fill, make_corpus, write_column, write_images

READERS, SECONDS, ALONE = 20, 120.0, 20.0
HEAVY = "(SELECT count(*) FROM samples a, samples b, samples c, range(2000)) >= 0"


def look(server: Served, number: int, until: float, seconds: list[float], wrong: list[Any]) -> None:
    """Ask as a reader does until a time; note how long each look took and what was wrong."""
    reader = Served(server.url, cookies={"microdit-reader": f"reader-{number}"})
    for turn in itertools.count():
        if time.monotonic() > until:
            return
        began = time.monotonic()
        try:
            counted = reader.get("count", where=f"row >= {turn % 6} AND {number * 100_000 + turn} > 0")
            # every shard has the rows 0 to 5; a count and the whole may be of two tables that followed each other
            if counted["rows"] % (6 - turn % 6) or counted["of"] % 6 or not counted["rows"]:
                wrong.append(counted)
            rows = reader.get("rows", limit=20)["rows"]
            if [row["row"] for row in rows] != [n % 6 for n in range(20)]:
                wrong.append(rows)
            reader.get("histogram", column="basic_sharpness", where=f"row < {number}")
            picture = next(row for row in rows if row["status"] == "ok")
            if reader.ask(f"/api/image?source={picture['source']}&key={picture['key']}").status != 200:
                wrong.append(picture)
        except (AssertionError, OSError) as error:
            wrong.append(error)
        seconds.append(time.monotonic() - began)


def looks(server: Served, seconds: float) -> tuple[list[float], list[Any]]:
    """Let all readers but the heavy one look for so long."""
    taken: list[float] = []
    wrong: list[Any] = []
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=look, args=(server, n, until, taken, wrong)) for n in range(1, READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, wrong


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_readers_while_a_build_writes(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus, units=8)
    ended = threading.Event()

    def build() -> None:
        for number in itertools.count(100):
            unit = f"{SOURCE}-{number:06d}"
            newest = {"images": write_images(corpus, ShardRef(source=SOURCE, unit=unit, shard=f"{unit}-00"))}
            for column in ("captions/source", "scores/basic"):
                newest[column] = write_column(corpus, column, newest)
            if ended.wait(1.0):
                return

    with served(corpus) as server, presence(corpus):
        alone, wrong = looks(server, ALONE)
        assert not wrong, wrong[:3]
        before = server.get("count")["of"]
        builder = threading.Thread(target=build)
        builder.start()
        heavy = Served(server.url, cookies={"microdit-reader": "heavy"})

        def ask_heavily() -> None:
            while not ended.is_set():
                heavy.ask(f"/api/count?where={HEAVY.replace(' ', '%20').replace('>', '%3E')}")

        other = threading.Thread(target=ask_heavily, daemon=True)
        other.start()
        beside, wrong = looks(server, SECONDS)
        ended.set()
        builder.join()
        assert not wrong, wrong[:3]
        assert server.get("count")["of"] > before and not server.get("count")["of"] % SHARD_SAMPLES
    assert statistics.median(beside) < 2 * statistics.median(alone) + 0.1, (alone, beside)
