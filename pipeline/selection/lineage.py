"""Find the commits that a reader joins, and refuse those whose inputs have changed since."""

from collections.abc import Sequence

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import ShardId
from microdit.pipeline.corpus.records import Commit


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
    for column in columns:
        if not commits[column]:
            raise RequestError(f"column {column}: corpus {corpus.url} has no shard of it; build it first")
    return {column: commits[column] for column in columns}


def _refuse_stale(commits: dict[str, dict[ShardId, Commit]]) -> None:
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
                    "run `microdit build --repair`, which makes it anew"
                )
