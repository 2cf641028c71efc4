"""The request of an evaluation: what `microdit evaluate` takes as options, or as a YAML file (configs/evaluate/)."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.corpus_pictures import Subset
from microdit.pipeline.evaluation.evaluate import REFERENCE, EvaluationOptions
from microdit.pipeline.evaluation.named_files import cache_folder
from microdit.pipeline.evaluation.prompt_files import find_prompts


class EvaluationRequest(BaseModel):
    """An evaluation: of what, against what, by which metrics, and how pictures are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: list[str] = []
    """Sets of pictures and models; each has a column of the table."""
    source: str | None = None
    """Of a corpus that is measured the source, and the selection."""
    selection: str | None = None
    reference: str | None = None
    reference_source: str | None = None
    reference_selection: str | None = None
    training: str | None = None
    """The corpus that a model was trained on: captions that are prompts, and images near the reference are counted."""
    metrics: list[str] = Field(["kid-lite"], min_length=1)
    prompts: str | None = None
    limit: int | None = Field(None, ge=1)
    """Take the first so many prompts."""
    guidance: list[float] = []
    """Draw with each of these; without any, with the checkpoint's."""
    steps: int = Field(30, ge=1)
    sampler: str = "heun"
    seed: int = Field(0, ge=0)
    seeds: int = Field(1, ge=1)
    """Draw so many times, each with seeds of its own."""
    images_per_prompt: int = Field(1, ge=1)
    size: int | None = Field(None, ge=1)
    protocol: Literal["clean-fid", "pytorch-fid", "torch-fidelity"] = "clean-fid"
    models: dict[str, str] = {}
    device: str | None = None
    actors: int = Field(0, ge=0)
    """Draw with so many Ray actors; 0 is this process alone."""
    out: Path = Path("evaluation")

    def options(self) -> EvaluationOptions:
        """Build the options of the measuring; named lists of prompts are fetched.

        Raises:
            RequestError: a metric or model is not known, or there are no such prompts.
        """
        options = EvaluationOptions(
            self.metrics,
            self.protocol,
            self.models,
            self.size,
            self.device,
            self.out,
            None if self.prompts in (None, REFERENCE) else find_prompts(str(self.prompts)),
            Subset(self.source, self.selection),
            Subset(self.reference_source, self.reference_selection),
            cache_folder() / "features",
        )
        options.check()
        if not self.what:
            raise RequestError("there is nothing to evaluate: name a set of pictures, or a model")
        return options
