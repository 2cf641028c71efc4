"""Read prompts from the captions of another corpus."""

import hashlib

import duckdb
import pyarrow as pa

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.prompts import PromptsConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.queries import parse
from microdit.pipeline.selection.view import connected, run
from microdit.pipeline.sources.synthesis.prompt_tally import RawPrompt, RawPrompts
from microdit.pipeline.tables.database import SqlLimits
from microdit.pipeline.tables.sample_table import SampleTable, sample_table, view_columns

BATCH = 65_536


class CorpusPrompts:
    """The captions of a corpus, in the order of its samples.

    Raises:
        RequestError: there is no such corpus or column, or the SQL is wrong or gives other samples on another day.
    """

    def __init__(self, config: PromptsConfig, what: str):
        self._corpus = Corpus.open(str(config.corpus))
        column = config.captions or "images"
        declared = self._corpus.columns()
        if column not in declared:
            known = ", ".join(name for name in declared if name.startswith("captions/")) or "none"
            raise RequestError(f"{what}.captions = {column!r}: corpus {self._corpus.url} has no such column ({known})")
        self._table: SampleTable = sample_table(self._corpus)
        name = next(c.name for c in view_columns(declared) if c.column == column and c.field == "caption")
        chosen = f"(\n{config.where}\n) AND " if config.where else ""
        self._sql = f"SELECT id, {name} AS caption FROM samples WHERE {chosen}{name} <> '' ORDER BY source, shard, row"
        where, self._what = f"{what}.where = {config.where!r}", what
        try:
            unsteady = parse(self._sql).unsteady()
            with connected(self._corpus, self._table, SqlLimits()) as view:
                run(view, f"EXPLAIN {self._sql}")
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        if unsteady:
            raise RequestError(f"{where}: {unsteady} gives other samples each time; choose by what the corpus says")

    @property
    def version(self) -> str:
        """A hash of the samples of the corpus as they are now."""
        parts = {column: [part.sha256 for part in parts] for column, parts in self._table.parts.items()}
        return hashlib.sha256(repr([self._corpus.url, sorted(parts.items())]).encode()).hexdigest()

    def read(self) -> RawPrompts:
        """Read the captions in order, with the samples' ids."""
        row = 0
        with connected(self._corpus, self._table, SqlLimits()) as view:
            try:
                view.show(self._sql)
                reader: pa.RecordBatchReader = view.sql(self._sql).to_arrow_reader(BATCH)
                for batch in reader:
                    for id, caption in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                        yield RawPrompt(row, " ".join(caption.split()), {"sample": id}, f"sample {id}")
                        row += 1
            except (duckdb.Error, OSError) as error:
                raise RequestError(f"{self._what}: corpus {self._corpus.url}: SQL: {error}") from None
