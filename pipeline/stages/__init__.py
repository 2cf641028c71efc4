"""Stages: shard in, shard out. They import and run without Ray; those that hold a model import torch when they load."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.corpus import Attempt, Commit, Corpus, ShardRef, commit_name
from pipeline.images import BadImage
from pipeline.shards import read_tar
from pipeline.sources import sources_of

if TYPE_CHECKING:
    from pipeline.config import BuildConfig, CaptionsColumn

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


@dataclass(frozen=True)
class Task:
    """One shard for a stage."""

    ref: ShardRef
    columns: Mapping[str, int]
    """The columns to write, and the generation of each: 0, and in a repair what follows the highest one."""
    aside: Mapping[int, str] = field(default_factory=dict)
    """Rows that killed the processes that worked on them, and the reason: they fail with it, untouched."""
    rows: range | None = None
    """Work on these rows alone and commit nothing: so the row that kills is found."""


@dataclass(frozen=True)
class UnitTask:
    """One unit for ingest."""

    unit: str
    redo: Mapping[str, int] | None = None
    """In a repair the shards that are written again, and the generation of each; otherwise None."""
    generation: int = 0
    """Of the unit's own commit."""
    careful: bool = False
    """Decode in a process of its own: this unit killed the process that read it."""


class Stage(Protocol):
    """Makes one or several columns of a shard. Picklable, and cheap to make: models come with `load`.

    One that says `at_once = 2` may be run by two threads, each with a shard: then the driver has it so.
    """

    name: str
    columns: dict[str, ColumnSpec]

    @property
    def device(self) -> str | None:
        """Where its model works: `gpu`, on one where there is one; `cpu`, in any case. None: it holds no model."""

    def load(self) -> None:
        """Load the models, once per process."""

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        """Write just the columns that are asked for from the latest commits of their inputs; one commit each.

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


def fail_image(made: Iterable[Attempt], row: Row, error: Exception) -> None:
    """Record in all attempts why an image cannot be used: whatever is no `BadImage` is `damaged`."""
    bad = error if isinstance(error, BadImage) else BadImage("damaged", f"{type(error).__name__}: {error}")
    for attempt in made:
        attempt.fail(row.row, row.key, bad.reason, str(bad))


def latest(corpus: Corpus, column: str, ref: ShardRef) -> Commit:
    """The commit of the highest generation of a shard.

    Raises:
        FileNotFoundError: the shard is not committed.
        DamagedError: that commit cannot be understood.
    """
    generation = 0
    # a generation is always the one before plus one; what the lower ones say does not matter
    while corpus.store.exists(commit_name(column, ref.source, ref.shard, generation + 1)):
        generation += 1
    return corpus.commit(column, ref.source, ref.shard, generation)


def read_lines(corpus: Corpus, commit: Commit) -> Iterator[Row]:
    """All rows of a committed shard, in row order, without their members: the sidecar alone is read."""
    for line in corpus.sidecar(commit).to_pylist():
        yield Row(line["row"], line["key"], line["status"] == "ok", line, {})


def read_rows(corpus: Corpus, commit: Commit) -> Iterator[Row]:
    """All rows of a committed shard, in row order, the failed ones too; a tar is read as a stream.

    Raises:
        ValueError: the tar and the sidecar disagree.
    """
    if commit.object == commit.sidecar:
        yield from read_lines(corpus, commit)
        return
    with corpus.open_object(commit) as file:
        found = read_tar(file)
        for row in read_lines(corpus, commit):
            if not row.ok:
                yield row
                continue
            key, members = next(found, ("", {}))
            if key != row.key:
                raise ValueError(f"{commit.object.name}: row {row.row} is {row.key!r}, the tar has {key!r}")
            yield replace(row, members=members)


def attempts(stack: ExitStack, corpus: Corpus, task: Task, inputs: Iterable[Commit]) -> dict[str, Attempt]:
    """An attempt for each of a task's columns; what is not committed when the stack ends is dropped."""
    inputs = list(inputs)
    return {
        column: stack.enter_context(corpus.attempt(column, task.ref, inputs, generation))
        for column, generation in task.columns.items()
    }


def samples(rows: Iterable[Row], made: Mapping[str, Attempt], task: Task, column: str) -> Iterator[Row]:
    """The rows of the input `column` to work on; those that failed there, or are set aside, are failed in `made`."""
    for row in rows:
        if task.rows is not None and row.row not in task.rows:
            continue
        reason, detail = "", ""
        if not row.ok:
            reason, detail = "upstream", f"{column}: {row.scalars['reason']}: {row.scalars['detail'] or ''}"
        elif row.row in task.aside:
            reason = task.aside[row.row]
            detail = "the process that worked on this sample alone " + ("died" if reason == "crash" else "did not end")
        if not reason:
            yield row
        for attempt in made.values() if reason else ():
            attempt.fail(row.row, row.key, reason, detail)


def commit_all(made: Mapping[str, Attempt], task: Task, **timings: float) -> list[Commit]:
    """Commit what a task has made; nothing if it was only a trial of some rows."""
    return [attempt.commit(**timings) for attempt in made.values()] if task.rows is None else []


def image_bytes(members: dict[str, bytes]) -> bytes:
    """The image among the members of an images sample, whatever its format.

    Raises:
        BadImage: the sample came without one (docs/corpus.md, section 3.1).
    """
    for extension, data in members.items():
        if extension != "json":
            return data
    raise BadImage("no_picture", "the sample came with its latents, and has no picture")


def stages_of(config: "BuildConfig") -> list[Stage]:
    """The stages that make the columns of a config; one for all latents, which share the images' decode.

    Raises:
        RequestError: a join table or a model that is not there.
    """
    from pipeline.config import CaptionsColumn, LatentsColumn, TextColumn
    from pipeline.stages.latents import Latents
    from pipeline.stages.scorers import score_stages
    from pipeline.stages.text import Text

    stages: list[Stage] = []
    latents = {name: options for name, options in config.columns.items() if isinstance(options, LatentsColumn)}
    for name, options in config.columns.items():
        if isinstance(options, CaptionsColumn):
            stages += _captions(name, options, config)
        elif isinstance(options, TextColumn):
            stages.append(Text(name, options, config.resources.text_batch))
    stages += score_stages(config)
    if latents:
        stages.append(Latents(latents, config.images.max_pixels, config.resources))
    return stages


def _captions(name: str, options: "CaptionsColumn", config: "BuildConfig") -> list[Stage]:
    """The stage of a captions column; with the first of those that a model makes in one pass comes that of all."""
    from pipeline.config import CaptionsColumn
    from pipeline.stages.captions import Captions
    from pipeline.stages.endpoint import Endpoint
    from pipeline.stages.tags import Tags
    from pipeline.stages.vlm import Vlm, origin_of

    max_pixels, resources = config.images.max_pixels, config.resources
    if options.vlm is not None:
        asked = {n: o for n, o in config.columns.items() if isinstance(o, CaptionsColumn) and o.vlm is not None}
        same = {n: o for n, o in asked.items() if origin_of(o) == origin_of(options)}
        return [Vlm(same, max_pixels, resources)] if next(iter(same)) == name else []
    if options.endpoint is not None:
        return [Endpoint(name, options, max_pixels, resources)]
    if options.tags is not None:
        return [Tags(name, options, max_pixels, resources.decode_threads)]
    return [Captions(name, options, config)]


def declare(corpus: Corpus, config: "BuildConfig", say: Callable[[str], None] = lambda note: None) -> None:
    """Declare all sources and columns of a config, and put the tables that captions come from into the corpus.

    Raises:
        RequestError: one is there and was made otherwise; a list, table or model that is not there.
    """
    from pipeline.joins import build
    from pipeline.sources.remote import scratch_folder
    from pipeline.stages.captions import Captions
    from pipeline.stages.ingest import SCALARS, ingest_stage

    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    for source in sources_of(config):
        corpus.declare_source(source.name, {**source.stage(), "images": ingest_stage(config.images)})
    for stage in stages_of(config):
        if isinstance(stage, Captions) and stage.table is not None:
            build(corpus, stage.table, scratch_folder(config.resources.scratch), say)
        for name, spec in stage.columns.items():
            corpus.declare_column(name, spec.stage, spec.scalars)
