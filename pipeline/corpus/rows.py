"""Read the rows of a shard: the sidecar's lines and the tar's members, joined by row."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import commit_name
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.corpus.shard_files import read_tar


@dataclass(frozen=True)
class Row:
    """One sample of a shard: its line of the sidecar, and its members (none in a table, or if it failed)."""

    row: int
    key: str
    ok: bool
    scalars: dict[str, Any]
    members: dict[str, bytes]


def latest(corpus: Corpus, column: str, ref: ShardRef) -> Commit:
    """Read the commit of the highest generation of a shard.

    Raises:
        FileNotFoundError: the shard is not committed.
        DamagedError: that commit cannot be understood.
    """
    generation = 0
    # generations count up without a gap; the content of lower ones does not matter
    while corpus.store.exists(commit_name(column, ref.source, ref.shard, generation + 1)):
        generation += 1
    return corpus.commit(column, ref.source, ref.shard, generation)


def read_lines(corpus: Corpus, commit: Commit) -> Iterator[Row]:
    """Read all rows of a committed shard, in row order, without their members: the sidecar alone is read."""
    for line in corpus.sidecar(commit).to_pylist():
        yield Row(line["row"], line["key"], line["status"] == "ok", line, {})


def read_rows(corpus: Corpus, commit: Commit) -> Iterator[Row]:
    """Read all rows of a committed shard, in row order, the failed ones too; a tar is read as a stream.

    Raises:
        ValueError: the tar and the sidecar disagree.
    """
    if commit.object == commit.sidecar:
        yield from read_lines(corpus, commit)
        return
    with corpus.open_object(commit) as file:
        samples = read_tar(file)
        for row in read_lines(corpus, commit):
            if not row.ok:
                yield row
                continue
            key, members = next(samples, ("", {}))
            if key != row.key:
                raise ValueError(f"{commit.object.name}: row {row.row} is {row.key!r}, the tar has {key!r}")
            yield replace(row, members=members)
