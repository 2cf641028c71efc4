"""How the work is laid out on a cluster: what each kind of work asks for, and how much of it there may be at once."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Places:
    """A quarter of the CPUs is for ingest, half for models, the rest for the cheap stages.

    So each kind always finds a place, on one CPU too, and none can keep another waiting for ever. What is configured is
    the most that a task or an actor asks for.
    """

    ingest_cpu: float
    ingests: int
    """Units that are read at once."""
    task_cpu: float
    tasks: int
    """Shards of the cheap stages with Ray at once: what can run, and two more so that no CPU waits for the driver."""
    actor_cpu: float
    actor_gpu: float
    actors: int
    """Actors of all model stages together."""
    actors_per_stage: int

    @classmethod
    def on(
        cls,
        cpus: float,
        gpus: float,
        models: int,
        *,
        cpus_per_task: float = 1.0,
        cpus_per_actor: float = 1.0,
        gpus_per_actor: float = 1.0,
    ) -> "Places":
        """The layout for a cluster with so many CPUs and GPUs, and `models` stages that hold a model.

        With fewer GPUs than such stages each gets a share, so that they run side by side.
        """
        models = max(models, 1)
        half = cpus / 2
        gpu = _floor(min(gpus_per_actor, gpus / models if gpus < models else gpus))
        # without a GPU half of the CPUs is shared out evenly: on a small machine each model is loaded once
        each = max(1, int(gpus / gpus_per_actor) if gpu else int(half / models / max(cpus_per_actor, 0.1)))
        actors = int(gpus / gpu) if gpu else each * models
        task = _floor(min(cpus_per_task, cpus / 4))
        ingest = _floor(min(cpus_per_task / 2, cpus / 8))
        return cls(
            ingest_cpu=ingest,
            ingests=max(1, int(cpus / 4 / ingest)),
            task_cpu=task,
            tasks=math.ceil(cpus / task) + 2,
            actor_cpu=_floor(min(cpus_per_actor, half / max(actors, models))),
            actor_gpu=gpu,
            actors=actors,
            actors_per_stage=each,
        )


def _floor(value: float) -> float:
    """Down to a hundredth (whole above one), so that n parts of 1/n always fit; Ray knows no finer ones."""
    if value >= 1:
        return float(math.floor(value))
    return max(math.floor(value * 100 + 1e-9) / 100, 0.01) if value > 0 else 0.0
