"""Estimate the time of each stage, and of the whole build.

Time is that of the narrowest resource. Stages stream side by side, so a build lasts as long as the busiest of

    the processors    the CPU seconds of all stages, over the CPUs
    the GPUs          the seconds of all stages with a model on one, over the GPUs
    one stage         its workers' seconds, over as many of them as the engine runs at once (`pipeline.engine.layout`)
    the network       the bytes that are fetched, over the bandwidth

and, besides, until it has started and until its last shard has gone through all stages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from microdit.pipeline.config.build import BuildConfig, ColumnOptions
from microdit.pipeline.config.captions import CAPTIONERS, CaptionsColumn, pass_key
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.scores import ClipScores, ScoresColumn, device_of, scorer_of
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.engine.layout import Layout
from microdit.pipeline.estimate import rates
from microdit.pipeline.estimate.column_sizes import ColumnSizes, by_origin
from microdit.pipeline.estimate.makers import MakerWork, drawing, makers_of
from microdit.pipeline.estimate.past_build import Pace, PastBuild
from microdit.pipeline.estimate.result import EstimatedStage, EstimatedTime
from microdit.pipeline.estimate.source_sizes import SourceSize

INGEST = "ingest"
START_SECONDS = 25.0
"""Until the first shards are at work: Python, Ray, a small model's load, on two cores."""


UNSEEN = "no earlier build has it"


@dataclass(frozen=True)
class Hardware:
    """The machines of an estimate: `gpu` is a kind of `rates.GPUS`, `bandwidth` in Gbit/s of all together."""

    cpus: float
    gpus: int
    gpu: str | None
    bandwidth: float


@dataclass(frozen=True)
class PerInput:
    """Seconds that one input takes of processors, of a GPU, and of a worker."""

    cpu: float
    gpu: float
    worker: float


@dataclass
class Cost:
    """Cost of a stage, in seconds; None: nobody measured it."""

    device: str
    """Device: `cpu` or `gpu`."""
    model: bool
    workers: float
    """Number of workers at a time."""
    inputs: int = 0
    cpu: float | None = 0.0
    gpu: float | None = 0.0
    busy: float | None = 0.0
    """Of its workers."""
    origins: dict[str, str] = field(default_factory=dict)
    """By source."""

    def add(self, source: str, inputs: int, each: PerInput | None, origin: str) -> None:
        """Add the inputs of a source; `each` is None if nobody measured it."""

        def more(sum_so_far: float | None, one: float | None) -> float | None:
            return None if sum_so_far is None or one is None else sum_so_far + inputs * one

        self.inputs += inputs
        self.cpu = more(self.cpu, None if each is None else each.cpu)
        self.gpu = more(self.gpu, None if each is None else each.gpu)
        self.busy = more(self.busy, None if each is None else each.worker)
        self.origins[source] = origin

    @property
    def known(self) -> bool:
        return self.cpu is not None and self.gpu is not None


class StageTimes:
    """Times of the stages of a config.

    Args:
        sizes: of the columns, for the tokens of captions.
        otherwise: columns of which the past build tells nothing, because it made them otherwise.
        assume: receives lines for people.
    """

    def __init__(
        self,
        config: BuildConfig,
        sources: Mapping[str, SourceSize],
        sizes: ColumnSizes,
        past: PastBuild | None,
        otherwise: Mapping[str, str],
        hardware: Hardware,
        assume: Callable[[str], None],
    ):
        self.config, self.sources, self.sizes, self.past = config, sources, sizes, past
        self.otherwise, self.hardware, self.assume = otherwise, hardware, assume
        devices = {stage_name(config, column): _device(options) for column, options in config.columns.items()}
        self.makers = list(makers_of(config, sources))
        devices |= {maker.name: "gpu" for maker in self.makers}
        counts = [list(devices.values()).count(device) for device in ("gpu", "cpu")]
        self.layout = Layout.for_cluster(
            hardware.cpus,
            hardware.gpus,
            *counts,
            **config.resources.model_dump(include={"cpus_per_task", "cpus_per_actor", "gpus_per_actor"}),
        )

    def costs(self) -> dict[str, Cost]:
        """Return the cost of each stage, as the engine calls it, over all sources."""
        drawn = {maker.source for maker in self.makers}
        units = sum(source.units for name, source in self.sources.items() if name not in drawn)
        costs = {INGEST: Cost("cpu", False, min(self.layout.ingests, units))} if units else {}
        costs |= {maker.name: self._drawing_cost(maker) for maker in self.makers}
        columns: dict[str, list[str]] = {INGEST: [IMAGES]}
        for column, options in self.config.columns.items():
            device, name = _device(options), stage_name(self.config, column)
            if device == "gpu" and self.hardware.gpus > 0:
                costs.setdefault(name, Cost("gpu", True, self.hardware.gpus))
            else:
                workers = self.layout.models(device).per_stage if device else self.hardware.cpus
                costs.setdefault(name, Cost("cpu", bool(device), workers))
            columns.setdefault(name, []).append(column)
        for stage in [name for name in costs if name in columns]:
            for name, source in self.sources.items():
                if stage != INGEST or name not in drawn:
                    each, origin = self._per_input(stage, costs[stage], columns[stage], name, source)
                    costs[stage].add(name, source.inputs, each, origin)
        return costs

    def _drawing_cost(self, maker: MakerWork) -> Cost:
        """Estimate the cost of a maker's pictures: drawing them, and the CPUs' part as ingest's."""
        gpu = self.hardware.gpu if self.hardware.gpus else None
        workers = self.hardware.gpus if gpu else self.layout.models("gpu").per_stage
        cost = Cost("gpu" if gpu else "cpu", True, workers)
        seconds, origin = drawing(maker, gpu, self.past, self.assume)
        beside = rates.measured(INGEST, rates.CPU)
        each = None
        if seconds is not None and gpu is not None and beside is not None:
            self.assume(
                f"{maker.name}: its CPUs' part (encoding, checks) takes as long as ingest in the measured table"
            )
            each = PerInput(1 / beside.rate, seconds, seconds)
        elif seconds is not None:
            each = PerInput(seconds if gpu is None else 0.0, 0.0 if gpu is None else seconds, seconds)
        cost.add(maker.source, maker.images, each, origin)
        return cost

    def stage(self, cost: Cost) -> EstimatedStage:
        """Return the figures of one stage."""
        alone = None
        if cost.known:
            on_gpus = (cost.gpu or 0.0) / max(self.hardware.gpus, 1)
            alone = max((cost.cpu or 0.0) / self.hardware.cpus, on_gpus, (cost.busy or 0.0) / cost.workers)
        return EstimatedStage(
            device=cost.device if cost.device == "cpu" else self.hardware.gpu,
            workers=cost.workers,
            inputs=cost.inputs,
            cpu_seconds=cost.cpu,
            gpu_seconds=cost.gpu,
            seconds=alone,
            origin=by_origin(cost.origins),
        )

    def total(self, costs: Mapping[str, Cost]) -> EstimatedTime:
        """Return the time of all stages side by side, by the narrowest resource."""
        hardware, known = self.hardware, {name: cost for name, cost in costs.items() if cost.known}
        cpu = sum(cost.cpu or 0.0 for cost in known.values())
        gpu = sum(cost.gpu or 0.0 for cost in known.values())
        fetched = sum(source.fetched or 0.0 for source in self.sources.values())
        bounds = {"the processors": cpu / hardware.cpus, "the network": fetched * 8 / (hardware.bandwidth * 1e9)}
        if hardware.gpus:
            bounds["the GPUs"] = gpu / hardware.gpus
        for name, cost in known.items():
            if cost.device == "cpu":
                bounds[f"the workers of {name}"] = (cost.busy or 0.0) / cost.workers
        narrowest = max(bounds, key=lambda name: bounds[name])
        shards = max(sum(self.sizes.shards.values()), 1)
        last_shard = sum((cost.busy or 0.0) / shards for cost in known.values())
        self.assume(f"{START_SECONDS:.0f} s until all stages are at work; large models take longer to load")
        if fetched:
            self.assume(f"a network of {hardware.bandwidth:g} Gbit/s that nothing else uses (--bandwidth)")
        return EstimatedTime(
            cpu_seconds=cpu,
            gpu_seconds=gpu,
            seconds=START_SECONDS + bounds[narrowest] + last_shard,
            narrowest=narrowest,
            bounds=bounds,
            not_measured=sorted(costs.keys() - known.keys()),
        )

    # -- one input -----------------------------------------------------------------------------------------------------

    def _per_input(
        self, stage: str, cost: Cost, columns: list[str], name: str, source: SourceSize
    ) -> tuple[PerInput | None, str]:
        """Return the seconds of one input of a source, as the past build took, or by the table; and the origin."""
        pace = self._past_pace(columns, name)
        learned = f"earlier build, {pace.shards:,} shards" if pace is not None else ""
        on_cpus = pace is not None and (not cost.model or pace.devices <= {rates.CPU})
        if pace is not None and cost.device == "cpu" and on_cpus:
            if not pace.has_cpu:
                self.assume("the earlier build's commits tell no CPU seconds: all of a worker's time is taken for them")
            busy = pace.seconds + pace.unit_seconds * source.units / source.inputs
            return PerInput(pace.cpu_seconds, 0.0, busy), learned
        gpu = self.hardware.gpu or "-"
        if pace is not None and pace.devices and all(rates.is_kind(device, gpu) for device in pace.devices):
            return PerInput(pace.cpu_seconds, pace.seconds, pace.seconds), learned
        seconds, origin = self._by_table(columns, cost.device)
        if seconds is None:
            return None, origin
        if cost.device == "cpu":
            return PerInput(seconds, 0.0, seconds), origin
        beside_model = pace.cpu_seconds * (1 - pace.model_share) if pace is not None and on_cpus else 0.0
        if not beside_model:
            self.assume(f"{stage}: the CPUs' part (decoding, writing) is not counted: {UNSEEN}")
        return PerInput(beside_model, seconds, seconds), origin

    def _past_pace(self, columns: list[str], name: str) -> Pace | None:
        """Return the pace of the past build; None if it made the columns, or the images that they read, otherwise."""
        reads_images = _sees_images(columns[0], self.config.columns.get(columns[0]))
        if self.past is None or self.otherwise.keys() & {*columns, *[IMAGES] * reads_images}:
            return None
        return self.past.pace(columns, name)

    def _by_table(self, columns: list[str], device: str) -> tuple[float | None, str]:
        """Return seconds of one input of a stage by the measured table, or by arithmetic; and the origin."""
        by_model: dict[str, list[str]] = {}
        for column in columns:
            options = self.config.columns.get(column)
            by_model.setdefault(options.autoencoder if isinstance(options, LatentsColumn) else "", []).append(column)
        parts = [self._by_table_of_model(some, device) for some in by_model.values()]
        seconds = [part[0] for part in parts if part[0] is not None]
        origins = dict.fromkeys(origin for _, origin in parts)
        return sum(seconds) if len(seconds) == len(parts) else None, "; ".join(origins)

    def _by_table_of_model(self, columns: list[str], device: str) -> tuple[float | None, str]:
        """Estimate as `_by_table` does, for columns of one model."""
        kind = str(self.hardware.gpu) if device == "gpu" else rates.CPU
        options = [self.config.columns.get(column) for column in columns]
        resolutions = [one.resolution for one in options if isinstance(one, LatentsColumn)]
        stage, model = _table_stage(columns, options[0]), _table_model(columns[0], options[0])
        together = rates.measured(stage, kind, model, resolutions)
        alone = [rates.measured(stage, kind, model, [resolution]) for resolution in resolutions]
        entries = [together] if together is not None or not resolutions else alone
        if all(entries):
            lines = dict.fromkeys(rate.origin for rate in entries if rate is not None)
            return sum(1 / rate.rate for rate in entries if rate is not None), "; ".join(lines)
        tflop = self._tflop(columns[0], options[0], model, resolutions)
        if tflop is None or device == "cpu":
            return None, f"not measured: {', '.join(columns)} on {kind}"
        peak = rates.GPUS[kind].tflops
        return tflop / peak / rates.UTILISATION, (
            f"by arithmetic, not measured: {tflop:.3g} TFLOP at {rates.UTILISATION:.0%} of {kind}'s {peak:,.0f} TFLOP/s"
        )

    def _tflop(
        self, column: str, options: ColumnOptions | None, model: str, resolutions: Sequence[int]
    ) -> float | None:
        """TFLOP of one input by arithmetic; None if the model's are not known."""
        if known := rates.AUTOENCODER_TFLOP.get(model):
            return sum(known[r] for r in resolutions) if known.keys() >= set(resolutions) else None
        encoder = rates.ENCODERS.get(model)
        if encoder and encoder.weights and isinstance(options, TextColumn):
            tokens = max(self.sizes.tokens(column, name, options)[0] for name in self.sources)
            return 2e-3 * encoder.weights * tokens
        return None


def stage_name(config: BuildConfig, column: str) -> str:
    """Name the stage that makes a column, as the engine does."""
    options = config.columns[column]
    if isinstance(options, LatentsColumn):
        return "latents"
    if isinstance(options, ClipScores):  # that of the first column of its model
        model = options.model, options.revision
        others = ((name, o) for name, o in config.columns.items() if isinstance(o, ClipScores))
        return next(name for name, other in others if (other.model, other.revision) == model)
    if isinstance(options, CaptionsColumn) and options.vlm is not None:
        asked = ((name, o) for name, o in config.columns.items() if isinstance(o, CaptionsColumn))
        column = next(name for name, other in asked if pass_key(other) == pass_key(options))
    models = isinstance(options, TextColumn | CaptionsColumn) and _device(options) is not None
    return column.replace("/", ":", 1) if models else column


def _device(options: ColumnOptions) -> str | None:
    """Return the `device` of the stage that makes such a column."""
    if isinstance(options, CaptionsColumn):
        return "gpu" if options.origin in ("vlm", "tags") else None
    return "gpu" if isinstance(options, LatentsColumn | TextColumn) else device_of(options)


def _sees_images(column: str, options: ColumnOptions | None) -> bool:
    """Tell whether the stage of a column works on images."""
    if isinstance(options, CaptionsColumn):
        return options.origin in CAPTIONERS
    return not column.startswith(("captions/", "text/", "scores/caption"))


def _table_stage(columns: Sequence[str], options: ColumnOptions | None) -> str:
    """Return the `stage` of a column's entries in the measured table."""
    if isinstance(options, CaptionsColumn) and options.origin in CAPTIONERS:
        return options.origin  # the table's `captions` are those that came with the samples
    return columns[0].partition("/")[0] if list(columns) != [IMAGES] else INGEST


def _table_model(column: str, options: ColumnOptions | None) -> str:
    """Return the `model` of a column's entries in the measured table."""
    if isinstance(options, LatentsColumn):
        return options.autoencoder
    if isinstance(options, TextColumn):
        return options.encoder
    if isinstance(options, ScoresColumn) and scorer_of(column) not in ("basic", "turned"):
        return str(getattr(options, "model", scorer_of(column)))
    return ""
