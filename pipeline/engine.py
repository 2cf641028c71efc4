"""The engine: a build's plan, carried out with Ray Core.

`build` is what the command line and the demo call. It may be killed at any moment: the same call goes on.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.corpus import Corpus
from pipeline.errors import RequestError
from pipeline.plan import Plan
from pipeline.progress import Progress, Snapshot
from pipeline.sources import Source
from pipeline.stages import Stage
from pipeline.summary import BuildSummary, Work, summarize

if TYPE_CHECKING:
    from pipeline.config import BuildConfig
    from pipeline.driver import Driver
    from pipeline.workers import Ingest

OBJECT_STORE = 100 << 20  # bytes: only names and small dictionaries travel

__all__ = ["BuildSummary", "Stopped", "build", "carry_out"]


class Stopped(KeyboardInterrupt):
    """A signal ended the build: what was committed stays, the same command goes on."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again and it goes on")
        self.signum = signum


def build(
    config: "BuildConfig",
    columns: Collection[str] | None = None,
    *,
    retry_failed: bool = False,
    max_attempts: int = 3,
    progress: Progress | None = None,
) -> BuildSummary:
    """Build a corpus, or go on with it: everything that the config asks for and that is not committed.

    Without anything to do it neither starts Ray nor reads a source. With `RAY_ADDRESS` in the environment it works on
    that cluster, otherwise on this machine alone; a cluster that it starts it also ends.

    Args:
        columns: make these alone (`images` stands for ingest); None makes all.
        retry_failed: take again what earlier builds set aside.
        max_attempts: tries that a shard or a unit gets before it is set aside.
        progress: called about four times a second with how far it is.

    Raises:
        RequestError: the corpus was made otherwise, a column is not in the config, a model cannot be loaded.
        Stopped: a signal came; what is committed stays.
    """
    from pipeline.sources import sources_of
    from pipeline.stages import declare, stages_of
    from pipeline.stages.ingest import ingest_unit

    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    declare(corpus, config)

    def ingest(corpus: Corpus, source: Source, unit: str, report: Callable[[dict[str, Any]], None]) -> Any:
        return ingest_unit(corpus, source, unit, config, report)

    return carry_out(
        corpus,
        sources_of(config),
        stages_of(config),
        ingest,
        columns,
        retry_failed=retry_failed,
        max_attempts=max_attempts,
        max_failures=config.max_failures,
        resources=config.resources.model_dump(include={"cpus_per_task", "cpus_per_actor", "gpus_per_actor"}),
        progress=progress,
    )


def carry_out(
    corpus: Corpus,
    sources: Sequence[Source],
    stages: Sequence[Stage],
    ingest: "Ingest",
    columns: Collection[str] | None = None,
    *,
    retry_failed: bool = False,
    max_attempts: int = 3,
    max_failures: float = 1.0,
    resources: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> BuildSummary:
    """`build` for any sources and stages whose columns are declared; arguments and errors are those of `build`."""
    began = time.monotonic()
    plan = Plan(corpus, {source.name: source.units() for source in sources}, stages, columns, retry_failed)
    names = [source.name for source in sources]
    work: dict[str, Work] = {}

    def say(note: str) -> None:
        if progress is not None:
            progress(Snapshot(time.monotonic() - began, [], [note]))

    if not plan.empty():
        read = {unit.source for unit in plan.units}
        with ExitStack() as stack:
            signals = stack.enter_context(_signals())
            for source in sources:
                if source.name in read:
                    say(f"source {source.name}: getting ready")
                    stack.enter_context(source.running())
            say("starting the workers")
            stack.enter_context(_cluster())  # ends before the sources do: no worker shall see them gone
            from pipeline.driver import Driver

            signals.driver = driver = Driver(corpus, plan, sources, ingest, max_attempts, resources or {}, progress)
            signals.install()  # ray.init put its own handlers there
            driver.run()
            work = driver.work
        if driver.stop is not None:
            raise Stopped(driver.stop)
    return summarize(corpus, plan, names, work, time.monotonic() - began, max_failures)


class _Signals:
    """What SIGINT and SIGTERM do: ask the driver to stop; before it runs, or the second time, end at once."""

    def __init__(self) -> None:
        self.driver: Driver | None = None

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.driver is None or self.driver.stop is not None:
            raise Stopped(signum)
        self.driver.stop = signum


@contextmanager
def _signals() -> Iterator[_Signals]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signals = _Signals()
    signals.install()
    try:
        yield signals
    finally:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)


@contextmanager
def _cluster() -> Iterator[None]:
    """A Ray cluster: the one that we are connected to, the one that RAY_ADDRESS names, or one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray itself will have it; silences its warning
    # a host that vanishes without a word is given up after two minutes, not seven; shorter, and long tasks are cut off:
    # Ray's servers take pings that come more often than every 60 s for an attack
    os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "90000")
    os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "30000")
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    # one thread a process: the engine, not OpenMP, spreads the work
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment, **local)
    except ConnectionError as error:
        raise RequestError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); "
            "start it, or unset RAY_ADDRESS to work on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
