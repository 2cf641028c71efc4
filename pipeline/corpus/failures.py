"""Records of shards and units that failed too often and were set aside (docs/reference/corpus.md, section 8)."""

import re
import socket
from datetime import UTC, datetime

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import ShardId
from microdit.pipeline.corpus.records import Record

FAILURE = re.compile(r"failures/([^/]+(?:/[^/]+)?)/([^/]+)/([^/]+)\.(0|[1-9][0-9]{0,8})\.json")


class Failure(Record):
    """The record of one shard of one column, or with the column `units` of one unit, that could not be made."""

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


def failures(corpus: Corpus, column: str, source: str | None = None) -> dict[ShardId, int]:
    """List what was set aside: {(source, shard or unit): number of its newest record}.

    A shard that was committed later still has its record; it is not set aside any more.
    """
    newest: dict[ShardId, int] = {}
    for item in corpus.store.list(f"failures/{column}/{source}" if source else f"failures/{column}"):
        match = FAILURE.fullmatch(item.name)
        if match and match[1] == column:  # "captions" lists "captions/long" too
            shard_id = (match[2], match[3])
            newest[shard_id] = max(newest.get(shard_id, 0), int(match[4]))
    return newest


def read_failure(corpus: Corpus, column: str, source: str, shard: str, number: int) -> Failure:
    """Read one record.

    Raises:
        FileNotFoundError: there is none.
    """
    return Failure.parse(corpus.store.get(f"failures/{column}/{source}/{shard}.{number}.json"))


def write_failure(
    corpus: Corpus, column: str, source: str, shard: str, *, stage: str, attempts: int, message: str, traceback: str
) -> Failure:
    """Record that a shard (or a unit) is set aside, under the first free number."""
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
