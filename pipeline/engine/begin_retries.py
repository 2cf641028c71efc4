"""Begin retry units of inputs that failed: note which they are, so that ingest reads them.

The contract: docs/reference/corpus.md, section 2.

No ray here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.corpus.retry_units import (
    RETRY,
    RetryUnit,
    base_of,
    list_retry_units,
    read_retries,
    retry_name,
    retry_names,
    taken_again,
)

Failed = Callable[[str, str], bool]
"""True for the reason and the detail of a row that is to be taken again."""


@dataclass(frozen=True)
class Begun:
    """Inputs of a source that its new retry units take again, and units that wait for an earlier one."""

    source: str
    units: int
    inputs: int
    waiting: int


def begin_retries(
    corpus: Corpus, lines: pa.Table, source: str, candidate: Callable[[str], bool], failed: Failed
) -> Begun:
    """Write a record for each new retry unit of a source: of every complete unit with rows that are to be taken again.

    A unit of which an earlier retry unit is not complete waits for that.

    Args:
        lines: the newest commits of all shards, as lines of the commit table.
        candidate: True for reasons of which `failed` may hold.
    """
    shards = _shards_with(lines, source, candidate)
    complete = {unit for _, unit in corpus.committed(UNITS, source)}
    retries = list_retry_units(corpus).get(source, {})
    for match in filter(None, map(RETRY.fullmatch, complete)):  # another program's may have no record
        retries[match[1]] = max(retries.get(match[1], 0), int(match[2]))

    def begin(item: tuple[str, Mapping[str, int]]) -> int | None:
        unit, of = item
        last = retries.get(unit, 0)
        if not complete.issuperset([unit, *retry_names({unit: last})]):
            return None
        records = read_retries(corpus, source, unit, last)
        inputs: dict[str, list[int]] = defaultdict(list)
        for ordinal, reason in _rows(corpus, source, unit, of, records, failed):
            inputs[reason].append(ordinal)
        if not inputs:
            return 0
        record = RetryUnit(source=source, unit=f"{unit}-r{last + 1}", inputs={r: sorted(o) for r, o in inputs.items()})
        try:
            corpus.store.create(retry_name(source, unit, last + 1), record.to_bytes())
        except FileExistsError:  # another build has begun it
            record = corpus.read_record(retry_name(source, unit, last + 1), RetryUnit)
        return len(record.ordinals())

    begun = list(threaded(begin, sorted(shards.items())))
    taken = [inputs for inputs in begun if inputs]
    return Begun(source, len(taken), sum(taken), begun.count(None))


def _shards_with(lines: pa.Table, source: str, candidate: Callable[[str], bool]) -> dict[str, dict[str, int]]:
    """Find the shards of images with such reasons: their generations, by unit."""
    mine = lines.filter(pc.and_(pc.equal(lines["column"], IMAGES), pc.equal(lines["source"], source)))
    shards: dict[str, dict[str, int]] = defaultdict(dict)
    for line in mine.select(["shard", "generation", "reasons"]).to_pylist():
        if any(candidate(reason["reason"]) for reason in line["reasons"]):
            shards[base_of(line["shard"].rpartition("-")[0])][line["shard"]] = line["generation"]
    return shards


def _rows(
    corpus: Corpus, source: str, unit: str, shards: Mapping[str, int], records: Sequence[RetryUnit], failed: Failed
) -> Iterator[tuple[int, str]]:
    """List the rows to take again, and that no retry unit has: their ordinals in the unit, and reasons."""
    size = corpus.shard_samples
    of_record = {record.unit: record.ordinals() for record in records}
    taken = {(row.shard, row.row) for row in taken_again(records, unit, size)}
    for shard, generation in sorted(shards.items()):
        name, _, number = shard.rpartition("-")
        if name != unit and name not in of_record:
            continue
        sidecar = corpus.sidecar(corpus.commit(IMAGES, source, shard, generation))
        lines = sidecar.select(["row", "status", "reason", "detail"])
        for line in lines.filter(pc.equal(lines["status"], "failed")).to_pylist():
            if (shard, line["row"]) not in taken and failed(line["reason"], line["detail"] or ""):
                ordinal = int(number) * size + line["row"]
                yield of_record[name][ordinal][0] if name in of_record else ordinal, line["reason"]
