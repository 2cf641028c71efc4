"""Shards and units that were tried often enough and set aside, with what went wrong (docs/corpus.md, section 8)."""

import re
import socket
from datetime import UTC, datetime

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Record

FAILURE = re.compile(r"failures/([^/]+(?:/[^/]+)?)/([^/]+)/([^/]+)\.(0|[1-9][0-9]*)\.json")


class Failure(Record):
    """Why one shard of one column, or with the column `units` one unit, could not be made."""

    version: int = 1
    column: str
    source: str
    shard: str
    stage: str
    attempts: int
    message: str
    traceback: str
    host: str
    time: str


def failures(corpus: Corpus, column: str, source: str | None = None) -> dict[tuple[str, str], int]:
    """What was set aside, from one listing: {(source, shard or unit): number of its newest record}.

    A shard that was committed later has its record still: what is committed is not failed.
    """
    newest: dict[tuple[str, str], int] = {}
    for item in corpus.store.list(f"failures/{column}/{source}" if source else f"failures/{column}"):
        match = FAILURE.fullmatch(item.name)
        if match and match[1] == column:  # "captions" lists "captions/long" too
            where = (match[2], match[3])
            newest[where] = max(newest.get(where, 0), int(match[4]))
    return newest


def read_failure(corpus: Corpus, column: str, source: str, shard: str, number: int) -> Failure:
    """One record.

    Raises:
        FileNotFoundError: there is none.
    """
    return Failure.parse(corpus.store.get(f"failures/{column}/{source}/{shard}.{number}.json"))


def write_failure(
    corpus: Corpus, column: str, source: str, shard: str, *, stage: str, attempts: int, message: str, traceback: str
) -> Failure:
    """Record that a shard (or a unit) is set aside: under the first number that is free."""
    record = Failure(
        column=column,
        source=source,
        shard=shard,
        stage=stage,
        attempts=attempts,
        message=message[:2000],
        traceback=traceback[-20000:],
        host=socket.gethostname(),
        time=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )
    number = failures(corpus, column, source).get((source, shard), -1) + 1
    while True:
        try:
            corpus.store.create(f"failures/{column}/{source}/{shard}.{number}.json", record.to_bytes())
        except FileExistsError:
            number += 1
        else:
            return record
