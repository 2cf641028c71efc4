"""Result of `estimate`: sources, columns, stages, totals and money, each figure with its origin.

Times are in seconds, sizes in bytes, prices in dollars; None stands where nobody knows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EstimatedMachines:
    """The machines that the figures are for; `gpu` is a kind of `rates.GPUS`."""

    cpus: float
    gpus: int
    gpu: str | None


@dataclass(frozen=True)
class EstimatedSource:
    """A source: how it is cut, and how many bytes are fetched."""

    units: int
    inputs: int
    shards: int
    fetched_bytes: int | None
    origin: str


@dataclass(frozen=True)
class EstimatedColumn:
    """A column: `inputs` = `out` + `failed`, and the bytes of its shards."""

    inputs: int
    out: int
    bytes: int
    origin: str

    @property
    def failed(self) -> int:
        return self.inputs - self.out

    def to_json(self) -> dict[str, Any]:
        return {
            "in": self.inputs,
            "out": self.out,
            "bytes": self.bytes,
            "failed": self.failed,
            "origin": self.origin,
        }


@dataclass(frozen=True)
class EstimatedStage:
    """A stage: what it works on, how many workers at once, and its times."""

    device: str | None
    """`cpu`, or the kind of GPU."""
    workers: float
    inputs: int
    cpu_seconds: float | None
    """Of processors."""
    gpu_seconds: float | None
    """Of GPUs."""
    seconds: float | None
    """By the clock, if it ran alone on the machines."""
    origin: str

    @property
    def rate(self) -> float | None:
        """Inputs a second, if it ran alone."""
        return self.inputs / self.seconds if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "workers": self.workers,
            "inputs": self.inputs,
            "cpu_seconds": self.cpu_seconds,
            "gpu_seconds": self.gpu_seconds,
            "seconds": self.seconds,
            "rate": self.rate,
            "origin": self.origin,
        }


@dataclass(frozen=True)
class EstimatedTime:
    """The time of the build, without the stages that are `not_measured`."""

    cpu_seconds: float
    """Of processors, over all stages."""
    gpu_seconds: float
    """Of GPUs, over all stages."""
    seconds: float
    """By the clock."""
    narrowest: str
    """The largest of the bounds: what the build waits for."""
    bounds: Mapping[str, float]
    """Seconds that processors, GPUs, network and each stage's workers are busy at least."""
    not_measured: list[str]


@dataclass(frozen=True)
class EstimatedMoney:
    """Dollars for the machines, and for keeping the corpus."""

    gpus: float | None
    cpus: float
    build: float | None
    complete: bool
    """All stages are measured, and the price of a GPU is known."""
    storage_a_month: float


@dataclass(frozen=True)
class Estimate:
    """Estimate of a build of the whole config, whatever of it is built already."""

    name: str
    corpus: str
    shard_samples: int
    learned_from: str | None
    """The root of the earlier build that figures were learned from."""
    machines: EstimatedMachines
    sources: Mapping[str, EstimatedSource]
    columns: Mapping[str, EstimatedColumn]
    stages: Mapping[str, EstimatedStage]
    time: EstimatedTime
    money: EstimatedMoney
    assumptions: list[str]
    """Lines for people."""

    @property
    def inputs(self) -> int:
        return sum(source.inputs for source in self.sources.values())

    @property
    def shards(self) -> int:
        return sum(source.shards for source in self.sources.values())

    @property
    def bytes(self) -> int:
        return sum(column.bytes for column in self.columns.values())

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as `microdit plan --json` prints it."""
        return {
            "name": self.name,
            "corpus": self.corpus,
            "shard_samples": self.shard_samples,
            "learned_from": self.learned_from,
            "machines": asdict(self.machines),
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "columns": {name: column.to_json() for name, column in self.columns.items()},
            "stages": {name: stage.to_json() for name, stage in self.stages.items()},
            "totals": {
                "inputs": self.inputs,
                "shards": self.shards,
                "commits": self.shards * len(self.columns),
                "bytes": self.bytes,
                **asdict(self.time),
            },
            "money": asdict(self.money),
            "assumptions": self.assumptions,
        }
