"""Sources on the hub whose repositories move on: a README, new files, another table."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.files import hub as hub_files
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import Task, UnitTask
from tests.pipeline.helpers.archives import made_tar
from tests.pipeline.helpers.dataset_archives import picture
from tests.pipeline.helpers.remote_files import REPO, hasty, scratch
from tests.servers.hub import Hub, hub

__all__ = ["hasty", "hub", "scratch"]

ROOT = f"hf://datasets/{REPO}"


def tar(seed: int) -> bytes:
    return made_tar({f"{seed}-{n}.jpg": picture(seed + n) for n in range(2)})


def table(*names: str, what: str = "told") -> bytes:
    buffer = io.BytesIO()
    keys = [f"{name}-{n}" for name in names for n in range(2)]
    pq.write_table(pa.table({"key": keys, "long": [f"{what} {key}" for key in keys]}), buffer)
    return buffer.getvalue()


def build(folder: Path, grow: bool = False, **options: Any) -> tuple[list[str], list[str]]:
    """Build a source of the hub's tars and a table with it; return `origin: field, caption` of the rows, and notes."""
    hub_files._list_cached.cache_clear()  # another build is another process
    join = {"file": f"{ROOT}/table.parquet", "key": "key", "fields": {"long": "long"}, "rows_of": "all"}
    source = {"adapter": "webdataset", "files": f"{ROOT}/*.tar", "keys": "member", "joins": [join]}
    config = BuildConfig.model_validate(
        {
            "name": "g", "corpus": str(folder / "corpus"), "images": {"min_side": 32},
            "sources": {"own": source | options},
            "columns": {"captions/long": {"join": f"{ROOT}/table.parquet", "by": "key", "column": "long"}},
            "resources": {"scratch": str(folder / "scratch")},
        }
    )  # fmt: skip
    corpus = Corpus.create(config.corpus, "g", 4)
    [source_], [stage] = sources_of(config), stages_of(config)
    notes: list[str] = []
    declare(corpus, config, [source_], [stage], notes.append, grow)
    with source_.running(corpus, lambda note: None):
        for unit in source_.units():
            ingest_unit(corpus, source_, UnitTask(unit), config)
    rows = []
    for commit in sorted(corpus.commits(IMAGES), key=lambda commit: commit.ref.shard):
        [made] = stage.run(corpus, Task(commit.ref, {"captions/long": 0}))
        for image, caption in zip(corpus.sidecar(commit).to_pylist(), corpus.sidecar(made).to_pylist(), strict=True):
            rows.append(f"{image['origin'].removeprefix(REPO)}: {image['fields']}, {caption['caption']}")
    return rows, [note for note in notes if "files" in note]


def row(tar: int, n: int, told: str = "told") -> str:
    return f'/{tar}.tar/{tar}-{n}.jpg: {{"long": "{told} {tar}-{n}"}}, {told} {tar}-{n}'


def test_a_commit_that_changes_no_file_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    files = {"2.tar": tar(2), "4.tar": tar(4), "table.parquet": table("2", "4"), "README.md": b"1"}
    hub.add(REPO, files, kind="datasets")
    right = [row(name, n) for name in (2, 4) for n in range(2)]
    assert build(tmp_path) == (right, [])
    hub.add(REPO, {**files, "README.md": b"2"}, kind="datasets")
    assert build(tmp_path) == (right, [])
    assert len(list((tmp_path / "corpus" / "units").iterdir())) == 1


def test_new_files_are_new_units_when_told_and_the_table_stays(hub: Hub, tmp_path: Path) -> None:
    """Joined is the table as it was, so that rows of one source are all described by the same."""
    files = {"2.tar": tar(2), "4.tar": tar(4), "table.parquet": table("2", "4", "3"), "README.md": b"1"}
    hub.add(REPO, files, kind="datasets")
    right, _ = build(tmp_path)
    hub.add(REPO, {**files, "3.tar": tar(3), "table.parquet": table("2", "4", "3", what="other")}, kind="datasets")
    rows, [note] = build(tmp_path)
    assert rows == right and "1 new files, such as 3.tar, are left out; --grow takes them" in note
    rows, [note] = build(tmp_path, grow=True)
    assert rows == [*right, row(3, 0), row(3, 1)] and "1 new files, the first is 3.tar" in note
    assert build(tmp_path) == (rows, [])


def test_a_file_that_was_replaced_or_removed_stays_as_it_was_read(hub: Hub, tmp_path: Path) -> None:
    files = {"2.tar": tar(2), "4.tar": tar(4), "table.parquet": table("2", "4"), "README.md": b"1"}
    hub.add(REPO, files, kind="datasets")
    right, _ = build(tmp_path)
    hub.add(REPO, {**files, "2.tar": tar(7)}, kind="datasets")
    rows, [note] = build(tmp_path)
    assert rows == right and "1 files are others than when they were read, such as 2.tar" in note
    del files["4.tar"]
    hub.add(REPO, files, kind="datasets")
    assert build(tmp_path) == (right, [])


def test_another_table_is_a_correction(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"2.tar": tar(2), "table.parquet": table("2")}, kind="datasets")
    hub.add("an/other", {"table.parquet": table("2", what="other")}, kind="datasets")
    right, _ = build(tmp_path)
    join = {"file": "hf://datasets/an/other/table.parquet", "key": "key", "fields": {"long": "long"}, "rows_of": "all"}
    rows, [note] = build(tmp_path, joins=[join])
    assert rows == right and "an/other" in note and "its captions are read again" in note
