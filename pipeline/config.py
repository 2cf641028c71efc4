"""What a build is asked to do: YAML, checked by pydantic, with `key=value` overrides. Imports neither ray nor torch."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

import pipeline
from pipeline.caption_options import CaptionsColumn as CaptionsColumn
from pipeline.corpus import COLUMN, RESERVED, SOURCE
from pipeline.errors import RequestError
from pipeline.options import At, Options
from pipeline.score_options import SCORERS, AnyScores, CaptionScores, ClipScores, ScoresColumn, scorer_of
from pipeline.source_options import ADAPTERS, SourceOptions
from pipeline.source_options import FetchOptions as FetchOptions
from pipeline.source_options import OpenmojiSource as OpenmojiSource
from pipeline.source_options import UrlsSource as UrlsSource

HOME = Path(pipeline.__file__).parent.parent  # where `configs/` lies, in a checkout and in an installed wheel
MISSING = object()
PILLOW_MAX_PIXELS = 178_956_970  # above this Pillow itself refuses


# -- images ----------------------------------------------------------------------------------------------------------


class ImageOptions(Options):
    """What ingest takes and how it stores it; all of it is part of what a corpus is made by."""

    min_side: int = Field(default=256, ge=1)
    """An image whose short side has fewer pixels fails with `too_small`."""
    max_side: int | None = Field(default=512, ge=8)
    """A longer short side is reduced to this (bicubic, antialiased); null keeps every size."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=PILLOW_MAX_PIXELS)
    """Width times height, read before anything is decoded; more fails with `bomb`."""
    format: Literal["jpg", "png", "webp"] = "jpg"
    """The members of the images column. What came in this format is kept byte by byte unless it must be changed."""
    quality: int = Field(default=95, ge=1, le=100)
    """Of JPEG (4:4:4) and WebP, where an image must be encoded again."""

    @model_validator(mode="after")
    def _ordered(self) -> "ImageOptions":
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError(f"max_side ({self.max_side}) must be at least min_side ({self.min_side})")
        return self


# -- columns ---------------------------------------------------------------------------------------------------------


class LatentsColumn(Options):
    """`latents/<name>`."""

    autoencoder: str
    """A name of `model.autoencoder`, a folder, or a hub repository."""
    revision: str | None = None
    resolution: int = Field(ge=8, le=4096)
    posterior: Literal["sample", "mode", "moments"] = "sample"
    """A sample of the posterior, seeded by key and column; its mode; or its means and standard deviations, twice the
    channels, of which the trainer draws another sample each time."""


class TextColumn(Options):
    """`text/<name>@<captions>`: what is behind the @ is the captions column that it embeds."""

    encoder: str
    """A name of `model.text`, a folder, or a hub repository."""
    revision: str | None = None
    storage: Literal["float16", "int8", "int4"] = "float16"
    """int8: half the bytes, int4: a quarter, and some loss, which is measured on one sample in a hundred."""
    max_loss: float | None = Field(default=None, gt=0)
    """The relative error of a quantised sample above which the build stops; by default 0.03 (int8), 0.2 (int4)."""
    trim: bool = False
    """Of a CLIP text tower, which gives an embedding for the padding too, keep the real tokens alone. The released
    weights were trained on all 77, in float16."""

    @model_validator(mode="after")
    def _loses(self) -> "TextColumn":
        if self.max_loss is not None and self.storage == "float16":
            raise At(("max_loss",), "it is for storage int8 and int4: float16 is not quantised", self.max_loss)
        return self


ColumnOptions = CaptionsColumn | AnyScores | LatentsColumn | TextColumn
COLUMN_KINDS: dict[str, type[CaptionsColumn | ScoresColumn | LatentsColumn | TextColumn]] = {
    "captions": CaptionsColumn,
    "scores": ScoresColumn,
    "latents": LatentsColumn,
    "text": TextColumn,
}


class Resources(Options):
    """How the work is laid out on the machines. No part of any fingerprint."""

    cpus: float | None = Field(default=None, gt=0)
    """CPUs that the cluster may grow to, where an autoscaler adds nodes; by default those that it has."""
    gpus: float | None = Field(default=None, ge=0)
    """The same for GPUs. Without it a cluster that has none yet does the models' work on CPUs."""
    cpus_per_task: float = Field(default=1.0, gt=0)
    """CPUs that ingest and the cheap stages ask for."""
    cpus_per_actor: float = Field(default=1.0, ge=0)
    gpus_per_actor: float = Field(default=1.0, ge=0)
    """Of a stage that holds a model; not asked for where there is no GPU."""
    decode_threads: int = Field(default=2, ge=1, le=64)
    """Threads that decode images inside one task."""
    latents_batch: int = Field(default=32, ge=1)
    """Images per call of an autoencoder. Another value moves the last bits of the numbers, not more."""
    text_batch: int = Field(default=32, ge=1)
    """Captions per call of a text encoder; as above."""
    captions_batch: int = Field(default=16, ge=1)
    """Images per call of a captioner; as above, and what is said may turn on the last bits."""
    scores_batch: int = Field(default=32, ge=1)
    """Images per call of a scorer's model; as above."""
    stall_timeout: float = Field(default=600.0, gt=0)
    """Seconds without a finished sample after which a worker is taken for hung: more than the slowest batch needs."""
    scratch: str | None = None
    """A folder of each machine for the file that a worker reads from: room for the largest file of the sources, times
    the workers. By default `microdit-<user id>` in the system's folder for temporary files."""


class BuildConfig(Options):
    """A corpus to build: `configs/*.yaml`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    corpus: str
    """The root: a folder or `s3://bucket/prefix`."""
    shard_samples: int = Field(default=2048, ge=1, le=65536)
    max_failures: float = Field(default=0.1, ge=0, le=1)
    """The share of a column's inputs that may fail before the build ends with exit status 1."""
    sources: dict[str, SourceOptions] = Field(min_length=1)
    images: ImageOptions = ImageOptions()
    columns: dict[str, ColumnOptions] = Field(default={})
    resources: Resources = Resources()

    @field_validator("sources")
    @classmethod
    def _source_names(cls, sources: dict[str, Any]) -> dict[str, Any]:
        for name in sources:
            if not SOURCE.fullmatch(name):
                raise At((name,), "a source's name is lower-case letters, digits, - and _", name)
        return sources

    @field_validator("columns", mode="before")
    @classmethod
    def _columns_by_kind(cls, columns: Any) -> Any:
        """Each column is read as what the first part of its name says that it is."""
        if not isinstance(columns, dict):
            return columns
        found: dict[str, Any] = {}
        for name, value in columns.items():
            kind, _, rest = str(name).partition("/")
            if kind not in COLUMN_KINDS or not rest or not COLUMN.fullmatch(str(name)) or kind in RESERVED:
                known = ", ".join(f"{k}/..." for k in COLUMN_KINDS)
                raise At((str(name),), f"no such kind of column; expected one of {known}", name)
            options = SCORERS.get(scorer_of(str(name))) if kind == "scores" else COLUMN_KINDS[kind]
            if options is None:
                known = ", ".join(f"{kind}/{scorer}" for scorer in SCORERS)
                raise At((str(name),), f"no such scorer; expected one of {known}, with -NAME behind it or not", name)
            try:
                found[name] = options.model_validate({} if value is None else value)
            except ValidationError as error:
                where, expected, value = _fault(error.errors()[0])
                raise At((str(name), *where), expected, value) from None
        return found

    @model_validator(mode="after")
    def _inputs_exist(self) -> "BuildConfig":
        for name, options in self.columns.items():
            if isinstance(options, TextColumn):
                _, at, captions = name.partition("@")
                if not at or f"captions/{captions}" not in self.columns:
                    known = ", ".join(c.removeprefix("captions/") for c in self.columns if c.startswith("captions/"))
                    raise At(
                        ("columns", name),
                        f"the name must end in @ and one of the captions columns of this config ({known or 'none'})",
                        name,
                    )
            if isinstance(options, ClipScores | CaptionScores) and f"captions/{options.captions}" not in self.columns:
                known = ", ".join(c.removeprefix("captions/") for c in self.columns if c.startswith("captions/"))
                raise At(
                    ("columns", name, "captions"),
                    f"expected the name of one of the captions columns of this config ({known or 'none'})",
                    options.captions,
                )
        return self


# -- loading ---------------------------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's plain types only; a key given twice is an error, not the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def find_file(path: str | Path) -> Path:
    """The file itself, or, for a relative path that is not below the current folder, the one beside the package.

    Raises:
        RequestError: there is neither.
    """
    given = Path(path).expanduser()
    for candidate in (given, HOME / given):
        if candidate.is_file():
            return candidate
    also = "" if given.is_absolute() else f", nor in {HOME}"
    raise RequestError(f"config {path}: there is no such file{also}; give the path of a YAML file")


def load_yaml(path: str | Path, model_class: type[Model], overrides: Sequence[str] = ()) -> Model:
    """A YAML file as a pydantic model, after the overrides.

    Args:
        overrides: `key=value`; the key is dotted (`columns.latents/demo-64.resolution=32`, `stages.0.steps=10`), the
            value is YAML.

    Raises:
        RequestError: no such file, bad YAML, an override that fits nowhere, or a field is unknown, missing or wrong.
    """
    file = find_file(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise RequestError(f"config {path}: it cannot be read as YAML: {_yaml_fault(error)}") from None
    if not isinstance(tree, dict):
        raise RequestError(f"config {path}: expected `key: value` lines, found {_shown(tree)}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RequestError(f"override {_shown(override)}: expected key=value, as in shard_samples=64")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2026-99-99 is a ValueError
            raise RequestError(f"override {_shown(override)}: the value is no YAML: {_yaml_fault(error)}") from None
        try:
            _set(tree, key.strip(), value)
        except LookupError as error:
            raise RequestError(f"override {_shown(override)}: {error.args[0]}") from None
    try:
        return model_class.model_validate(tree)
    except ValidationError as error:
        lines = []
        for where, expected, value in map(_fault, error.errors()[:5]):
            lines.append(f"config {path}: {'.'.join(map(str, where)) or 'all of it'} = {_shown(value)}: {expected}")
        raise RequestError("\n".join(dict.fromkeys(lines))) from None


def load_config(path: str | Path, overrides: Sequence[str] = (), corpus: str | None = None) -> BuildConfig:
    """A build's config; `corpus` replaces the root that the file names. Raises `RequestError` as `load_yaml` does."""
    config = load_yaml(path, BuildConfig, overrides)
    return config if corpus is None else config.model_copy(update={"corpus": str(corpus)})


def _set(tree: Any, path: str, value: Any) -> None:
    """Set a dotted path; a key of the tree that has dots itself is found before the path is split."""
    if isinstance(tree, list):
        index, _, rest = path.partition(".")
        if not index.isdigit() or int(index) >= len(tree):
            raise LookupError(f"{index!r} is no place in a list of {len(tree)}; expected 0 to {len(tree) - 1}")
        if rest:
            _set(tree[int(index)], rest, value)
        else:
            tree[int(index)] = value
        return
    if not isinstance(tree, dict):
        raise LookupError(f"there is nothing below a plain value ({_shown(tree)}) to set {path!r} in")
    if path in tree or "." not in path:
        tree[path] = value
        return
    known = max((str(key) for key in tree if path.startswith(f"{key}.")), key=len, default=None)
    key = path.partition(".")[0] if known is None else known
    if tree.get(key) is None:
        tree[key] = {}
    _set(tree[key], path[len(key) + 1 :], value)


def _fault(error: ErrorDetails) -> tuple[list[str | int], str, Any]:
    """Where, what was expected, and what was found."""
    where, value = list(error["loc"]), error["input"]
    cause = error.get("ctx", {}).get("error")
    expected = error["msg"].removeprefix("Value error, ")
    if len(where) > 2 and where[0] == "sources":
        del where[2]  # the adapter, by which pydantic chose the model
    if isinstance(cause, At):
        where, value = [*where, *cause.where], cause.value
    elif error["type"] == "extra_forbidden":
        expected = "there is no such field; check the spelling"
    elif error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        where.append(error["ctx"]["discriminator"].strip("'"))
        value = value.get(where[-1], MISSING)
        expected = f"expected one of {error['ctx'].get('expected_tags', ', '.join(ADAPTERS))}"
    elif error["type"] == "missing":
        expected, value = "this field is required", MISSING
    return where, expected[:1].lower() + expected[1:], value


def _shown(value: Any) -> str:
    text = "nothing" if value is MISSING else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _yaml_fault(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
