"""Totals of a corpus in which no input counts twice: rows that retry units take again count as they are there."""

from collections import Counter
from collections.abc import Collection, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS, ShardId
from microdit.pipeline.corpus.reasons import UPSTREAM
from microdit.pipeline.corpus.retry_units import counts_taken_again, list_retry_units, retry_names
from microdit.pipeline.tables.commit_table import Totals, commit_table, totals

Counted = dict[tuple[str, str, str], Counter[str]]


def corpus_totals(corpus: Corpus, table: pa.Table | None = None) -> dict[tuple[str, str], Totals]:
    """Add up the newest commits, by column and source; a retry unit is no unit of its own, nor its inputs further ones.

    Args:
        table: the commit table, if it was read already.
    """
    table = commit_table(corpus) if table is None else table
    added = totals(table)
    if not (retries := list_retry_units(corpus)):
        return added
    again = counts_taken_again(corpus)
    for (column, source), total in added.items():
        if source not in retries:
            continue
        mine = table.filter(pc.and_(pc.equal(table["column"], column), pc.equal(table["source"], source)))
        if column == UNITS:
            _leave_out_units(total, mine, retry_names(retries[source]))
        else:
            twice = failed_twice(again, {(source, shard) for shard in mine["shard"].to_pylist()}, column)
            total.inputs -= twice.total()
            total.failed -= twice.total()
            total.reasons = +(total.reasons - twice)
    return added


def failed_twice(again: Counted, committed: Collection[ShardId], column: str) -> Counter[str]:
    """Count by reason the rows of a column that a committed shard of a retry unit has, too."""
    counts: Counter[str] = Counter()
    for (source, shard, by), reasons in again.items():
        if (source, shard) in committed and (source, by) in committed:
            counts += reasons if column == IMAGES else Counter({UPSTREAM: reasons.total()})
    return counts


def _leave_out_units(total: Totals, commits: pa.Table, retries: Collection[str]) -> None:
    inputs: Mapping[str, int] = dict(zip(commits["shard"].to_pylist(), commits["in"].to_pylist(), strict=True))
    for unit in retries:
        if unit in inputs:
            total.done -= 1
            total.inputs -= inputs[unit]
