"""The open view over the samples of a corpus, and its pictures: what the parts of the page ask."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.report.stored import Reader, SampleRef, Thumbnail, thumbnail
from microdit.pipeline.selection.view import OpenView, connected, run
from microdit.pipeline.tables.database import SqlLimits
from microdit.pipeline.tables.sample_table import SampleTable, sample_table, view_columns

OK = "status = 'ok'"
PICTURE = "{'id': id, 'source': source, 'shard': shard, 'row': \"row\"}"


@dataclass(frozen=True)
class SampleView:
    """A corpus, the open view over its samples, and its pictures."""

    corpus: Corpus
    connection: OpenView
    reader: Reader
    limits: SqlLimits
    table: SampleTable
    """What it shows."""

    def rows(self, sql: str) -> list[dict[str, Any]]:
        return run(self.connection, sql, self.limits).to_pylist()

    def count(self, condition: str, table: str = "samples") -> int:
        (row,) = self.rows(f"SELECT count(*) AS n FROM {table} WHERE {condition}")
        return int(row["n"])

    def thumbnails(self, pictures: Iterable[Mapping[str, Any]]) -> list[Thumbnail]:
        """Read small pictures of samples selected as `PICTURE`, without those that cannot be read."""
        refs = (SampleRef(**picture) for picture in pictures)
        return [picture for ref in refs if (picture := thumbnail(self.reader, ref)) is not None]


@contextmanager
def open_samples(corpus: Corpus, commits: Mapping[str, Sequence[Commit]], notes: list[str]) -> Iterator[SampleView]:
    """Open the view over the samples.

    Args:
        commits: by column the newest ones.
        notes: get what cannot be read, and is left out.
    """
    # numbers, names and details at once; what else is asked for is made when it is
    reads = [column.name for column in view_columns(corpus.columns()) if not any(group.text for group in column.groups)]
    table, limits = sample_table(corpus, notes, [*reads, "id", "detail"]), SqlLimits()
    with connected(corpus, table, limits) as connection:
        yield SampleView(corpus, connection, Reader(corpus, commits, notes), limits, table)
