"""Results of the two conversions: as JSON for `--json`, and as lines for people."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from microdit.pipeline.tables.commit_table import Totals

MOST_FAILED = 0.1  # the share of a column's samples that may fail before the exit status is 1


@dataclass(frozen=True)
class MdsColumnCounts:
    """Samples of one column: `inputs` = `out` + `failed`, and why they failed, commonest reason first."""

    inputs: int
    out: int
    failed: int
    reasons: dict[str, int]

    @classmethod
    def of(cls, totals: Totals) -> "MdsColumnCounts":
        return cls(totals.inputs, totals.out, totals.failed, dict(totals.reasons.most_common()))

    @property
    def own_failures(self) -> float:
        """The share of the samples that failed in this column, and not upstream."""
        return (self.failed - self.reasons.get("upstream", 0)) / max(self.inputs, 1)

    def to_json(self) -> dict[str, Any]:
        return {"in": self.inputs, "out": self.out, "failed": self.failed, "reasons": self.reasons}


@dataclass(frozen=True)
class UnreadShard:
    """An MDS shard that was set aside: how many samples the index says it has, and the fault."""

    samples: int
    message: str


@dataclass(frozen=True)
class MdsUnitCounts:
    """MDS shards: all, those that are committed, and those that this run set aside."""

    total: int
    read: int
    set_aside: int


@dataclass(frozen=True)
class ImportSummary:
    """Result of `to_corpus`."""

    corpus: str
    source: str
    units: MdsUnitCounts
    inputs: int
    """Samples according to the index: those that were read, and the `unread`."""
    columns: dict[str, MdsColumnCounts]
    unread: int
    """Samples of shards that cannot be read."""
    set_aside: list[UnreadShard]
    left_out: list[str]
    """MDS columns that were not taken."""
    unchecked: list[str]
    """Names of hashes that cannot be computed here."""
    written: int
    """Samples of this run."""
    seconds: float

    @property
    def exit_status(self) -> int:
        """1 if a shard was set aside, or more than `MOST_FAILED` of a column's samples failed in it."""
        failed = any(column.own_failures > MOST_FAILED for column in self.columns.values())
        return 1 if self.set_aside or failed else 0

    def to_json(self) -> dict[str, Any]:
        """Return the summary as `--json` prints it."""
        return {
            "corpus": self.corpus,
            "source": self.source,
            "units": asdict(self.units),
            "inputs": self.inputs,
            "unread": self.unread,
            "columns": {name: column.to_json() for name, column in self.columns.items()},
            "set_aside": [asdict(shard) for shard in self.set_aside],
            "left_out": self.left_out,
            "unchecked": self.unchecked,
            "written": self.written,
            "seconds": self.seconds,
            "exit_status": self.exit_status,
        }

    def lines(self) -> Iterator[str]:
        """Yield the summary as lines for people."""
        if not self.written and not self.set_aside:
            yield "nothing to do: all of it is there"
        yield (
            f"corpus {self.corpus}, source {self.source}: {self.units.read:,} of {self.units.total:,} MDS shards, "
            f"{self.inputs - self.unread:,} of {self.inputs:,} samples"
        )
        width = max(map(len, self.columns))
        for name, column in self.columns.items():
            yield f"{name:{width}}  {column.inputs:>11,} in = {column.out:>11,} out + {column.failed:>9,} failed"
        for name, column in self.columns.items():
            own = [f"{reason} {count:,}" for reason, count in column.reasons.items() if reason != "upstream"]
            if own:
                yield f"{name}: failed for {', '.join(own)}"
            if column.own_failures > MOST_FAILED:
                yield f"{name}: {column.own_failures:.1%} of its samples failed; are the shapes and the encoder right?"
        for shard in self.set_aside:
            yield f"not read, {shard.samples:,} samples: {shard.message}"
        if self.set_aside:
            yield "mend those files, and the same command takes them again"
        if self.left_out:
            yield f"columns that were not taken: {', '.join(self.left_out)}"
        if self.unchecked:
            yield f"hashes that were not checked, for want of a package (xxhash): {', '.join(self.unchecked)}"


@dataclass(frozen=True)
class ExportSummary:
    """Result of `to_mds`."""

    corpus: str
    folder: str
    columns: dict[str, str]
    """MDS column to column of the corpus."""
    shards: int
    """Of the corpus."""
    mds_shards: int
    inputs: int
    """Samples: those in the folder (`out`), and those that were `left_out`."""
    out: int
    left_out: dict[str, int]
    """Samples by the reason why they are not in the folder, commonest first."""
    written: int
    """Samples of this run."""
    seconds: float

    @property
    def exit_status(self) -> int:
        """1 if there is no sample in the folder."""
        return 0 if self.out else 1

    def to_json(self) -> dict[str, Any]:
        """Return the summary as `--json` prints it."""
        return {
            "corpus": self.corpus,
            "folder": self.folder,
            "columns": self.columns,
            "shards": self.shards,
            "mds_shards": self.mds_shards,
            "in": self.inputs,
            "out": self.out,
            "left_out": self.left_out,
            "written": self.written,
            "seconds": self.seconds,
            "exit_status": self.exit_status,
        }

    def lines(self) -> Iterator[str]:
        """Yield the summary as lines for people."""
        if not self.written and self.out:
            yield "nothing to do: all of it is there"
        yield (
            f"{self.folder}: {self.inputs:,} samples in = {self.out:,} out + {self.inputs - self.out:,} left out; "
            f"{self.mds_shards:,} MDS shards of {self.shards:,} shards"
        )
        for name, column in self.columns.items():
            yield f"  {name} from {column}"
        for reason, count in self.left_out.items():
            yield f"left out, {count:,} samples: {reason}"
