"""Number the models that actors of a build hold: of each stage one, then those of sources."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from microdit.pipeline.corpus.retry_units import base_of
from microdit.pipeline.engine import workers
from microdit.pipeline.engine.plan import Plan, UnitJob
from microdit.pipeline.sources.source import ModelSource, Source, holds_models
from microdit.pipeline.stages.stage import Stage


@dataclass(frozen=True)
class ModelHolder:
    """A model that actors hold, and what they are made from.

    `device` is None for a stage without a model, which has no actors. `at_once` are the jobs that a process works on at
    once, in threads.
    """

    name: str
    device: str | None
    at_once: int
    actor: type[Any]
    refs: list[Any]


def stage_holder(stage: Stage, refs: list[Any]) -> ModelHolder:
    """Return the holder of a stage's model."""
    at_once = getattr(stage, "at_once", 1)
    return ModelHolder(f"stage {stage.name}", stage.device, at_once, workers.StageActor, refs)


class SourceModels:
    """The models of a build's sources.

    Args:
        first: the number of the first one.
    """

    def __init__(self, sources: Sequence[Source], first: int):
        self._sources: dict[str, tuple[int, ModelSource]] = {}
        for source in sources:
            if holds_models(source):
                self._sources[source.name] = first, source
                first += len(source.models())

    def holders(self, refs: dict[str, list[Any]]) -> Iterator[ModelHolder]:
        """Yield the holders in the order of their numbers.

        Args:
            refs: by source the objects in Ray that reading it needs.
        """
        for name, (_, source) in self._sources.items():
            for number, model in enumerate(source.models()):
                label, at_once = f"source {name}, model {model}", getattr(source, "at_once", 1)
                yield ModelHolder(label, source.device, at_once, workers.SourceActor, [*refs[name], ray.put(number)])

    def holder_of(self, unit: UnitJob) -> int | None:
        """Return the number of the model that a unit needs; None if it needs none."""
        if unit.source not in self._sources:
            return None
        first, source = self._sources[unit.source]
        return first + source.model_of(base_of(unit.unit))

    def waiting(self, plan: Plan, holder: int) -> int:
        """Count the units that wait for a model."""
        return sum(self.holder_of(unit) == holder for unit in plan.units) if self._sources else 0
