"""Find the commits that a reader joins, and refuse those whose inputs have changed since."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow.compute as pc

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, ShardId
from microdit.pipeline.corpus.records import Commit, InputRef
from microdit.pipeline.tables.commit_table import LINE, commit_table

Names = dict[str, str]  # of commits, with the SHA-256 of their stored bytes


class CommitOf(NamedTuple):
    """Entry of the commit table; `size` in bytes of its objects."""

    name: str
    generation: int
    sha256: str
    size: int
    inputs: list[InputRef]


def newest_commits(corpus: Corpus, columns: Sequence[str]) -> dict[str, dict[ShardId, Commit]]:
    """Read the newest commits of columns, by column and by (source, shard).

    Raises:
        RequestError: a column is unknown, has no shard, or is stale: something that it was made from, directly or not,
            has been made again since.
    """
    commits: dict[str, dict[ShardId, Commit]] = {}
    waiting = list(columns)
    while waiting:  # the columns, what they were made from, and so on
        column = waiting.pop()
        if column not in commits:
            corpus.column(column)
            commits[column] = {(commit.source, commit.shard): commit for commit in corpus.commits(column)}
            waiting += sorted({ref.column for commit in commits[column].values() for ref in commit.inputs})
    _refuse_stale(commits)
    _refuse_empty(corpus, commits, columns)
    return {column: commits[column] for column in columns}


def newest_commit_lines(corpus: Corpus, columns: Sequence[str]) -> tuple[dict[str, dict[ShardId, CommitOf]], Names]:
    """Find the newest commits of columns as `newest_commits` does, from the commit table, as what that says of them.

    Returns them, and of all commits in the table the hashes by name. Raises as `newest_commits`.
    """
    damage: list[str] = []
    table = commit_table(corpus, damage)
    named = dict(zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    wanted = [line.name for line in LINE if line.name not in ("in", "out", "failed", "seconds", "reasons")]
    commits: dict[str, dict[ShardId, CommitOf]] = {}
    waiting = list(columns)
    while waiting:
        column = waiting.pop()
        if column in commits:
            continue
        corpus.column(column)
        for message in damage:
            if (match := COMMIT.search(message)) and match[1] == column:
                raise DamagedError(message)
        own = table.filter(pc.equal(table["column"], column)).select(wanted)
        ordered = own.sort_by([("source", "ascending"), ("shard", "ascending"), ("generation", "ascending")])
        commits[column] = {
            (source, shard): CommitOf(name, generation, sha256, size, [InputRef.model_construct(**ref) for ref in refs])
            for name, _, source, shard, generation, sha256, size, refs in zip(
                *(one.to_pylist() for one in ordered.columns), strict=True
            )
        }
        waiting += sorted({ref.column for commit in commits[column].values() for ref in commit.inputs})
    _refuse_stale(commits)
    _refuse_empty(corpus, commits, columns)
    return {column: commits[column] for column in columns}, named


def _refuse_empty(
    corpus: Corpus, commits: Mapping[str, Mapping[ShardId, Commit | CommitOf]], columns: Sequence[str]
) -> None:
    for column in columns:
        if not commits[column]:
            raise RequestError(f"column {column}: corpus {corpus.url} has no shard of it; build it first")


def _refuse_stale(commits: Mapping[str, Mapping[ShardId, Commit | CommitOf]]) -> None:
    """Raise RequestError if the newest commit of an input is not the one that was read."""
    hashes = {column: {where: commit.sha256 for where, commit in of.items()} for column, of in commits.items()}
    for column, of in commits.items():
        for where, commit in of.items():
            for ref in commit.inputs:
                if hashes[ref.column].get(where) == ref.sha256:
                    continue
                now = commits[ref.column].get(where)
                raise RequestError(
                    f"column {column}, shard {where[1]}: it was made from generation {ref.generation} of {ref.column}, "
                    f"the corpus now has {'none' if now is None else f'generation {now.generation}'}; "
                    "run `microdit build --repair`, which makes it again"
                )
