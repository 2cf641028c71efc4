"""Find the failed rows that a build is asked to make again: as retry units of sources, and in shards of columns."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, ShardId
from microdit.pipeline.corpus.reasons import PASSING, UPSTREAM, in_words, may_pass, named_by
from microdit.pipeline.engine.begin_retries import begin_retries
from microdit.pipeline.sources.source import Source
from microdit.pipeline.tables.commit_table import commit_table, newest_lines
from microdit.pipeline.tables.corpus_totals import corpus_totals


def fetches_rows(source: Source) -> bool:
    """Return True if an input of a source that failed for a transient reason may be fetched later."""
    return getattr(source, "fetches_rows", False)


def make_again(
    corpus: Corpus,
    sources: Sequence[Source],
    columns: Collection[str],
    passing: bool,
    reasons: Sequence[str],
    redo: Mapping[str, Collection[ShardId]],
    note: Callable[[str], None],
) -> dict[str, set[ShardId]]:
    """Begin retry units for failed images; return the shards of other columns with rows to make again, by column.

    Args:
        columns: those that the build makes.
        passing: take again URLs that failed for a transient reason.
        reasons: take again all rows that failed for these, in all columns.
        redo: shards that are made again, by column: their rows are left alone until then, in images if those are.

    Raises:
        RequestError: no row has failed for one of the reasons.
    """
    table = commit_table(corpus, [])
    if reasons:
        _check_reasons(corpus, table, [source.name for source in sources], columns, reasons)
    lines = newest_lines(table)
    if IMAGES in columns:
        others = _without(lines, redo.get(IMAGES, ()))
        for source in sources:
            _begin(corpus, others, source, passing and fetches_rows(source), reasons, note)
    others = _without(lines, [shard for shards in redo.values() for shard in shards])
    return _shards_of_columns(others, [source.name for source in sources], columns, reasons, note)


def _without(lines: pa.Table, shards: Collection[ShardId]) -> pa.Table:
    """Leave out the lines of some shards."""
    names = pa.array(sorted({shard for _, shard in shards}), pa.string())
    return lines.filter(pc.invert(pc.is_in(lines["shard"], value_set=names)))


def _begin(
    corpus: Corpus,
    lines: pa.Table,
    source: Source,
    passing: bool,
    reasons: Sequence[str],
    note: Callable[[str], None],
) -> None:
    def candidate(reason: str) -> bool:
        return (passing and any(rule.reasons.fullmatch(reason) for rule in PASSING)) or named_by(reason, reasons)

    def failed(reason: str, detail: str) -> bool:
        return (passing and may_pass(reason, detail)) or named_by(reason, reasons)

    begun = begin_retries(corpus, lines, source.name, candidate, failed)
    if begun.units:
        note(f"source {source.name}: {begun.inputs:,} failed inputs are taken again (retry units: {begun.units:,})")
    if begun.waiting:
        note(
            f"source {source.name}: {begun.waiting:,} units are not complete yet, and are read first; then the same "
            "command takes again what has failed of them"
        )


def _check_reasons(
    corpus: Corpus, table: pa.Table, sources: Collection[str], columns: Collection[str], reasons: Sequence[str]
) -> None:
    """Check that rows have failed for each of the reasons.

    Raises:
        RequestError: none has; the message tells the reasons that there are.
    """
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for (column, source), total in corpus_totals(corpus, table).items():
        if column in columns and source in sources:
            counted[column] += total.reasons
    for own in counted.values():
        del own[UPSTREAM]
    present = {reason for own in counted.values() for reason in own}
    for name in reasons:
        if any(named_by(reason, [name]) for reason in present):
            continue
        known = "; ".join(f"{column}: {in_words(counted[column])}" for column in columns if counted.get(column))
        raise RequestError(
            f"--retry-rows {name}: no row of {', '.join(columns)} has failed for that; "
            f"expected one of their reasons ({known or 'none has failed'})"
        )


def _shards_of_columns(
    lines: pa.Table,
    sources: Collection[str],
    columns: Collection[str],
    reasons: Sequence[str],
    note: Callable[[str], None],
) -> dict[str, set[ShardId]]:
    """Find the shards of columns with rows that failed for these reasons; stale ones are left to `--repair`."""
    shards: dict[str, set[ShardId]] = {}
    for column in columns:
        if column == IMAGES or not reasons:
            continue
        found = list(_lines_with(lines, sources, column, partial(named_by, names=reasons)))
        stale = _stale(lines, found)
        shards[column] = {(line["source"], line["shard"]) for line in found} - stale
        if stale:
            note(f"{column}: {len(stale):,} shards with such rows are stale; `--repair` makes them again as a whole")
    return shards


def _lines_with(
    lines: pa.Table, sources: Collection[str], column: str, wanted: Callable[[str], bool]
) -> Iterator[Mapping[str, Any]]:
    for line in lines.filter(pc.equal(lines["column"], column)).to_pylist():
        if line["source"] in sources and any(wanted(reason["reason"]) for reason in line["reasons"]):
            yield line


def _stale(lines: pa.Table, found: Sequence[Mapping[str, Any]]) -> set[ShardId]:
    """Find those of which an input has been committed again since."""
    shards = pa.array([line["shard"] for line in found], pa.string())
    near = lines.filter(pc.is_in(lines["shard"], value_set=shards)).select(["column", "source", "shard", "sha256"])
    newest = {(line["column"], line["source"], line["shard"]): line["sha256"] for line in near.to_pylist()}
    return {
        (line["source"], line["shard"])
        for line in found
        for item in line["inputs"]
        if newest.get((item["column"], line["source"], line["shard"])) != item["sha256"]
    }
