"""Sources whose files are added to, replaced and removed while a corpus is built."""

from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare
from microdit.pipeline.stages.stage import UnitTask
from tests.pipeline.helpers.dataset_archives import picture, write_tar

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def tar(folder: Path, name: str, seed: int = 0) -> None:
    write_tar(folder / "in" / name, {f"{n}.jpg": picture(seed + n) for n in range(2)})


def build(folder: Path, grow: bool = False) -> tuple[list[str], list[str], list[str]]:
    """Read what can be read; return the origins, the units that could not be read, and the notes."""
    config = BuildConfig.model_validate(
        {
            "name": "g", "corpus": str(folder / "corpus"), "images": {"min_side": 32},
            "sources": {"own": {"adapter": "webdataset", "files": str(folder / "in" / "*.tar")}},
        }
    )  # fmt: skip
    corpus = Corpus.create(config.corpus, "g", 4)
    [source] = sources_of(config)
    notes: list[str] = []
    declare(corpus, config, [source], [], notes.append, grow)
    bad = []
    with source.running(corpus, notes.append):
        for unit in source.units():
            try:
                ingest_unit(corpus, source, UnitTask(unit), config)
            except UnreadableError:
                bad.append(unit)
    commits = sorted(corpus.commits(IMAGES), key=lambda commit: commit.ref.shard)
    return [row["origin"] for commit in commits for row in corpus.sidecar(commit).to_pylist()], bad, notes


def test_a_pointer_is_replaced_by_its_file(tmp_path: Path) -> None:
    for n in range(3):
        tar(tmp_path, f"{n}.tar", n)
    (tmp_path / "in" / "1.tar").write_bytes(POINTER)
    origins, bad, _ = build(tmp_path)
    assert bad == ["own-000001"] and origins == [f"own/{n}.tar/{i}.jpg" for n in (0, 2) for i in (0, 1)]
    tar(tmp_path, "1.tar")
    origins, bad, _ = build(tmp_path)
    assert bad == [] and origins == [f"own/{n}.tar/{i}.jpg" for n in (0, 1, 2) for i in (0, 1)]
    assert build(tmp_path)[:2] == (origins, [])
    assert len(list((tmp_path / "corpus" / "units").iterdir())) == 2


def test_new_files_are_new_units_when_told(tmp_path: Path) -> None:
    for name in ("b.tar", "d.tar"):
        tar(tmp_path, name)
    before = build(tmp_path)[0]
    tar(tmp_path, "a.tar", 5)  # in front of the others
    origins, _, notes = build(tmp_path)
    assert origins == before and "1 new files, such as a.tar, are left out; --grow takes them" in notes[0]
    origins, _, _ = build(tmp_path, grow=True)
    assert origins == [*before, "own/a.tar/0.jpg", "own/a.tar/1.jpg"]
    tar(tmp_path, "c.tar", 7)
    assert build(tmp_path)[0] == origins
    assert build(tmp_path, grow=True)[0] == [*origins, "own/c.tar/0.jpg", "own/c.tar/1.jpg"]


def test_a_file_that_was_read_may_be_gone_and_may_not_be_another(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        tar(tmp_path, name)
    origins = build(tmp_path)[0]
    (tmp_path / "in" / "a.tar").unlink()
    assert build(tmp_path)[0] == origins
    write_tar(tmp_path / "in" / "b.tar", {"x.jpg": bytes(50_000)})
    with pytest.raises(
        RequestError, match=r"sources\.own: b\.tar had \d+ bytes when it was read, and has \d+.*new name"
    ):
        build(tmp_path)
