"""Shares of a cluster's CPUs and GPUs: what each kind of work asks Ray for, and how much of it runs at once."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShare:
    """The share of the processes that hold models of one kind."""

    cpu: float
    """CPUs that each asks for,"""
    gpu: float
    """and GPUs."""
    count: int
    """The most of them, over all stages of the kind,"""
    per_stage: int
    """and of one stage."""


@dataclass(frozen=True)
class Layout:
    """A quarter of the CPUs is for ingest, half for models, the rest for the cheap stages.

    So each kind of work can always run, on one CPU too, and none can keep another waiting for ever. What is configured
    is the most that a task or an actor asks for. Models that stay on CPUs may be as many as there are CPUs, and ask for
    less each, so that no CPU is idle where they are the only work.
    """

    ingest_cpu: float
    """CPUs that reading a unit asks for."""
    ingests: int
    """Units that are read at once."""
    task_cpu: float
    """CPUs that a shard of a cheap stage asks for."""
    tasks: int
    """Shards of the cheap stages with Ray at once: what can run, and two more so that no CPU waits for the driver."""
    gpu_models: ModelShare
    cpu_models: ModelShare

    @classmethod
    def for_cluster(
        cls,
        cpus: float,
        gpus: float,
        gpu_models: int,
        cpu_models: int = 0,
        *,
        cpus_per_task: float = 1.0,
        cpus_per_actor: float = 1.0,
        gpus_per_actor: float = 1.0,
    ) -> "Layout":
        """Divide a cluster among its kinds of work.

        With fewer GPUs than stages that want one each gets a share, so that they run side by side. Without any they
        get no more than their part of the CPUs, so that on a small machine each large model is loaded once.

        Args:
            cpus: CPUs of the cluster.
            gpus: its GPUs.
            gpu_models: stages whose model wants a GPU.
            cpu_models: stages whose model stays on CPUs.
            cpus_per_task: the most CPUs that a task of a cheap stage asks for.
            cpus_per_actor: the most CPUs that an actor asks for.
            gpus_per_actor: the most GPUs that an actor asks for.
        """
        share = cpus / 4 if gpu_models and cpu_models else cpus / 2
        wanting = max(gpu_models, 1)
        if gpu := _floor(min(gpus_per_actor, gpus / wanting if gpus < wanting else gpus)):
            count = int(gpus / gpu)
            cpu = _floor(min(cpus_per_actor, share / max(count, wanting)))
            on_gpus = ModelShare(cpu, gpu, count, max(1, int(gpus / gpus_per_actor)))
        else:
            on_gpus = _on_cpus(wanting, share, share, cpus_per_actor)
        task = _floor(min(cpus_per_task, cpus / 4))
        ingest = _floor(min(cpus_per_task / 2, cpus / 8))
        return cls(
            ingest_cpu=ingest,
            ingests=max(1, int(cpus / 4 / ingest)),
            task_cpu=task,
            tasks=math.ceil(cpus / task) + 2,
            gpu_models=on_gpus,
            cpu_models=_on_cpus(max(cpu_models, 1), cpus, share, cpus_per_actor),
        )

    def models(self, device: str) -> ModelShare:
        """Return the share of the stages with this `device`."""
        return self.gpu_models if device == "gpu" else self.cpu_models


def _on_cpus(models: int, cpus: float, share: float, cpus_per_actor: float) -> ModelShare:
    """Let `models` stages have as many actors as fit on `cpus` CPUs, asking for no more than `share` of them in all."""
    each = max(1, int(cpus / models / max(cpus_per_actor, 0.1)))
    return ModelShare(_floor(min(cpus_per_actor, share / (each * models))), 0.0, each * models, each)


def _floor(value: float) -> float:
    """Round down to a hundredth (to whole numbers above one), so that n parts of 1/n always fit; Ray knows no finer."""
    if value >= 1:
        return float(math.floor(value))
    return max(math.floor(value * 100 + 1e-9) / 100, 0.01) if value > 0 else 0.0
