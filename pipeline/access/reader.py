"""A corpus as its reader sees it: `microdit.open_corpus` opens one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from microdit.pipeline.access.joined import JoinedRow, plan_join, read_joined
from microdit.pipeline.corpus.corpus import Corpus

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from microdit.pipeline.access.torch_dataset import JoinedTorchDataset
    from microdit.pipeline.access.webdataset import JoinedWebDataset


@dataclass(frozen=True)
class ColumnCounts:
    """Committed rows of a column: `rows = ok + failed` over its `shards`; `bytes` of them all.

    stale: shards that were made from something that has been made again since; they must be repaired to be read.
    """

    shards: int = 0
    rows: int = 0
    ok: int = 0
    failed: int = 0
    bytes: int = 0
    stale: int = 0


class CorpusReader:
    """A corpus, opened for reading; nothing here changes its samples. Made by `microdit.open_corpus`.

    Columns are joined by row. Wherever columns are asked for, a row is there if it is ok in all of them. A selection is
    `name@hash`, or `name` if there is only one of that name; its weights come along and are not applied. Rows are in
    the order of source, shard and row.

    >>> import microdit
    >>> corpus = microdit.open_corpus("my/corpus")
    >>> corpus.columns
    ['captions/source', 'images', 'latents/demo-64', 'scores/basic']
    >>> corpus.counts()["captions/source"]
    ColumnCounts(shards=2, rows=8, ok=8, failed=0, bytes=..., stale=0)
    """

    def __init__(self, corpus: Corpus):
        self._corpus = corpus

    @property
    def url(self) -> str:
        """The root: a folder, or `s3://bucket/prefix`."""
        return self._corpus.url

    @property
    def name(self) -> str:
        """The name that its config gave it."""
        return self._corpus.name

    @property
    def columns(self) -> list[str]:
        """The declared columns, sorted."""
        return sorted(self._corpus.columns())

    def __repr__(self) -> str:
        return f"<corpus {self.name!r} at {self.url}: {', '.join(self.columns)}>"

    def counts(self) -> dict[str, ColumnCounts]:
        """Count what is committed, by column, over all sources.

        Raises:
            DamagedError: a commit cannot be understood.
        """
        from microdit.pipeline.tables.commit_table import Totals
        from microdit.pipeline.tables.corpus_totals import corpus_totals

        found: dict[str, list[Totals]] = {column: [] for column in self.columns}
        for (column, _), total in corpus_totals(self._corpus).items():
            if column in found:
                found[column].append(total)
        return {
            column: ColumnCounts(
                *(
                    sum(getattr(total, name) for total in of)
                    for name in ("done", "inputs", "out", "failed", "bytes", "stale")
                )
            )
            for column, of in found.items()
        }

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Run one SELECT over the view `samples` (docs/reference/corpus.md, section 6), and give its rows.

        >>> import microdit
        >>> corpus = microdit.open_corpus("my/corpus")
        >>> corpus.query("SELECT status, count(*) AS n FROM samples GROUP BY status")
        [{'status': 'ok', 'n': 8}]

        Raises:
            RequestError: the SQL is wrong; the message is DuckDB's.
        """
        rows: list[dict[str, Any]] = self.to_arrow(sql).to_pylist()
        return rows

    def to_arrow(self, sql: str) -> pa.Table:
        """Run one SELECT over the view `samples`, and give its result as an Arrow table.

        >>> import microdit
        >>> corpus = microdit.open_corpus("my/corpus")
        >>> corpus.to_arrow("SELECT key, width FROM samples ORDER BY key").schema.names
        ['key', 'width']

        Raises:
            RequestError: the SQL is wrong; the message is DuckDB's.
        """
        from microdit.pipeline.selection.view import query

        return query(self._corpus, sql)

    def rows(self, columns: str | Sequence[str], selection: str | None = None) -> Iterator[JoinedRow]:
        """Read the joined rows of columns, shard by shard.

        >>> import microdit
        >>> corpus = microdit.open_corpus("my/corpus")
        >>> row = next(corpus.rows(["captions/source", "latents/demo-64"]))
        >>> row.id, row["captions/source"], row["latents/demo-64"].shape
        ('pictures/000000-000000', 'picture 0', (4, 8, 8))

        Raises:
            RequestError: a column or selection is unknown, a column has no shard or is stale, or an object is missing
                or damaged.
        """
        shards = plan_join(self._corpus, columns, selection)
        return (row for shard in shards for row in read_joined(self._corpus, shard))

    def to_webdataset(self, columns: str | Sequence[str], selection: str | None = None) -> JoinedWebDataset:
        """Give the joined samples to the stock `webdataset` library, which splits the shards among nodes and workers.

        A sample's files are called `<column>.<extension>`: pictures and arrays as in their tars, captions `.txt`,
        scores `.json`, quantised text `.npy`.

        >>> import microdit
        >>> corpus = microdit.open_corpus("my/corpus")
        >>> samples = corpus.to_webdataset(["images", "captions/source"]).decode("pil").shuffle(100)
        >>> sorted(next(iter(samples)))
        ['__key__', '__url__', 'captions/source.txt', 'images.jpg', 'images.json']

        Raises:
            RequestError: as `rows`.
        """
        from microdit.pipeline.access.webdataset import JoinedWebDataset

        return JoinedWebDataset(self._corpus, plan_join(self._corpus, columns, selection))

    def to_torch_dataset(self, columns: str | Sequence[str], selection: str | None = None) -> JoinedTorchDataset:
        """Give the joined samples to torch, as a dataset with a length that is read in any order.

        Each sample reads its own bytes, which is quick in a folder and one request for each column on a bucket. Texts
        differ in length: to batch them give `DataLoader` a `collate_fn`.

        >>> import microdit
        >>> from torch.utils.data import DataLoader
        >>> corpus = microdit.open_corpus("my/corpus")
        >>> dataset = corpus.to_torch_dataset(["captions/source", "latents/demo-64"])
        >>> batch = next(iter(DataLoader(dataset, batch_size=4, shuffle=True)))
        >>> len(dataset), batch["latents/demo-64"].shape
        (8, torch.Size([4, 4, 8, 8]))

        Raises:
            RequestError: as `rows`.
        """
        from microdit.pipeline.access.torch_dataset import JoinedTorchDataset

        return JoinedTorchDataset(self._corpus, plan_join(self._corpus, columns, selection))

    def to_ray_dataset(self, columns: str | Sequence[str], selection: str | None = None) -> ray.data.Dataset:
        """Give the joined samples to Ray Data, lazily: a task reads one shard after the other.

        On a cluster every node must see the corpus: a shared folder or a bucket.

        >>> import microdit
        >>> corpus = microdit.open_corpus("my/corpus")
        >>> corpus.to_ray_dataset("captions/source").count()
        8

        Raises:
            RequestError: as `rows`.
        """
        from microdit.pipeline.access.ray_dataset import ray_dataset

        return ray_dataset(self._corpus, plan_join(self._corpus, columns, selection))
