"""What a build came to: counts that add up, read from the commits."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import failures, read_failure
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.engine.plan import Plan
from microdit.pipeline.tables.commit_table import commit_table, totals

UPSTREAM = "upstream"


@dataclass
class ColumnSummary:
    """One column: `shards = committed + set_aside + waiting` and, over the committed ones, `inputs = out + failed`."""

    shards: int
    committed: int
    built: int
    """Shards made by this run."""
    set_aside: int
    waiting: int
    """Shards whose inputs are not there."""
    inputs: int
    out: int
    failed: int
    reasons: dict[str, int]
    seconds: float
    """Time of the stage, summed over the shards that this run made."""
    rate: float | None
    """Images a second of this run, from its first shard to its last."""

    @property
    def own_failures(self) -> float:
        """The share of inputs that failed here, and not upstream."""
        return (self.failed - self.reasons.get(UPSTREAM, 0)) / self.inputs if self.inputs else 0.0


@dataclass
class BuildSummary:
    """The whole corpus as far as a build's config goes, and what this run did."""

    corpus: str
    seconds: float
    worked: bool
    """False if there was nothing to do."""
    units: dict[str, int]
    """`total`, `read`, `set_aside`."""
    columns: dict[str, ColumnSummary]
    set_aside: list[dict[str, Any]] = field(default_factory=list)
    """`column`, `source`, `shard` and the last `message` of what was set aside: the first hundred."""
    damage: list[str] = field(default_factory=list)
    """Commits that cannot be understood; the columns do not count them."""
    max_failures: float = 1.0

    @property
    def too_many_failures(self) -> list[str]:
        """The columns of whose inputs a larger share failed than `max_failures`."""
        return [name for name, column in self.columns.items() if column.own_failures > self.max_failures]

    @property
    def exit_status(self) -> int:
        """0, or 1 if something is set aside or damaged, or more samples failed than the config allows."""
        aside = bool(self.units["set_aside"]) or any(column.set_aside for column in self.columns.values())
        return 1 if aside or self.damage or self.too_many_failures else 0

    def text(self) -> str:
        """The summary for people: a table that adds up, and what is to be said beside it."""
        units = self.units
        lines = [] if self.worked else ["nothing to do: all that can be made is there"]
        lines.append(f"corpus {self.corpus}: {units['read']:,} of {units['total']:,} units read")
        width = max(map(len, self.columns), default=0)
        lines.append(f"{'column':{width}}  {'shards':>13}  {'in':>11} = {'out':>11} + {'failed':>9}  {'images/s':>8}")
        for name, column in self.columns.items():
            shards = f"{column.committed:,}/{column.shards:,}"
            rate = "" if column.rate is None else f"{column.rate:,.0f}"
            counts = f"{column.inputs:>11,} = {column.out:>11,} + {column.failed:>9,}"
            lines.append(f"{name:{width}}  {shards:>13}  {counts}  {rate:>8}")
        for name, column in self.columns.items():
            own = {reason: count for reason, count in column.reasons.items() if reason != UPSTREAM}
            if own:  # what failed upstream is told there
                lines.append(f"{name}: failed for " + ", ".join(f"{reason} {count:,}" for reason, count in own.items()))
            if column.waiting:
                lines.append(
                    f"{name}: {column.waiting:,} shards are not made; the columns that they come from are not there"
                )
        for entry in self.set_aside:
            where, message = f"{entry['column']}/{entry['source']}/{entry['shard']}", entry["message"].splitlines()[0]
            lines.append(f"set aside: {where}: {message}")
        if self.set_aside:
            lines.append("what was set aside is taken again with --retry-failed")
        lines += self.damage
        for name in self.too_many_failures:
            share = self.columns[name].own_failures
            lines.append(
                f"{name}: {share:.1%} of its inputs failed, the config allows max_failures = {self.max_failures}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"exit_status": self.exit_status, "too_many_failures": self.too_many_failures}


@dataclass
class Work:
    """What this run did for one column: shards, images, seconds of the stage, and the wall clock's first and last."""

    shards: int = 0
    samples: int = 0
    seconds: float = 0.0
    first: float = 0.0
    last: float = 0.0


def summarize(
    corpus: Corpus, plan: Plan, sources: list[str], work: Mapping[str, Work], seconds: float, max_failures: float
) -> BuildSummary:
    """Add up the commits of the plan's columns."""
    damage: list[str] = []
    columns, found = {}, totals(commit_table(corpus, damage))
    for column in plan.columns:
        there = [found[column, source] for source in sources if (column, source) in found]
        committed = sum(one.done for one in there)
        reasons = sum((one.reasons for one in there), Counter[str]())
        did = work.get(column, Work())
        span = did.last - did.first
        aside = len(plan.aside[column])
        columns[column] = ColumnSummary(
            shards=plan.shards,
            committed=committed,
            built=did.shards,
            set_aside=aside,
            waiting=max(plan.shards - committed - aside, 0) if column != IMAGES else 0,
            inputs=sum(one.inputs for one in there),
            out=sum(one.out for one in there),
            failed=sum(one.failed for one in there),
            reasons=dict(reasons.most_common()),
            seconds=round(did.seconds, 3),
            rate=round(did.samples / span, 1) if span > 0 else None,
        )
    return BuildSummary(
        corpus=corpus.url,
        seconds=round(seconds, 3),
        worked=any(did.shards for did in work.values()),
        units={"total": plan.units_total, "read": plan.units_done, "set_aside": len(plan.aside[UNITS])},
        columns=columns,
        set_aside=_messages(corpus, plan),
        damage=damage,
        max_failures=max_failures,
    )


def _messages(corpus: Corpus, plan: Plan) -> list[dict[str, Any]]:
    found = []
    for column, where in plan.aside.items():
        numbers = failures(corpus, column) if where else {}
        for source, shard in sorted(where)[:100]:
            record = read_failure(corpus, column, source, shard, numbers[source, shard])
            found.append({"column": column, "source": source, "shard": shard, "message": record.message})
    return found[:100]
