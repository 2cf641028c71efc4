"""`microdit status`: how far a corpus is."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import Failure, failures, read_failure
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.tables.commit_table import Totals, commit_table
from microdit.pipeline.tables.corpus_totals import corpus_totals
from microdit.pipeline.upkeep.devices import Devices, devices


@dataclass(frozen=True)
class SourceStatus:
    """One source: how many units its declaration says (None if it does not), and those read, with their inputs."""

    units: int | None
    units_done: int
    inputs: int

    @property
    def complete(self) -> bool:
        """Every unit is read, as far as it is known how many there are."""
        return self.units == self.units_done


@dataclass(frozen=True)
class ColumnStatus:
    """One column of one source: shards, then samples (`inputs = out + failed`), bytes and time."""

    done: int
    left: int | None
    """Of the images None while units are missing: nobody knows yet how many shards they have."""
    set_aside: int
    stale: int
    inputs: int
    out: int
    failed: int
    bytes: int
    seconds: float
    """Of work."""
    rate: float | None
    """Samples a second of one worker."""
    reasons: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {"in" if name == "inputs" else name: value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class CorpusStatus:
    """Progress of a corpus."""

    corpus: str
    name: str
    shard_samples: int
    sources: dict[str, SourceStatus]
    columns: dict[str, dict[str, ColumnStatus]]
    """By column and source."""
    set_aside: list[Failure]
    """Shards and units that were given up and are not committed since."""
    devices: dict[str, Devices]
    """By column with a model, out of a part of its commits."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "name": self.name,
            "shard_samples": self.shard_samples,
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "columns": {
                column: {source: status.to_dict() for source, status in by_source.items()}
                for column, by_source in self.columns.items()
            },
            "devices": self.devices,
            "set_aside": [failure.model_dump(exclude={"traceback", "version"}) for failure in self.set_aside],
        }


def status(corpus: Corpus) -> CorpusStatus:
    """Count what is committed, left, failed and set aside of a corpus, by source and column."""
    declared = sorted(corpus.columns())
    table = commit_table(corpus)
    committed = corpus_totals(corpus, table)
    sources = {name: _source_status(corpus, name, committed) for name in sorted(corpus.sources())}
    set_aside = [failure for column in [*declared, UNITS] for failure in _set_aside(corpus, column, table)]
    return CorpusStatus(
        corpus=corpus.url,
        name=corpus.name,
        shard_samples=corpus.shard_samples,
        sources=sources,
        columns=_columns(declared, sources, committed, set_aside),
        set_aside=set_aside,
        devices=devices(corpus, table),
    )


def _source_status(corpus: Corpus, name: str, committed: Mapping[tuple[str, str], Totals]) -> SourceStatus:
    units, expected = committed.get((UNITS, name), Totals()), corpus.source(name).made_by.get("units")
    return SourceStatus(expected if isinstance(expected, int) else None, units.done, units.inputs)


def _columns(
    declared: Collection[str],
    sources: Mapping[str, SourceStatus],
    committed: Mapping[tuple[str, str], Totals],
    set_aside: Collection[Failure],
) -> dict[str, dict[str, ColumnStatus]]:
    """Count every declared column in every source that is declared, or has commits or failures."""
    given_up = Counter((failure.column, failure.source) for failure in set_aside)
    columns: dict[str, dict[str, ColumnStatus]] = {column: {} for column in declared}
    for column, source in dict.fromkeys([*((c, s) for c in declared for s in sources), *committed, *given_up]):
        if column not in columns:
            continue
        done = committed.get((column, source), Totals())
        left: int | None = committed.get((IMAGES, source), Totals()).done - done.done
        if column == IMAGES:
            left = 0 if source in sources and sources[source].complete else None
        columns[column][source] = ColumnStatus(
            done=done.done,
            left=left,
            set_aside=given_up[column, source],
            stale=done.stale,
            inputs=done.inputs,
            out=done.out,
            failed=done.failed,
            bytes=done.bytes,
            seconds=round(done.seconds, 3),
            rate=round(done.inputs / done.seconds, 3) if done.seconds else None,
            reasons=dict(sorted(done.reasons.items())),
        )
    return columns


def _set_aside(corpus: Corpus, column: str, table: pa.Table) -> Iterator[Failure]:
    """Read the failures of a column whose shards are not in the commit table, by source and shard."""
    if not (recorded := failures(corpus, column)):
        return
    commits = table.filter(pc.equal(table["column"], column))
    done = set(zip(commits["source"].to_pylist(), commits["shard"].to_pylist(), strict=True))
    for (source, shard), number in sorted(recorded.items()):
        if (source, shard) not in done:
            yield read_failure(corpus, column, source, shard, number)
