"""The summary of a build: counts that add up, read from the commits."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import failures, read_failure
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.corpus.reasons import MADE_AGAIN, UPSTREAM, in_words, surely_passing
from microdit.pipeline.engine.plan import Plan
from microdit.pipeline.tables.commit_table import commit_table
from microdit.pipeline.tables.corpus_totals import corpus_totals

MAX_LISTED = 100  # shards set aside that a summary lists


@dataclass
class ColumnSummary:
    """One column: `shards = committed + set_aside + waiting` and, over the committed ones, `inputs = out + failed`."""

    shards: int
    committed: int
    built: int
    """Shards made by this run."""
    set_aside: int
    waiting: int
    """Shards whose inputs are not committed."""
    inputs: int
    out: int
    failed: int
    reasons: dict[str, int]
    seconds: float
    """Seconds of the stage, summed over the shards that this run made."""
    rate: float | None
    """Images a second of this run, from its first shard to its last."""
    cut: int = 0
    """Captions of this run of which the model read the beginning alone."""
    retry: dict[str, int] = field(default_factory=dict)
    """Of the reasons those that another try may mend."""

    @property
    def own_failures(self) -> float:
        """Return the share of inputs that failed here, and not upstream."""
        return (self.failed - self.reasons.get(UPSTREAM, 0)) / self.inputs if self.inputs else 0.0


@dataclass
class UnitCounts:
    """Units of the sources: `total = read + set_aside +` those that are left."""

    total: int
    read: int
    set_aside: int


@dataclass
class SetAside:
    """A shard of a column (or a unit, with the column `units`) that was given up, and its last error."""

    column: str
    source: str
    shard: str
    message: str


@dataclass
class BuildSummary:
    """The state of a corpus as far as a build's config goes, and what this run did."""

    corpus: str
    seconds: float
    worked: bool
    """False if there was nothing to do."""
    units: UnitCounts
    columns: dict[str, ColumnSummary]
    set_aside: list[SetAside] = field(default_factory=list)
    """The first `MAX_LISTED`."""
    damage: list[str] = field(default_factory=list)
    """Commits that cannot be understood; the columns do not count them."""
    max_failures: float = 1.0
    gpus: int | None = None
    """GPUs that models worked on; None if this run had no work for a model that wants one."""
    gpus_left_out: list[str] = field(default_factory=list)
    """Nodes whose GPUs torch cannot use, and why."""
    left: list[str] = field(default_factory=list)
    """Sources that failed wholesale: their other units are left unread."""

    @property
    def too_many_failures(self) -> list[str]:
        """Return the columns of whose inputs a larger share failed than `max_failures`."""
        return [name for name, column in self.columns.items() if column.own_failures > self.max_failures]

    @property
    def exit_status(self) -> int:
        """Return 0, or 1 if something is set aside or damaged, or more samples failed than the config allows."""
        aside = bool(self.units.set_aside) or any(column.set_aside for column in self.columns.values())
        return 1 if aside or self.damage or self.left or self.too_many_failures else 0

    def text(self) -> str:
        """Return the summary for people: a table that adds up, then lines about failures."""
        lines = [] if self.worked or self.units.set_aside else ["nothing to do: all that can be made is there"]
        lines.append(f"corpus {self.corpus}: {self.units.read:,} of {self.units.total:,} units read")
        width = max(map(len, self.columns), default=0)
        lines.append(f"{'column':{width}}  {'shards':>13}  {'in':>11} = {'out':>11} + {'failed':>9}  {'images/s':>8}")
        for name, column in self.columns.items():
            shards = f"{column.committed:,}/{column.shards:,}"
            rate = "" if column.rate is None else f"{column.rate:,.0f}"
            counts = f"{column.inputs:>11,} = {column.out:>11,} + {column.failed:>9,}"
            lines.append(f"{name:{width}}  {shards:>13}  {counts}  {rate:>8}")
        if self.gpus is not None:
            lines.append(f"GPUs at work: {self.gpus}" if self.gpus else "GPUs at work: none; the models ran on CPUs")
        lines += [f"left out: {reason}" for reason in self.gpus_left_out]
        for name, column in self.columns.items():
            own = {reason: count for reason, count in column.reasons.items() if reason != UPSTREAM}
            if own:  # failures upstream are listed there
                lines.append(f"{name}: failed for " + ", ".join(f"{reason} {count:,}" for reason, count in own.items()))
            if column.cut:
                lines.append(
                    f"{name}: {column.cut:,} captions of this run have more tokens than the model reads; they are "
                    "compared by their beginning"
                )
            if column.retry:
                count = sum(column.retry.values())
                lines.append(f"{name}: {count:,} may be good another time: {_command(name, column)}")
            if column.waiting:
                lines.append(
                    f"{name}: {column.waiting:,} shards are not made; the columns that they come from are not there"
                )
        for entry in self.set_aside:
            message = entry.message.partition("\n")[0]
            lines.append(f"set aside: {entry.column}/{entry.source}/{entry.shard}: {message}")
        if self.set_aside:
            lines.append("what was set aside is taken again with --retry-failed")
        lines += [
            f"source {source}: nearly all of its inputs failed, and its other units are left unread; run the same "
            "command again when its servers answer"
            for source in self.left
        ]
        lines += self.damage
        for name in self.too_many_failures:
            share = self.columns[name].own_failures
            lines.append(
                f"{name}: {share:.1%} of its inputs failed, the config allows max_failures = {self.max_failures}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return asdict(self) | {"exit_status": self.exit_status, "too_many_failures": self.too_many_failures}


@dataclass
class Work:
    """Work of this run on one column: shards, images, the stage's seconds, when the first began and the last ended.

    `cut` counts the captions that were read by their beginning.
    """

    shards: int = 0
    samples: int = 0
    seconds: float = 0.0
    first: float = 0.0
    last: float = 0.0
    cut: int = 0


def summarize(
    corpus: Corpus,
    plan: Plan,
    sources: Sequence[str],
    fetched: Collection[str],
    work: Mapping[str, Work],
    seconds: float,
    max_failures: float,
    left: Sequence[str] = (),
) -> BuildSummary:
    """Add up the commits of the plan's columns.

    Args:
        fetched: the sources of which a failed input may come another time.
        left: the sources of which units are left unread.
    """
    damage: list[str] = []
    commits = corpus_totals(corpus, commit_table(corpus, damage))
    columns: dict[str, ColumnSummary] = {}
    urls = [commits[IMAGES, source].reasons for source in fetched if (IMAGES, source) in commits]
    for column in plan.columns:
        by_source = [commits[column, source] for source in sources if (column, source) in commits]
        committed = sum(total.done for total in by_source)
        reasons = sum((total.reasons for total in by_source), Counter[str]())
        done = work.get(column, Work())
        span = done.last - done.first
        aside = len(plan.aside[column])
        columns[column] = ColumnSummary(
            shards=plan.shards,
            committed=committed,
            built=done.shards,
            set_aside=aside,
            waiting=max(plan.shards - committed - aside, 0) if column != IMAGES else 0,
            inputs=sum(total.inputs for total in by_source),
            out=sum(total.out for total in by_source),
            failed=sum(total.failed for total in by_source),
            reasons=dict(reasons.most_common()),
            seconds=round(done.seconds, 3),
            rate=round(done.samples / span, 1) if span > 0 else None,
            cut=done.cut,
            retry=_retry(column, sum(urls, Counter[str]()) if column == IMAGES else reasons),
        )
    return BuildSummary(
        corpus=corpus.url,
        seconds=round(seconds, 3),
        worked=any(column_work.shards for column_work in work.values()),
        units=UnitCounts(plan.units_total, plan.units_done, len(plan.aside[UNITS])),
        columns=columns,
        set_aside=_set_aside(corpus, plan),
        damage=damage,
        max_failures=max_failures,
        left=list(left),
    )


def _retry(column: str, reasons: Counter[str]) -> dict[str, int]:
    """Choose the reasons that another try may mend; of images among those of sources that fetch each input."""
    mended = surely_passing if column == IMAGES else MADE_AGAIN.fullmatch
    return {reason: count for reason, count in reasons.most_common() if mended(reason)}


def _command(name: str, column: ColumnSummary) -> str:
    """Say how the rows of a column that another try may mend are made again."""
    if name == IMAGES:
        return f"--retry-failed takes again what failed for {in_words(column.retry)}"
    return f"{' '.join(f'--retry-rows {reason}' for reason in column.retry)} makes them again"


def _set_aside(corpus: Corpus, plan: Plan) -> list[SetAside]:
    entries: list[SetAside] = []
    for column, shards in plan.aside.items():
        numbers = failures(corpus, column) if shards else {}
        for source, shard in sorted(shards)[:MAX_LISTED]:
            record = read_failure(corpus, column, source, shard, numbers[source, shard])
            entries.append(SetAside(column, source, shard, record.message))
    return entries[:MAX_LISTED]
