"""The block `evaluate` of a recipe: what is measured on the way."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

DISTANCES = ("fid", "kid", "prdc", "clip-fid", "fd-dinov2", "cmmd", "fid-lite", "kid-lite")
"""The metrics that compare pictures with pictures (`microdit.pipeline.evaluation.metrics`)."""


class EvaluateRecipe(BaseModel):
    """Metrics to measure during training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(gt=0, description="Steps between two evaluations; there is one at the end too.")
    metrics: list[str] = Field(["kid-lite"], min_length=1)
    """Names of `microdit evaluate` that compare with pictures; by the first one the best checkpoint is told."""
    images: int = Field(256, gt=0)
    """Pictures that are drawn, of held-out captions; fewer if `hold_out` is less."""
    reference: int = Field(1024, gt=0)
    """Real images of the corpus that they are compared with, drawn by the recipe's seed."""
    steps: int = Field(18, gt=0, description="Steps of the sampler.")
    guidance_scale: float | None = Field(None, ge=0, description="Without it the recipe's.")
    models: dict[str, str] = {}
    """Weights of features, e.g. {inception: inception.pth}."""
    keep_best: bool = True
    """Save a checkpoint whenever the first metric is the best so far, and keep that one beside the newest."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if unknown := [name for name in names if name not in DISTANCES]:
            raise ValueError(f"metric {unknown[0]!r} compares with no pictures; there are {', '.join(DISTANCES)}")
        return names
