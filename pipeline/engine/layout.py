"""How the work is laid out on a cluster: what each kind of work asks for, and how much of it there may be at once."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Actors:
    """The processes that hold models of one kind: what each asks for, and how many there may be."""

    cpu: float
    gpu: float
    count: int
    """Of all stages of the kind together,"""
    per_stage: int
    """and of one of them."""


@dataclass(frozen=True)
class Places:
    """A quarter of the CPUs is for ingest, half for models, the rest for the cheap stages.

    So each kind always finds a place, on one CPU too, and none can keep another waiting for ever. What is configured is
    the most that a task or an actor asks for. Models that stay on CPUs may be as many as there are CPUs, and ask for
    less each: where nothing else is to be done none of the CPUs stands idle.
    """

    ingest_cpu: float
    ingests: int
    """Units that are read at once."""
    task_cpu: float
    tasks: int
    """Shards of the cheap stages with Ray at once: what can run, and two more so that no CPU waits for the driver."""
    gpu_models: Actors
    cpu_models: Actors

    @classmethod
    def on(
        cls,
        cpus: float,
        gpus: float,
        gpu_models: int,
        cpu_models: int = 0,
        *,
        cpus_per_task: float = 1.0,
        cpus_per_actor: float = 1.0,
        gpus_per_actor: float = 1.0,
    ) -> "Places":
        """The layout for a cluster with so many CPUs and GPUs, and so many stages that hold a model.

        gpu_models, cpu_models: stages whose model wants a GPU, and those whose model stays on a CPU.

        With fewer GPUs than stages that want one each gets a share, so that they run side by side. Without any they
        get no more than their part of the CPUs, so that on a small machine each large model is loaded once.
        """
        share = cpus / 4 if gpu_models and cpu_models else cpus / 2

        def on_cpus(models: int, of: float) -> Actors:
            each = max(1, int(of / models / max(cpus_per_actor, 0.1)))
            return Actors(_floor(min(cpus_per_actor, share / (each * models))), 0.0, each * models, each)

        wanting = max(gpu_models, 1)
        if gpu := _floor(min(gpus_per_actor, gpus / wanting if gpus < wanting else gpus)):
            many = int(gpus / gpu)
            asks = _floor(min(cpus_per_actor, share / max(many, wanting)))
            on_gpus = Actors(asks, gpu, many, max(1, int(gpus / gpus_per_actor)))
        else:
            on_gpus = on_cpus(wanting, share)
        task = _floor(min(cpus_per_task, cpus / 4))
        ingest = _floor(min(cpus_per_task / 2, cpus / 8))
        return cls(
            ingest_cpu=ingest,
            ingests=max(1, int(cpus / 4 / ingest)),
            task_cpu=task,
            tasks=math.ceil(cpus / task) + 2,
            gpu_models=on_gpus,
            cpu_models=on_cpus(max(cpu_models, 1), cpus),
        )

    def models(self, device: str) -> Actors:
        """Those of the stages with such a `device`."""
        return self.gpu_models if device == "gpu" else self.cpu_models


def _floor(value: float) -> float:
    """Down to a hundredth (whole above one), so that n parts of 1/n always fit; Ray knows no finer ones."""
    if value >= 1:
        return float(math.floor(value))
    return max(math.floor(value * 100 + 1e-9) / 100, 0.01) if value > 0 else 0.0
