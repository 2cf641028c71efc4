"""Count what the report shows: the funnel of failures, what is missing, bytes, and rates."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import failures, read_failure
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.retry_units import RETRY, counts_taken_again
from microdit.pipeline.corpus.shard_files import SIDECAR
from microdit.pipeline.report.sample_view import SampleView
from microdit.pipeline.selection.selections import Selection, list_selections
from microdit.pipeline.tables.corpus_totals import failed_twice
from microdit.pipeline.tables.sample_table import TableField

# Failures of `images` by the step at which an input was lost; what is not named here was lost on the way to us.
UNDECODABLE = {"not_an_image", "truncated", "damaged", "bomb", "animated"}
UNWANTED = {"too_small"}

IDLE = 2.0  # seconds without work that still count as working: attempts are dated to the second


# -- what came in and what was dropped -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Drop:
    """Samples that failed in a column for one reason, with the name of one of them and its detail."""

    reason: str
    count: int
    column: str
    example: str
    detail: str | None


@dataclass(frozen=True)
class FunnelStep:
    """Samples left after a step, and those lost at it."""

    label: str
    what: str
    count: int
    drops: list[Drop]


def funnel(
    view: SampleView, commits: Mapping[str, Sequence[Commit]], complete: Mapping[str, str], notes: list[str]
) -> list[FunnelStep]:
    """Follow the inputs from what the sources list to what is in every column.

    Args:
        commits: by column the newest ones.
        complete: by column, SQL that is true of the samples that have it.
        notes: get what could not be read.
    """
    lost = Counter[str]()
    for commit in commits[IMAGES]:
        lost.update(commit.reasons)
    # no input counts twice, if a retry unit has taken it again
    shards = {(c.source, c.shard) for c in commits[IMAGES]}
    twice = failed_twice(counts_taken_again(view.corpus), shards, IMAGES)
    lost = +(lost - twice)
    listed = sum(c.counts["in"] for c in commits[IMAGES]) - twice.total()
    steps = [FunnelStep("Listed", "inputs of the sources", listed, [])]
    examples = _examples(view)
    for label, what, reasons in (
        ("Fetched", "bytes arrived", set(lost) - UNDECODABLE - UNWANTED),
        ("Decoded", "every pixel was read", set(lost) & UNDECODABLE),
        ("Kept", "large enough, and stored", set(lost) & UNWANTED),
    ):
        drops = [Drop(reason, lost[reason], IMAGES, *examples.get(reason, ("", None))) for reason in reasons]
        drops.sort(key=lambda drop: (-drop.count, drop.reason))
        steps.append(FunnelStep(label, what, steps[-1].count - sum(drop.count for drop in drops), drops))
    condition = " AND ".join(["status = 'ok'", *complete.values()])
    whole = view.count(condition)
    drops = [drop for name in commits if name != IMAGES for drop in _column_drops(view.corpus, commits[name], notes)]
    drops.sort(key=lambda drop: (-drop.count, drop.column, drop.reason))
    return [*steps, FunnelStep("In every column", "captions, scores, latents, text", whole, drops)]


def _examples(view: SampleView) -> dict[str, tuple[str, str | None]]:
    """Find the id and detail of the first image that failed, by reason."""
    rows = view.rows(
        "SELECT reason, arg_min({'id': id, 'detail': detail}, id) AS first "
        "FROM samples WHERE status = 'failed' GROUP BY reason"
    )
    return {row["reason"]: (row["first"]["id"], row["first"]["detail"]) for row in rows}


def _column_drops(corpus: Corpus, commits: Sequence[Commit], notes: list[str]) -> list[Drop]:
    """Count what failed in one column itself; what it inherited (`upstream`) is counted where it began."""
    total: Counter[str] = Counter()
    first: dict[str, Commit] = {}
    for commit in commits:
        for reason, n in commit.reasons.items():
            if reason != "upstream":
                total[reason] += n
                first.setdefault(reason, commit)
    drops = []
    for reason, n in total.items():
        commit = first[reason]
        try:
            sidecar = corpus.sidecar(commit).select(["key", "reason", "detail"])
        except (OSError, ValueError, BaseError) as error:
            notes.append(f"{commit.sidecar.name} cannot be read: {first_line(error)}")
            sidecar = SIDECAR.empty_table()
        rows = sidecar.filter(pc.equal(sidecar["reason"], reason)).slice(0, 1).to_pylist()
        example, detail = (f"{commit.source}/{rows[0]['key']}", rows[0]["detail"]) if rows else ("", None)
        drops.append(Drop(reason, n, commit.column, example, detail))
    return drops


def newest_selections(corpus: Corpus) -> list[Selection]:
    """List the selections, of every name the one that was made last."""
    made = {item.name: item.modified for item in corpus.store.list("selections")}
    selections = sorted(list_selections(corpus), key=lambda selection: made[selection.path])
    return sorted({selection.name: selection for selection in selections}.values(), key=lambda one: one.name)


@dataclass(frozen=True)
class IncompleteSource:
    """A source of which units are missing: how many are committed, and how many its declaration says."""

    source: str
    done: int
    expected: int


def incomplete_sources(corpus: Corpus) -> list[IncompleteSource]:
    """List the sources of which units are known to be missing, by what their declarations say."""
    incomplete = []
    for name, declaration in corpus.sources().items():
        expected = declaration.made_by.get("units")
        done = sum(not RETRY.fullmatch(unit) for _, unit in corpus.committed(UNITS, name))
        if isinstance(expected, int) and done < expected:
            incomplete.append(IncompleteSource(name, done, expected))
    return incomplete


@dataclass(frozen=True)
class ColumnSetAside:
    """A column (or `units`) with shards that were given up: how many, and one of them with its message."""

    column: str
    count: int
    shard: str
    message: str


def set_aside(corpus: Corpus, columns: Iterable[str]) -> list[ColumnSetAside]:
    """List columns (and units) with shards that failed as a whole and are not committed since."""
    aside = []
    for column in (*columns, UNITS):
        done = corpus.committed(column)
        left = {shard: number for shard, number in failures(corpus, column).items() if shard not in done}
        if left:
            (source, shard), number = min(left.items())
            message = read_failure(corpus, column, source, shard, number).message
            aside.append(ColumnSetAside(column, len(left), shard, message))
    return aside


# -- bytes and time ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ColumnBytes:
    """Bytes of a column, sidecars included, its samples, and bytes a sample."""

    column: str
    bytes: int
    samples: int

    @property
    def each(self) -> float:
        return self.bytes / self.samples if self.samples else 0


def bytes_by_column(commits: Mapping[str, Sequence[Commit]]) -> list[ColumnBytes]:
    """Add up the bytes of every column's newest commits."""
    return [
        ColumnBytes(column, sum(commit.size for commit in of_column), sum(c.counts["out"] for c in of_column))
        for column, of_column in commits.items()
    ]


@dataclass(frozen=True)
class ColumnWork:
    """Time and rate at which one column was made."""

    column: str
    shards: int
    samples: int
    """Rows, failed ones too."""
    seconds: float
    """Of all workers together."""
    each: float
    """Samples a second of one worker."""
    together: float
    """Samples a second of all that worked at the time."""
    spans: list[tuple[float, float]]
    """Begin and end in seconds of the corpus' work."""
    cut: int = 0
    """Captions of which the model read the beginning alone."""


@dataclass(frozen=True)
class CorpusWork:
    """Time and rate at which a corpus was made, without the time in which nothing ran."""

    rows: list[ColumnWork]
    seconds: float
    rate: float
    """Images a second."""
    hosts: int
    dates: str
    """The day or days, in words."""


def rates(commits: Mapping[str, Sequence[Commit]]) -> CorpusWork:
    """Measure when and how fast each column was made. Time in which no column was worked on is cut out."""
    spans = {
        name: merged
        for name, of_column in commits.items()
        if (merged := _merge(span for c in of_column if (span := _span(c)) is not None))
    }
    busy = _merge(span for of_column in spans.values() for span in of_column)
    total = sum(end - begin for begin, end in busy)
    rows = []
    for name, of_column in commits.items():
        if name not in spans:
            continue
        samples, seconds = sum(c.counts["in"] for c in of_column), sum(c.timings.get("seconds", 0.0) for c in of_column)
        busy_spans = ((_busy_time(busy, begin), _busy_time(busy, end)) for begin, end in spans[name])
        rows.append(
            ColumnWork(
                column=name,
                shards=len(of_column),
                samples=samples,
                seconds=seconds,
                each=samples / seconds if seconds else 0.0,
                together=samples / sum(end - begin for begin, end in spans[name]),
                spans=_merge(busy_spans, total / 400),
                cut=int(sum(c.timings.get("cut", 0) for c in of_column)),
            )
        )
    if not busy:
        return CorpusWork([], 0.0, 0.0, 0, "an unknown day")
    days = [datetime.fromtimestamp(at, UTC).strftime("%-d %B %Y") for at in (busy[0][0], busy[-1][1])]
    return CorpusWork(
        rows=rows,
        seconds=total,
        rate=sum(c.counts["in"] for c in commits[IMAGES]) / total,
        hosts=len({c.host for of_column in commits.values() for c in of_column}),
        dates=days[0] if days[0] == days[1] else f"{days[0]} to {days[1]}",
    )


def _span(commit: Commit) -> tuple[float, float] | None:
    """Begin and end of an attempt in Unix time; None if its name is no time."""
    try:
        begin = datetime.strptime(commit.attempt[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
    return begin, begin + max(commit.timings.get("seconds", 0.0), 0.001)


def _merge(spans: Iterable[tuple[float, float]], idle: float = IDLE) -> list[tuple[float, float]]:
    """Sort spans, and join those with at most `idle` seconds between them."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1] + idle:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _busy_time(busy: Sequence[tuple[float, float]], at: float) -> float:
    """Add up the busy time before a moment."""
    return sum(min(end, at) - begin for begin, end in busy if begin < at)


# -- the sample table ----------------------------------------------------------------------------------------------
def complete_samples(fields: Sequence[TableField], columns: Iterable[str]) -> dict[str, str]:
    """Map each column to SQL that is true of the samples that have it."""
    conditions = {}
    for column in columns:
        mine = [field for field in fields if field.column == column]
        flag = next((field.name for field in mine if field.scalar is None), None)
        if flag is not None:
            conditions[column] = f'"{flag}"'
        elif mine:  # of a table: every scalar is null where the sample failed; numbers are read sooner than captions
            small = next((field for field in mine if field.type != pa.string()), mine[0])
            conditions[column] = f'"{small.name}" IS NOT NULL'
    return conditions
