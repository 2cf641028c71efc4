"""The config of a build: `configs/*.yaml`, with `key=value` overrides. Imports neither ray nor torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from microdit.pipeline.config.block import FieldError, Options
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.config.presets import with_preset
from microdit.pipeline.config.scores import SCORERS, AnyScores, CaptionScores, ClipScores, ScoresColumn, scorer_of
from microdit.pipeline.config.sources import SourceOptions
from microdit.pipeline.config.yaml import fault_of, load_yaml
from microdit.pipeline.corpus.names import COLUMN, RESERVED, SOURCE

ColumnOptions = CaptionsColumn | AnyScores | LatentsColumn | TextColumn

COLUMN_KINDS: dict[str, type[CaptionsColumn | ScoresColumn | LatentsColumn | TextColumn]] = {
    "captions": CaptionsColumn,
    "scores": ScoresColumn,
    "latents": LatentsColumn,
    "text": TextColumn,
}


class Resources(Options):
    """The layout of the work on the machines. No part of any fingerprint."""

    cpus: float | None = Field(default=None, gt=0)
    """CPUs that the cluster may grow to, where an autoscaler adds nodes; by default those that it has."""
    gpus: float | None = Field(default=None, ge=0)
    """The same for GPUs. Without it a cluster that has none yet does the models' work on CPUs."""
    cpus_per_task: float = Field(default=1.0, gt=0)
    """CPUs that ingest and the cheap stages ask for."""
    cpus_per_actor: float = Field(default=1.0, ge=0)
    """CPUs of a stage that holds a model."""
    gpus_per_actor: float = Field(default=1.0, ge=0)
    """GPUs of a stage that holds a model; not asked for where there is no GPU."""
    decode_threads: int = Field(default=2, ge=1, le=64)
    """Threads that decode images inside one task."""
    latents_batch: int = Field(default=32, ge=1)
    """Images per call of an autoencoder. Another value moves the last bits of the numbers, not more."""
    text_batch: int = Field(default=32, ge=1)
    """Captions per call of a text encoder; as above."""
    captions_batch: int = Field(default=16, ge=1)
    """Images per call of a captioner; as above, and the last bits may change a caption."""
    scores_batch: int = Field(default=32, ge=1)
    """Images per call of a scorer's model; as above."""
    stall_timeout: float = Field(default=600.0, gt=0)
    """Seconds without a finished sample after which a worker counts as hung: more than the slowest batch takes."""
    scratch: str | None = None
    """A folder of each machine for the files that workers read from: it must hold the largest file of the sources once
    for each worker. By default `microdit-<user id>` in the system's folder for temporary files."""


class BuildConfig(Options):
    """A corpus to build."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The name of the corpus, in its `corpus.json` and in reports."""
    corpus: str
    """The root: a folder or `s3://bucket/prefix`."""
    shard_samples: int = Field(default=2048, ge=1, le=65536)
    """Inputs of a shard at most. It is fixed when the corpus is made."""
    max_failures: float = Field(default=0.1, ge=0, le=1)
    """The share of a column's inputs that may fail before the build ends with exit status 1; a source that exceeds it
    is told of while it is read."""
    sources: dict[str, SourceOptions] = Field(min_length=1)
    """Sources of images, by name: each block has an `adapter`."""
    images: ImageOptions = ImageOptions()
    """Limits of accepted images, and the format in which they are stored."""
    columns: dict[str, ColumnOptions] = Field(default={})
    """Columns to compute, by name: `captions/...`, `scores/...`, `latents/...` or `text/...`."""
    resources: Resources = Resources()
    """Layout of the work on the machines; it changes no result."""

    @field_validator("sources", mode="before")
    @classmethod
    def _apply_presets(cls, sources: Any) -> Any:
        """Replace the names of presets by the options of the published data sets."""
        if not isinstance(sources, dict):
            return sources
        return {name: with_preset(str(name), given) for name, given in sources.items()}

    @field_validator("sources")
    @classmethod
    def _check_source_names(cls, sources: dict[str, Any]) -> dict[str, Any]:
        for name in sources:
            if not SOURCE.fullmatch(name):
                raise FieldError((name,), "a source's name is lower-case letters, digits, - and _", name)
        return sources

    @field_validator("columns", mode="before")
    @classmethod
    def _read_columns(cls, columns: Any) -> Any:
        """Read each column as the kind that the first part of its name says."""
        if not isinstance(columns, dict):
            return columns
        read: dict[str, Any] = {}
        for name, value in columns.items():
            kind, _, rest = str(name).partition("/")
            if kind not in COLUMN_KINDS or not rest or not COLUMN.fullmatch(str(name)) or kind in RESERVED:
                known = ", ".join(f"{k}/..." for k in COLUMN_KINDS)
                raise FieldError((str(name),), f"no such kind of column; expected one of {known}", name)
            options = SCORERS.get(scorer_of(str(name))) if kind == "scores" else COLUMN_KINDS[kind]
            if options is None:
                known = ", ".join(f"{kind}/{scorer}" for scorer in SCORERS)
                raise FieldError(
                    (str(name),), f"no such scorer; expected one of {known}, with -NAME behind it or not", name
                )
            try:
                read[name] = options.model_validate({} if value is None else value)
            except ValidationError as error:
                fault = fault_of(error.errors()[0])
                raise FieldError((str(name), *fault.path), fault.expected, fault.value) from None
        return read

    @model_validator(mode="after")
    def _check_inputs(self) -> "BuildConfig":
        """Refuse columns whose captions column the config does not have."""
        for name, options in self.columns.items():
            if isinstance(options, TextColumn):
                _, at, captions = name.partition("@")
                if not at or f"captions/{captions}" not in self.columns:
                    known = ", ".join(c.removeprefix("captions/") for c in self.columns if c.startswith("captions/"))
                    raise FieldError(
                        ("columns", name),
                        f"the name must end in @ and one of the captions columns of this config ({known or 'none'})",
                        name,
                    )
            if isinstance(options, ClipScores | CaptionScores) and f"captions/{options.captions}" not in self.columns:
                known = ", ".join(c.removeprefix("captions/") for c in self.columns if c.startswith("captions/"))
                raise FieldError(
                    ("columns", name, "captions"),
                    f"expected the name of one of the captions columns of this config ({known or 'none'})",
                    options.captions,
                )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = (), corpus: str | None = None) -> BuildConfig:
    """Load a build's config; `corpus` replaces the root that the file names. Raises as `load_yaml` does."""
    config = load_yaml(path, BuildConfig, overrides)
    return config if corpus is None else config.model_copy(update={"corpus": str(corpus)})
