"""Build a corpus: carry its plan out with Ray Core.

The command line and the demo call `build`. It may be killed at any moment: the same call goes on.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.progress import Progress, Snapshot
from microdit.pipeline.base.signals import Stopped, stop_signals
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS, ShardId
from microdit.pipeline.corpus.presence import presence
from microdit.pipeline.corpus.records import Commit, UnitCommit
from microdit.pipeline.corpus.retry_units import list_retry_units, retry_names
from microdit.pipeline.engine.failed_rows import fetches_rows, make_again
from microdit.pipeline.engine.plan import Plan, chosen_columns
from microdit.pipeline.engine.retries import Retries
from microdit.pipeline.engine.summary import BuildSummary, Work, summarize
from microdit.pipeline.files.scratch import scratch_folder
from microdit.pipeline.sources.committed import CommittedSource, unread_units
from microdit.pipeline.sources.registry import source_of
from microdit.pipeline.sources.source import Source
from microdit.pipeline.stages.captions.correct import correct
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import Stage, UnitTask

if TYPE_CHECKING:
    from microdit.pipeline.config.build import BuildConfig
    from microdit.pipeline.engine.gpus import GpuNodes
    from microdit.pipeline.engine.workers import Ingest


LAYOUT = {"cpus", "gpus", "cpus_per_task", "cpus_per_actor", "gpus_per_actor"}
"""The resources that the driver needs."""


def build(
    config: "BuildConfig",
    columns: Collection[str] | None = None,
    *,
    retry_failed: bool = False,
    retry_rows: Sequence[str] = (),
    repair: bool = False,
    grow: bool = False,
    max_attempts: int = 3,
    progress: Progress | None = None,
) -> BuildSummary:
    """Build everything that the config asks for and that is not committed.

    Without anything to do it neither starts Ray nor reads a source. It works on the cluster of `RAY_ADDRESS`, or on
    this machine alone; a cluster that it starts it also ends.

    Args:
        columns: make these alone (`images` stands for ingest), or all.
        retry_failed: try again what earlier builds set aside, and URLs that failed for a transient reason.
        retry_rows: make rows of any column again that failed for these reasons (`http_4xx`: all that begin so).
        repair: read all that is committed (`verify`), and make again what is damaged, lost or stale, and what follows.
        grow: take files that have been added to a source as new units.
        max_attempts: tries that a shard or a unit gets before it is set aside.
        progress: called about four times a second with a snapshot.

    Raises:
        RequestError: the corpus was made otherwise, a column is not in the config, a model cannot be loaded.
        Stopped: a signal came; what is committed stays.
    """
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    say = partial(_note, progress, time.monotonic())
    sources = [_open_source(config, corpus, name, columns is None or IMAGES in columns, say) for name in config.sources]
    stages = stages_of(config, corpus)
    declare(corpus, config, sources, stages, say, grow)

    def ingest(corpus: Corpus, source: Source, task: UnitTask, report: Callable[[Commit], None]) -> UnitCommit:
        return ingest_unit(corpus, source, task, config, report)

    readers, redo = correct(corpus, sources, stages, columns, scratch_folder(config.resources.scratch))
    with ExitStack() as stack:
        for source in readers:
            stack.enter_context(source.running(corpus, say))
        return carry_out(
            corpus,
            sources,
            stages,
            ingest,
            columns,
            retry_failed=retry_failed,
            retry_rows=retry_rows,
            repair=repair,
            redo=redo,
            max_attempts=max_attempts,
            max_failures=config.max_failures,
            resources=config.resources.model_dump(include=LAYOUT),
            stall_timeout=config.resources.stall_timeout,
            progress=progress,
        )


def _open_source(config: "BuildConfig", corpus: Corpus, name: str, reads: bool, say: Callable[[str], None]) -> Source:
    """Open a source; if it is gone and nothing of it is left to read, what is committed of it stands for it.

    Args:
        reads: units that are not committed are to be read.

    Raises:
        RequestError: the source cannot be used, and is needed.
    """
    source: Source | None = None
    try:
        source = source_of(config, name)
        source.stage()
        return source
    except RequestError as error:
        if name not in corpus.sources() or not corpus.committed(UNITS, name):
            raise
        if reads and (left := unread_units(corpus, name, source)):
            raise RequestError(
                f"{error}. {left:,} units of source {name} are not read yet. What is committed of it needs it no more: "
                "`--columns` with the columns to make, without images, works on that alone"
            ) from error
        say(f"source {name} cannot be used ({error}); what is committed of it is")
        return CommittedSource(corpus, name, error)


def carry_out(
    corpus: Corpus,
    sources: Sequence[Source],
    stages: Sequence[Stage],
    ingest: "Ingest",
    columns: Collection[str] | None = None,
    *,
    retry_failed: bool = False,
    retry_rows: Sequence[str] = (),
    repair: bool = False,
    redo: Mapping[str, Collection[ShardId]] | None = None,
    max_attempts: int = 3,
    max_failures: float = 1.0,
    resources: Mapping[str, float] | None = None,
    stall_timeout: float = 600.0,
    progress: Progress | None = None,
) -> BuildSummary:
    """Build with any sources and stages whose columns are declared; arguments and errors are those of `build`.

    Args:
        redo: shards to make again though they are committed, by column, beside those of a repair.
    """
    began = time.monotonic()
    names = [source.name for source in sources]
    work, left = dict[str, Work](), list[str]()
    gpus: GpuNodes | None = None
    note = partial(_note, progress, began)
    again = _joined_redo(redo or {}, _damage(corpus, note) if repair else {})
    plan = _plan(corpus, sources, stages, columns, retry_failed, retry_rows, again, note)
    if not plan.empty():
        with ExitStack() as stack:
            signals = stack.enter_context(stop_signals())
            _begin_sources(corpus, sources, {unit.source for unit in plan.units}, stack, note)
            note("starting the workers")
            from microdit.pipeline.engine.cluster import check_nodes, joined

            stack.enter_context(joined())  # ends before the sources do: no worker shall see them gone
            from microdit.pipeline.engine.board import Board
            from microdit.pipeline.engine.driver import Driver
            from microdit.pipeline.engine.failing_sources import FailingSources
            from microdit.pipeline.engine.workers import BuildContext

            board = Board([stage.name for stage in stages], progress)
            tries = Retries(max_attempts, corpus.shard_samples)
            context = BuildContext(corpus, stack.enter_context(presence(corpus)), stall_timeout)
            driver = Driver(plan, sources, ingest, tries, context, resources or {}, board, FailingSources(max_failures))
            signals.stop = driver.ask_to_stop
            signals.install()  # ray.init put its own handlers there
            check_nodes(context)
            driver.run()
            work, left, gpus = board.work, driver.left, driver.gpus
        if driver.stop is not None:
            raise Stopped(driver.stop)
    fetched = [source.name for source in sources if fetches_rows(source)]
    summary = summarize(corpus, plan, names, fetched, work, time.monotonic() - began, max_failures, left)
    if gpus is not None:
        summary.gpus, summary.gpus_left_out = gpus.count, gpus.left_out
    return summary


def _note(progress: Progress | None, began: float, text: str) -> None:
    """Report a line of text. began: of the build, on the monotonic clock."""
    if progress is not None:
        progress(Snapshot(time.monotonic() - began, [], [text]))


def _begin_sources(
    corpus: Corpus, sources: Sequence[Source], read: Collection[str], stack: ExitStack, note: Callable[[str], None]
) -> None:
    """Report the terms of all sources, and get those ready that are read, until the stack is closed."""
    for source in sources:
        note(f"source {source.name}: {source.terms}")
    for source in sources:
        if source.name in read:
            note(f"source {source.name}: getting ready")
            stack.enter_context(source.running(corpus, note))


def _joined_redo(*redos: Mapping[str, Collection[ShardId]]) -> dict[str, set[ShardId]]:
    joined: dict[str, set[ShardId]] = {}
    for redo in redos:
        for column, shards in redo.items():
            joined.setdefault(column, set()).update(shards)
    return joined


def _plan(
    corpus: Corpus,
    sources: Sequence[Source],
    stages: Sequence[Stage],
    columns: Collection[str] | None,
    retry_failed: bool,
    retry_rows: Sequence[str],
    redo: Mapping[str, Collection[ShardId]],
    note: Callable[[str], None],
) -> Plan:
    """Begin the retry units that are asked for, and list what is left to do."""
    rows: Mapping[str, Collection[ShardId]] = {}
    if retry_failed or retry_rows:
        chosen = chosen_columns(stages, columns)
        rows = make_again(corpus, sources, chosen, retry_failed, retry_rows, redo, note)
    retries = list_retry_units(corpus)
    units = {s.name: list(dict.fromkeys([*s.units(), *retry_names(retries.get(s.name, {}))])) for s in sources}
    return Plan(corpus, units, stages, columns, retry_failed, redo, rows, retry_rows)


def _damage(corpus: Corpus, say: Callable[[str], None]) -> Mapping[str, Collection[tuple[str, str]]]:
    from microdit.pipeline.upkeep.damage import damage

    say("repair: reading everything that is committed")
    found = damage(corpus)
    for problem in found.beyond:
        say(f"repair: beyond a build's power: {problem}")
    for column, places in found.redo.items():
        for source, shard in sorted(places):
            say(f"repair: {column}/{source}/{shard} is made again")
    return found.redo
