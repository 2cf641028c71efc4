"""Retry units: inputs of a unit that failed, as a further unit `<unit>-r<n>` (docs/reference/corpus.md, section 2)."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count
from typing import Literal, NamedTuple

from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import ShardId, shard_name
from microdit.pipeline.corpus.records import VERSION, Record

NAME = re.compile(r"units/([^/]+)/([^/]+)-r([1-9][0-9]*)\.json")
RETRY = re.compile(r"(.+-[0-9]{6,})-r([1-9][0-9]*)")


class RetryUnit(Record):
    """The inputs of a retry unit, by the reason for which they had failed: their ordinals in the unit itself."""

    version: Literal[1] = VERSION
    source: str
    unit: str
    inputs: dict[str, list[int]]

    def ordinals(self) -> list[tuple[int, str]]:
        """List its inputs in order, each with its ordinal in the unit itself and the reason why it had failed."""
        return sorted((ordinal, reason) for reason, ordinals in self.inputs.items() for ordinal in ordinals)


class TakenAgain(NamedTuple):
    """A failed row that a retry unit takes again: its shard and row, its reason, and the retry unit's shard."""

    shard: str
    row: int
    reason: str
    by: str


def is_retry(name: str) -> bool:
    """Return True for the name of a retry unit, or of a shard of one."""
    return bool(RETRY.fullmatch(name) or RETRY.fullmatch(name.rpartition("-")[0]))


def retry_name(source: str, unit: str, number: int) -> str:
    """Name the record of a retry unit."""
    return f"units/{source}/{unit}-r{number}.json"


def base_of(unit: str) -> str:
    """Return the unit that a retry unit retries; any other unit itself."""
    match = RETRY.fullmatch(unit)
    return match[1] if match else unit


def list_retry_units(corpus: Corpus) -> dict[str, dict[str, int]]:
    """List the retry units of each source: the number of the last one, by the unit's name."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for name in corpus.store.names("units"):
        if match := NAME.fullmatch(name):
            units = found[match[1]]
            units[match[2]] = max(units.get(match[2], 0), int(match[3]))
    return found


def retry_names(retries: Mapping[str, int]) -> list[str]:
    """Name the retry units of a source, by the number of each unit's last one."""
    return [f"{unit}-r{number}" for unit, last in sorted(retries.items()) for number in range(1, last + 1)]


def read_retries(corpus: Corpus, source: str, unit: str, last: int | None = None) -> list[RetryUnit]:
    """Read the retry units of a unit, the first one first; `last` is the number of the last one, if that is known.

    Raises:
        DamagedError: one of them cannot be understood.
    """
    records: list[RetryUnit] = []
    for number in count(1) if last is None else range(1, last + 1):
        try:
            records.append(corpus.read_record(retry_name(source, unit, number), RetryUnit))
        except FileNotFoundError:
            if last is None:
                break
    return records


def taken_again(records: Sequence[RetryUnit], unit: str, shard_samples: int) -> Iterator[TakenAgain]:
    """List the rows that the retry units of a unit take again."""
    holder: dict[int, tuple[str, int]] = {}
    for record in records:
        for index, (ordinal, reason) in enumerate(record.ordinals()):
            number, row = divmod(ordinal, shard_samples)
            shard, row = holder.get(ordinal, (shard_name(unit, number), row))
            by, new_row = divmod(index, shard_samples)
            holder[ordinal] = (shard_name(record.unit, by), new_row)
            yield TakenAgain(shard, row, reason, holder[ordinal][0])


def all_taken_again(
    corpus: Corpus, retries: Mapping[str, Mapping[str, int]] | None = None
) -> Iterator[tuple[str, TakenAgain]]:
    """List the rows of all sources that retry units take again, with their source.

    Args:
        retries: what `list_retry_units` gives, if it was asked already.
    """
    retries = list_retry_units(corpus) if retries is None else retries
    units = [(source, unit, last) for source, of in sorted(retries.items()) for unit, last in sorted(of.items())]

    def read(one: tuple[str, str, int]) -> tuple[str, str, list[RetryUnit]]:
        source, unit, last = one
        return source, unit, read_retries(corpus, source, unit, last)

    for source, unit, records in threaded(read, units):
        for row in taken_again(records, unit, corpus.shard_samples):
            yield source, row


def rows_taken_again(corpus: Corpus, committed: Collection[ShardId]) -> dict[ShardId, list[int]]:
    """List by shard the failed rows that are rows of a committed shard of a retry unit, too."""
    rows: dict[ShardId, list[int]] = defaultdict(list)
    for source, row in all_taken_again(corpus):
        if (source, row.by) in committed:
            rows[source, row.shard].append(row.row)
    return rows


def counts_taken_again(corpus: Corpus) -> dict[tuple[str, str, str], Counter[str]]:
    """Count the rows that retry units take again by reason, for each source, shard, and shard of a retry unit."""
    counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for source, row in all_taken_again(corpus):
        counts[source, row.shard, row.by][row.reason] += 1
    return counts
