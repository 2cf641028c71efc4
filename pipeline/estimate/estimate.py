"""`microdit plan`: what a build would come to, before anybody spends: shards, bytes, time and money.

Each number says where it comes from: an earlier, smaller build's commits (best), shapes, what is written about a
dataset, the measured table (`pipeline/rates.json`), arithmetic, or an assumption; what nobody measured is `None`.

Time is that of the narrowest place. Stages stream side by side, so a build lasts as long as the busiest of

    the processors    the CPU seconds of all stages, over the CPUs
    the GPUs          the seconds of all stages with a model on one, over the GPUs
    one stage         its workers' seconds, over as many of them as the engine runs at once (`pipeline.engine.layout`)
    the network       the bytes that are fetched, over the bandwidth

and, besides, until it has started and until its last shard has gone through all stages.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.captions import CAPTIONERS, CaptionsColumn, origin_of
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.scores import ClipScores, ScoresColumn, device_of, scorer_of
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.engine.layout import Layout
from microdit.pipeline.estimate import rates
from microdit.pipeline.estimate.column_sizes import Sizes, by_origin
from microdit.pipeline.estimate.past_build import Earlier
from microdit.pipeline.estimate.source_sizes import Expected, expected

INGEST = "ingest"
CPUS_A_GPU = 16
START_SECONDS = 25.0
"""Until the first shards are at work: Python, Ray, a small model's load, on two cores."""


UNSEEN = "no earlier build has it"


@dataclass(frozen=True)
class Machines:
    """What the build would run on, and prices in dollars: of an hour, and of a TB kept for a month."""

    cpus: float | None = None
    gpus: int = 0
    gpu: str | None = None
    bandwidth: float = 10.0
    """Gbit/s of all machines together."""
    gpu_price: float | None = None
    cpu_price: float = 0.04
    storage_price: float = 23.0


@dataclass
class Cost:
    """What a stage costs, in seconds; None: nobody measured it."""

    device: str
    """`cpu` or `gpu`: where it works."""
    model: bool
    workers: float
    """How many work at once."""
    inputs: int = 0
    cpu: float | None = 0.0
    gpu: float | None = 0.0
    busy: float | None = 0.0
    """Of its workers."""
    origins: dict[str, str] = field(default_factory=dict)
    """By source."""

    def add(self, source: str, inputs: int, each: tuple[float | None, float | None, float | None], origin: str) -> None:
        """Seconds for each of a source's inputs: of processors, of a GPU, of a worker."""

        def more(had: float | None, one: float | None) -> float | None:
            return None if had is None or one is None else had + inputs * one

        self.inputs += inputs
        self.cpu, self.gpu, self.busy = map(more, (self.cpu, self.gpu, self.busy), each)
        self.origins[source] = origin

    @property
    def known(self) -> bool:
        return self.cpu is not None and self.gpu is not None


def estimate(
    config: BuildConfig,
    machines: Machines = Machines(),
    learn_from: str | None = None,
    samples: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What a build of the whole config would come to, whatever of it is there already.

    Args:
        learn_from: an earlier build; by default the config's own corpus, if something of it is committed.
        samples: numbers of inputs, as `microdit.pipeline.estimate.source_sizes` takes them.

    Returns:
        dict: `learned_from`, `machines`, and by name `sources`, `columns` and `stages`, each with its `origin`;
        `totals`, `money`, `assumptions` (lines for people). Seconds, bytes and dollars; None where nobody knows.

    Raises:
        RequestError: nothing to learn from at `learn_from`; a GPU of no known kind; a source that nobody can size.
    """
    return _Estimate(config, machines, learn_from, samples or {}).result()


class _Estimate:
    def __init__(self, config: BuildConfig, given: Machines, learn_from: str | None, samples: Mapping[str, int]):
        self.config, self.given = config, given
        self.assumptions: list[str] = []
        self.earlier = self._earlier(learn_from)
        self.otherwise = self.earlier.otherwise(config) if self.earlier is not None else {}
        self.gpu = _gpu(given)
        self.sources = expected(config, self.earlier, samples)
        self.sizes = Sizes(config, self.sources, self.earlier, self.otherwise, self.assume)
        self.shards = self.sizes.shards
        self.cpus = self._cpus()
        stages = {self._stage_of(name): _device(options) for name, options in config.columns.items()}
        counts = [list(stages.values()).count(device) for device in ("gpu", "cpu")]
        self.layout = Layout.for_cluster(
            self.cpus,
            given.gpus,
            *counts,
            **config.resources.model_dump(include={"cpus_per_task", "cpus_per_actor", "gpus_per_actor"}),
        )

    def assume(self, line: str) -> None:
        if line not in self.assumptions:
            self.assumptions.append(line)

    def result(self) -> dict[str, Any]:
        columns, stages = self.sizes.columns(), self._stages()
        time = self._time(stages)
        size = sum(column["bytes"] for column in columns.values())
        money = self._money(time, size)
        for name, note in self.otherwise.items():
            self.assume(f"{name} was made otherwise in the earlier build ({note}): nothing is learned from it")
        return {
            "name": self.config.name,
            "corpus": self.config.corpus,
            "shard_samples": self.config.shard_samples,
            "learned_from": self.earlier.corpus.url if self.earlier is not None else None,
            "machines": {"cpus": self.cpus, "gpus": self.given.gpus, "gpu": self.gpu},
            "sources": {
                name: {
                    "units": one.units,
                    "inputs": one.inputs,
                    "shards": self.shards[name],
                    "fetched_bytes": None if one.fetched is None else round(one.fetched),
                    "origin": one.origin,
                }
                for name, one in self.sources.items()
            },
            "columns": columns,
            "stages": {name: self._shown(cost) for name, cost in stages.items()},
            "totals": {
                "inputs": sum(one.inputs for one in self.sources.values()),
                "shards": sum(self.shards.values()),
                "commits": sum(self.shards.values()) * len(columns),
                "bytes": size,
                **time,
            },
            "money": money,
            "assumptions": self.assumptions,
        }

    # -- time ----------------------------------------------------------------------------------------------------------

    def _stages(self) -> dict[str, Cost]:
        units = sum(source.units for source in self.sources.values())
        found = {INGEST: Cost("cpu", False, min(self.layout.ingests, units))}
        columns: dict[str, list[str]] = {INGEST: [IMAGES]}
        for column, options in self.config.columns.items():
            device, name = _device(options), self._stage_of(column)
            on_gpu = device == "gpu" and self.given.gpus > 0
            on_cpu = self.layout.models(device).per_stage if device else self.cpus
            found.setdefault(name, Cost("gpu", True, self.given.gpus) if on_gpu else Cost("cpu", bool(device), on_cpu))
            columns.setdefault(name, []).append(column)
        for stage, cost in found.items():
            for name, source in self.sources.items():
                self._pace(stage, cost, columns[stage], name, source)
        return found

    def _pace(self, stage: str, cost: Cost, columns: list[str], name: str, source: Expected) -> None:
        pace, learned = None, ""
        pixels = _sees_images(columns[0], self.config.columns.get(columns[0]))
        if self.earlier is not None and not self.otherwise.keys() & {*columns, *[IMAGES] * pixels}:
            pace = self.earlier.pace(columns, name)
            learned = f"earlier build, {pace.shards:,} shards" if pace is not None else ""
        on_cpus = pace is not None and (not cost.model or pace.devices <= {rates.CPU})
        if pace is not None and cost.device == "cpu" and on_cpus:
            if not pace.has_cpu:
                self.assume("the earlier build's commits tell no CPU seconds: all of a worker's time is taken for them")
            busy = pace.seconds + pace.unit_seconds * source.units / source.inputs
            cost.add(name, source.inputs, (pace.cpu_seconds, 0.0, busy), learned)
            return
        if pace is not None and pace.devices and all(rates.is_kind(device, self.gpu or "-") for device in pace.devices):
            cost.add(name, source.inputs, (pace.cpu_seconds, pace.seconds, pace.seconds), learned)
            return
        seconds, origin = self._of_table(columns, cost.device)
        if seconds is None:
            cost.add(name, source.inputs, (None, None, None), origin)
            return
        if cost.device == "cpu":
            cost.add(name, source.inputs, (seconds, 0.0, seconds), origin)
            return
        around = pace.cpu_seconds * (1 - pace.model_share) if pace is not None and on_cpus else 0.0
        if not around:
            self.assume(f"{stage}: the CPUs' part (decoding, writing) is not counted: {UNSEEN}")
        cost.add(name, source.inputs, (around, seconds, seconds), origin)

    def _of_table(self, columns: list[str], device: str) -> tuple[float | None, str]:
        """Seconds of one input of a stage by the measured table, or by arithmetic; and which."""
        by_model: dict[str, list[str]] = {}
        for column in columns:
            options = self.config.columns.get(column)
            by_model.setdefault(options.autoencoder if isinstance(options, LatentsColumn) else "", []).append(column)
        parts = [self._of_table_alone(some, device) for some in by_model.values()]
        seconds = [part[0] for part in parts if part[0] is not None]
        origins = dict.fromkeys(origin for _, origin in parts)
        return sum(seconds) if len(seconds) == len(parts) else None, "; ".join(origins)

    def _of_table_alone(self, columns: list[str], device: str) -> tuple[float | None, str]:
        """`_of_table` of columns of one model."""
        kind = str(self.gpu) if device == "gpu" else rates.CPU
        options = [self.config.columns.get(column) for column in columns]
        stage = columns[0].partition("/")[0] if columns != [IMAGES] else INGEST
        if isinstance(options[0], CaptionsColumn) and options[0].origin in CAPTIONERS:
            stage = options[0].origin  # the table's captions are those that are there already
        resolutions = [one.resolution for one in options if isinstance(one, LatentsColumn)]
        model = ""
        if isinstance(options[0], LatentsColumn):
            model = options[0].autoencoder
        elif isinstance(options[0], TextColumn):
            model = options[0].encoder
        elif isinstance(options[0], ScoresColumn) and scorer_of(columns[0]) != "basic":
            model = getattr(options[0], "model", scorer_of(columns[0]))
        together = rates.measured(stage, kind, model, resolutions)
        alone = [rates.measured(stage, kind, model, [resolution]) for resolution in resolutions]
        found = [together] if together is not None or not resolutions else alone
        if all(found):
            lines = dict.fromkeys(rate.origin for rate in found if rate is not None)
            return sum(1 / rate.rate for rate in found if rate is not None), "; ".join(lines)
        tflop: float | None = None
        if known := rates.AUTOENCODER_TFLOP.get(model):
            tflop = sum(known[r] for r in resolutions) if known.keys() >= set(resolutions) else None
        elif (encoder := rates.ENCODERS.get(model)) and encoder.weights and isinstance(options[0], TextColumn):
            tokens = max(self.sizes.tokens(columns[0], name, options[0])[0] for name in self.sources)
            tflop = 2e-3 * encoder.weights * tokens
        if tflop is None or device == "cpu":
            return None, f"not measured: {', '.join(columns)} on {kind}"
        peak = rates.GPUS[kind].tflops
        return tflop / peak / rates.UTILISATION, (
            f"by arithmetic, not measured: {tflop:.3g} TFLOP at {rates.UTILISATION:.0%} of {kind}'s {peak:,.0f} TFLOP/s"
        )

    def _time(self, stages: Mapping[str, Cost]) -> dict[str, Any]:
        known = {name: cost for name, cost in stages.items() if cost.known}
        cpu, gpu = (sum(getattr(cost, what) or 0.0 for cost in known.values()) for what in ("cpu", "gpu"))
        fetched = sum(source.fetched or 0.0 for source in self.sources.values())
        bounds = {"the processors": cpu / self.cpus, "the network": fetched * 8 / (self.given.bandwidth * 1e9)}
        if self.given.gpus:
            bounds["the GPUs"] = gpu / self.given.gpus
        for name, cost in known.items():
            if cost.device == "cpu":
                bounds[f"the workers of {name}"] = (cost.busy or 0.0) / cost.workers
        narrowest = max(bounds, key=lambda name: bounds[name])
        shards = max(sum(self.shards.values()), 1)
        chain = sum((cost.busy or 0.0) / shards for cost in known.values())
        self.assume(f"{START_SECONDS:.0f} s until all stages are at work; large models take longer to load")
        if fetched:
            self.assume(f"a network of {self.given.bandwidth:g} Gbit/s that nothing else uses (--bandwidth)")
        return {
            "cpu_seconds": cpu,
            "gpu_seconds": gpu,
            "seconds": START_SECONDS + bounds[narrowest] + chain,
            "narrowest": narrowest,
            "bounds": bounds,
            "not_measured": sorted(stages.keys() - known.keys()),
        }

    def _shown(self, cost: Cost) -> dict[str, Any]:
        alone = None
        if cost.known:
            on_gpus = (cost.gpu or 0.0) / max(self.given.gpus, 1)
            alone = max((cost.cpu or 0.0) / self.cpus, on_gpus, (cost.busy or 0.0) / cost.workers)
        return {
            "device": cost.device if cost.device == "cpu" else self.gpu,
            "workers": cost.workers,
            "inputs": cost.inputs,
            "cpu_seconds": cost.cpu,
            "gpu_seconds": cost.gpu,
            "seconds": alone,
            "rate": cost.inputs / alone if alone else None,
            "origin": by_origin(cost.origins),
        }

    # -- what it is learned from, machines and money ------------------------------------------------------------------

    def _earlier(self, learn_from: str | None) -> Earlier | None:
        if learn_from is not None:
            return Earlier(learn_from)
        try:
            return Earlier(self.config.corpus)
        except DamagedError:
            raise
        except RequestError as error:  # most often it is not there yet
            self.assume(f"nothing is learned: {error}")
            return None

    def _cpus(self) -> float:
        if self.given.cpus is not None:
            return self.given.cpus
        if self.given.gpus:
            self.assume(f"{CPUS_A_GPU} CPUs for each GPU (--cpus)")
            return float(CPUS_A_GPU * self.given.gpus)
        if self.config.resources.cpus is not None:
            return self.config.resources.cpus
        here = float(os.cpu_count() or 1)
        self.assume(f"as many CPUs as this machine has, {here:.0f} (--cpus)")
        return here

    def _stage_of(self, column: str) -> str:
        """The stage's name, as the engine calls it."""
        options = self.config.columns[column]
        if isinstance(options, LatentsColumn):
            return "latents"
        if isinstance(options, ClipScores):  # that of the first column of its model
            model = options.model, options.revision
            others = ((name, o) for name, o in self.config.columns.items() if isinstance(o, ClipScores))
            return next(name for name, other in others if (other.model, other.revision) == model)
        if isinstance(options, CaptionsColumn) and options.vlm is not None:
            asked = ((name, o) for name, o in self.config.columns.items() if isinstance(o, CaptionsColumn))
            column = next(name for name, other in asked if origin_of(other) == origin_of(options))
        models = isinstance(options, TextColumn | CaptionsColumn) and _device(options) is not None
        return column.replace("/", ":", 1) if models else column

    def _money(self, time: Mapping[str, Any], size: int) -> dict[str, Any]:
        given, hours = self.given, time["seconds"] / 3600
        price = given.gpu_price
        if given.gpus and price is None and (known := rates.GPUS[str(self.gpu)]).price is not None:
            price = known.price
            self.assume(f"${price} for an hour of one {self.gpu}: {known.why} (--gpu-price)")
        elif given.gpus and price is not None:
            self.assume(f"${price} for an hour of one {self.gpu}, as it was told")
        elif given.gpus:
            self.assume(f"the price of an hour of one {self.gpu} is not known: give --gpu-price")
        self.assume(f"${given.cpu_price} for an hour of one CPU (--cpu-price): assumed, no quote")
        self.assume(f"${given.storage_price} for a TB and month (--storage-price): assumed, no quote")
        self.assume("the machines are paid for as long as the build lasts, idle or not; traffic is free")
        gpus = 0.0 if not given.gpus else None if price is None else hours * given.gpus * price
        cpus = hours * self.cpus * given.cpu_price
        return {
            "gpus": gpus,
            "cpus": cpus,
            "build": None if gpus is None else gpus + cpus,
            "complete": not time["not_measured"] and gpus is not None,
            "storage_a_month": size / 1e12 * given.storage_price,
        }


def _gpu(given: Machines) -> str | None:
    """The kind of the GPUs; None without any."""
    if given.gpus and given.gpu is None:
        raise RequestError(f"--gpus {given.gpus}: of which kind? Give --gpu, one of {', '.join(rates.GPUS)}")
    if given.gpu is not None and not given.gpus:
        raise RequestError(f"--gpu {given.gpu}: how many? Give --gpus")
    return rates.gpu_kind(given.gpu) if given.gpu is not None else None


def _device(options: Any) -> str | None:
    """The `device` of the stage that makes such a column."""
    if isinstance(options, CaptionsColumn):
        return "gpu" if options.origin in ("vlm", "tags") else None
    return "gpu" if isinstance(options, LatentsColumn | TextColumn) else device_of(options)


def _sees_images(column: str, options: Any) -> bool:
    """Whether the stage works on images."""
    if isinstance(options, CaptionsColumn):
        return options.origin in CAPTIONERS
    return not column.startswith(("captions/", "text/", "scores/caption"))
