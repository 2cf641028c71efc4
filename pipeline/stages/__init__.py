"""Stages: shard in, shard out. They import and run without Ray; those that hold a model import torch when they load."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.corpus import Attempt, Commit, Corpus, ShardRef
from pipeline.shards import read_tar
from pipeline.sources import sources_of

if TYPE_CHECKING:
    from pipeline.config import BuildConfig

IMAGES = "images"


@dataclass(frozen=True)
class ColumnSpec:
    """What a column is made by and from."""

    stage: dict[str, Any]
    """What makes the numbers: name, version, options, models with their hashes (docs/corpus.md, section 5)."""
    scalars: dict[str, str] = field(default_factory=dict)
    """The sidecar's own columns, by type name."""
    inputs: tuple[str, ...] = ()
    """The columns that it is computed from."""


class Stage(Protocol):
    """Makes one or several columns of a shard. Picklable, and cheap to make: models come with `load`."""

    name: str
    columns: dict[str, ColumnSpec]
    device: str
    """`gpu`: it holds a model, and wants a GPU where there is one; `cpu`: it does not."""

    def load(self) -> None:
        """Load the models, once per process."""

    def run(self, corpus: Corpus, ref: ShardRef, columns: Sequence[str]) -> list[Commit]:
        """Write just these columns of a shard from the latest commits of their inputs; one commit each.

        Raises:
            FileNotFoundError: an input of the shard is not committed.
        """


@dataclass(frozen=True)
class Row:
    """One sample of a shard: its whole line of the sidecar, and its members (none in a table, or if it failed)."""

    row: int
    key: str
    ok: bool
    scalars: dict[str, Any]
    members: dict[str, bytes]


def latest(corpus: Corpus, column: str, ref: ShardRef) -> Commit:
    """The commit of the highest generation of a shard.

    Raises:
        FileNotFoundError: the shard is not committed.
    """
    commit = corpus.commit(column, ref.source, ref.shard, 0)
    while True:  # a generation is always the one before plus one
        try:
            commit = corpus.commit(column, ref.source, ref.shard, commit.generation + 1)
        except FileNotFoundError:
            return commit


def read_rows(corpus: Corpus, commit: Commit) -> Iterator[Row]:
    """All rows of a committed shard, in row order, the failed ones too; a tar is read as a stream.

    Raises:
        ValueError: the tar and the sidecar disagree.
    """
    lines = corpus.sidecar(commit).to_pylist()
    if commit.object == commit.sidecar:
        for line in lines:
            yield Row(line["row"], line["key"], line["status"] == "ok", line, {})
        return
    with corpus.open_object(commit) as file:
        samples = read_tar(file)
        for line in lines:
            members: dict[str, bytes] = {}
            if line["status"] == "ok":
                key, members = next(samples, ("", {}))
                if key != line["key"]:
                    raise ValueError(f"{commit.object.name}: row {line['row']} is {line['key']!r}, the tar has {key!r}")
            yield Row(line["row"], line["key"], line["status"] == "ok", line, members)


def attempts(
    stack: ExitStack, corpus: Corpus, ref: ShardRef, columns: Sequence[str], inputs: Sequence[Commit]
) -> dict[str, Attempt]:
    """An attempt for each of a stage's columns; what is not committed when the stack ends is dropped."""
    return {column: stack.enter_context(corpus.attempt(column, ref, inputs)) for column in columns}


def fail_upstream(attempts: dict[str, Attempt], line: dict[str, Any], column: str) -> None:
    """Fail a row, given as its line in the sidecar of the input `column`, because it failed there."""
    for attempt in attempts.values():
        attempt.fail(line["row"], line["key"], "upstream", f"{column}: {line['reason']}: {line['detail'] or ''}")


def image_bytes(members: dict[str, bytes]) -> bytes:
    """The image among the members of an images sample, whatever its format."""
    return next(data for extension, data in members.items() if extension != "json")


def stages_of(config: "BuildConfig") -> list[Stage]:
    """The stages that make the columns of a config; one for all resolutions of an autoencoder.

    Raises:
        RequestError: a join table or a model that is not there.
    """
    from pipeline.config import CaptionsColumn, LatentsColumn, ScoresColumn, TextColumn
    from pipeline.stages.captions import Captions
    from pipeline.stages.latents import Latents
    from pipeline.stages.scores import BasicScores
    from pipeline.stages.text import Text

    stages: list[Stage] = []
    by_autoencoder: dict[tuple[str, str | None], dict[str, LatentsColumn]] = {}
    for name, options in config.columns.items():
        if isinstance(options, CaptionsColumn):
            stages.append(Captions(name, options, config))
        elif isinstance(options, ScoresColumn):
            stages.append(BasicScores(name, config.images.max_pixels))
        elif isinstance(options, LatentsColumn):
            by_autoencoder.setdefault((options.autoencoder, options.revision), {})[name] = options
        elif isinstance(options, TextColumn):
            stages.append(Text(name, options, config.resources.text_batch))
    for columns in by_autoencoder.values():
        stages.append(Latents(columns, config.images.max_pixels, config.resources))
    return stages


def declare(corpus: Corpus, config: "BuildConfig") -> None:
    """Declare all sources and columns of a config.

    Raises:
        RequestError: one is there and was made otherwise; a list, table or model that is not there.
    """
    from pipeline.stages.ingest import SCALARS, ingest_stage

    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    for source in sources_of(config):
        corpus.declare_source(source.name, {**source.stage(), "images": ingest_stage(config.images)})
    for stage in stages_of(config):
        for name, spec in stage.columns.items():
            corpus.declare_column(name, spec.stage, spec.scalars)
