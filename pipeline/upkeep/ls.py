"""List the committed objects of a column."""

from collections.abc import Iterator

from microdit.pipeline.corpus.corpus import Corpus


def ls(corpus: Corpus, column: str) -> Iterator[str]:
    """List paths or URLs of the committed objects of a column, by source and shard, for any library that reads them.

    Shards without a sample are left out: `datasets` takes the features from the first one.

    Raises:
        RequestError: there is no such column.
    """
    corpus.column(column)
    for commit in corpus.commits(column):
        if commit.counts["out"]:
            yield f"{corpus.url}/{commit.object.name}"
