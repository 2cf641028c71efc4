"""One build of a source without the driver, after earlier ones with other options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.retry_units import list_retry_units, retry_names
from microdit.pipeline.engine.failed_rows import make_again
from microdit.pipeline.engine.plan import Plan
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.captions.correct import correct
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import Task, UnitTask


class CorrectedBuild:
    """Images, and the captions that the plan asks for.

    Args:
        read: False declares alone.
        retry_rows: as the build's `--retry-rows`.
    """

    def __init__(
        self,
        folder: Path,
        source: dict[str, Any],
        columns: dict[str, Any],
        grow: bool = False,
        read: bool = True,
        retry_rows: Sequence[str] = (),
    ):
        config = BuildConfig.model_validate(
            {
                "name": "c", "corpus": str(folder / "corpus"), "shard_samples": 4, "images": {"min_side": 32},
                "sources": {"own": source}, "columns": columns,
            }
        )  # fmt: skip
        self.corpus, self.notes = Corpus.create(config.corpus, "c", 4), list[str]()
        sources, stages = sources_of(config), stages_of(config)
        declare(self.corpus, config, sources, stages, self.notes.append, grow)
        self.readers, redo = correct(self.corpus, sources, stages, None, folder / "scratch")
        if retry_rows:
            made = [IMAGES, *columns]
            rows = make_again(self.corpus, sources, made, False, retry_rows, redo, self.notes.append)
            redo = {column: redo.get(column, set()) | rows.get(column, set()) for column in columns}
        units = [*sources[0].units(), *retry_names(list_retry_units(self.corpus).get("own", {}))]
        plan = Plan(self.corpus, {"own": units}, stages, redo=redo)
        with sources[0].running(self.corpus, print):
            for unit in list(plan.units) if read else []:
                record = ingest_unit(self.corpus, sources[0], UnitTask(unit.unit, unit.redo), config)
                for shard in record.shards:
                    plan.committed("own", shard, IMAGES)
            for number, stage in enumerate(stages):
                while job := plan.take(number):
                    stage.run(self.corpus, Task(job.ref, job.columns))

    def captions(self, column: str = "captions/source") -> list[str]:
        rows = [row for commit in self.corpus.commits(column) for row in self.corpus.sidecar(commit).to_pylist()]
        return [row["caption"] or row["reason"] for row in rows]

    def by_key(self, column: str = "captions/source") -> dict[str, str]:
        """The good captions, by key."""
        rows = [row for commit in self.corpus.commits(column) for row in self.corpus.sidecar(commit).to_pylist()]
        return {row["key"]: row["caption"] for row in rows if row["status"] == "ok"}

    def images(self) -> dict[str, str]:
        return {commit.shard: commit.object.sha256 for commit in self.corpus.commits(IMAGES)}
