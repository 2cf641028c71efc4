"""Sources whose files are added to, replaced and removed while a corpus is built."""

import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.attempt import commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare
from microdit.pipeline.stages.stage import UnitTask
from tests.pipeline.helpers.dataset_archives import picture, write_tar
from tests.servers.files_server import FilesServer, files_server

__all__ = ["files_server"]

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def tar(folder: Path, name: str, seed: int = 0) -> None:
    write_tar(folder / "in" / name, {f"{n}.jpg": picture(seed + n) for n in range(2)})


def build(
    folder: Path, grow: bool = False, stop_at: int | None = None, **options: Any
) -> tuple[list[str], list[str], list[str]]:
    """Read what can be read; return the origins, the units that could not be read, and the notes.

    Args:
        stop_at: the input at which reading breaks off.
    """
    config = BuildConfig.model_validate(
        {
            "name": "g", "corpus": str(folder / "corpus"), "images": {"min_side": 32},
            "sources": {"own": {"adapter": "webdataset", "files": str(folder / "in" / "*.tar")} | options},
        }
    )  # fmt: skip
    corpus = Corpus.create(config.corpus, "g", 4)
    [source] = sources_of(config)
    notes: list[str] = []
    declare(corpus, config, [source], [], notes.append, grow)
    if stop_at is not None:
        source.read = _stopping(source.read, stop_at)  # type: ignore[method-assign]
    bad = []
    with source.running(corpus, notes.append):
        for unit in source.units():
            try:
                ingest_unit(corpus, source, UnitTask(unit), config)
            except UnreadableError:
                bad.append(unit)
    commits = sorted(corpus.commits(IMAGES), key=lambda commit: commit.ref.shard)
    return [row["origin"] for commit in commits for row in corpus.sidecar(commit).to_pylist()], bad, notes


def _stopping(read: Callable[..., Iterator[Input]], stop_at: int) -> Callable[..., Generator[Input]]:
    def stopping(unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        for item in read(unit, wanted):
            if item.ordinal == stop_at:
                raise OSError("stopped")
            yield item

    return stopping


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


def test_what_is_committed_of_a_file_stays_when_it_is_gone_or_another(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        tar(tmp_path, name)
    origins = build(tmp_path)[0]
    (tmp_path / "in" / "a.tar").unlink()
    assert build(tmp_path) == (origins, [], [])
    write_tar(tmp_path / "in" / "b.tar", {"x.jpg": bytes(50_000)})
    for _ in range(2):  # the record of what was read stays, and so does the note
        found, bad, [note] = build(tmp_path)
        assert (found, bad) == (origins, [])
        assert re.search(r"1 files are others .*, such as b\.tar \(it had \d+ bytes, and has \d+\); what is comm", note)


def test_a_file_that_is_gone_before_it_was_read_is_set_aside_alone(tmp_path: Path) -> None:
    for n in range(3):
        tar(tmp_path, f"{n}.tar", n)
    (tmp_path / "in" / "1.tar").write_bytes(POINTER)
    origins, bad, _ = build(tmp_path)
    (tmp_path / "in" / "1.tar").unlink()
    assert build(tmp_path)[:2] == (origins, bad) == (origins, ["own-000001"])
    tar(tmp_path, "1.tar", 1)
    assert len(build(tmp_path)[0]) == len(origins) + 2


@pytest.mark.parametrize("keys", ["number", "member"])
@pytest.mark.parametrize("change", ["order", "cut", "bytes"])
def test_a_file_that_is_changed_between_two_runs_is_never_mixed(tmp_path: Path, keys: str, change: str) -> None:
    """Its first shard is committed; a file of the same names, or the same length, comes in its place."""
    pictures = {f"{n}.jpg": picture(n) for n in range(12)}
    write_tar(tmp_path / "in" / "a.tar", {**pictures, "x.jpg": b""})
    size = (tmp_path / "in" / "a.tar").stat().st_size
    options = {"keys": keys}
    with pytest.raises(OSError, match="stopped"):
        build(tmp_path, stop_at=12, **options)
    corpus = Corpus.open(tmp_path / "corpus")
    first = [f"own/a.tar/{n}.jpg" for n in range(4 * len(corpus.committed(IMAGES)))]
    assert first
    names = {"order": [*range(11, -1, -1)], "cut": [0, 1], "bytes": [*range(12)]}[change]
    others = {f"{n}.jpg": picture(n if change == "order" else n + 50) for n in names}
    write_tar(tmp_path / "in" / "a.tar", {**others, "x.jpg": b""})
    assert change != "order" or (tmp_path / "in" / "a.tar").stat().st_size == size
    assert build(tmp_path, **options)[:2] == (first, ["own-000000"])
    write_tar(tmp_path / "in" / "a.tar", {**pictures, "x.jpg": b""})
    assert build(tmp_path, **options)[:2] == (
        [*first, *(f"own/a.tar/{n}.jpg" for n in range(len(first), 12)), "own/a.tar/x.jpg"],
        [],
    )


@pytest.mark.parametrize("change", ["order", "cut"])
def test_a_file_of_a_web_server_that_is_changed_is_never_mixed(
    tmp_path: Path, files_server: FilesServer, change: str
) -> None:
    """Nobody asks the server how long its file is, or which version: the rows tell."""
    pictures = {f"{n}.jpg": picture(n) for n in range(13)}
    whole = write_tar(tmp_path / "whole.tar", pictures).read_bytes()
    options = {"files": files_server.add("a.tar", whole)}
    with pytest.raises(OSError, match="stopped"):
        build(tmp_path, stop_at=12, **options)
    first = [f"own/a.tar/{n}.jpg" for n in range(4 * len(Corpus.open(tmp_path / "corpus").committed(IMAGES)))]
    assert first
    names = [*range(12, -1, -1)] if change == "order" else [0, 1]
    others = {f"{n}.jpg": pictures[f"{n}.jpg"] for n in names}
    files_server.add("a.tar", write_tar(tmp_path / "other.tar", others).read_bytes())
    assert build(tmp_path, **options)[:2] == (first, ["own-000000"])
    files_server.add("a.tar", whole)
    assert build(tmp_path, **options)[:2] == ([f"own/a.tar/{n}.jpg" for n in range(13)], [])


def test_a_list_goes_on_with_the_lines_that_it_had(tmp_path: Path) -> None:
    lines = [f"http://127.0.0.1:9/{n}.jpg\t{n}\n" for n in range(7)]
    path = tmp_path / "list.tsv"
    config = BuildConfig.model_validate(
        {
            "name": "g", "corpus": str(tmp_path / "corpus"),
            "sources": {"own": {"adapter": "urls", "list": str(path), "unit_inputs": 3}},
        }
    )  # fmt: skip
    corpus = Corpus.create(config.corpus, "g", 4)

    def units(count: int, grow: bool = False) -> tuple[int, list[str]]:
        path.write_text("".join(lines[:count]))
        [source] = sources_of(config)
        notes: list[str] = []
        declare(corpus, config, [source], [], notes.append, grow)
        return sum(len(list(source.read(unit, lambda ordinal: False))) for unit in source.units()), notes

    assert units(5) == (5, [])
    commit_unit(corpus, "own", "own-000000", 0, [])  # something of it is there
    assert units(5) == (5, [])
    assert units(7) == (5, ["source own: 2 lines were added to its list, and are left out"])
    with pytest.raises(RequestError, match=r"own\.list = .*2 lines were added; a list does not grow.*another source"):
        units(7, grow=True)
    assert units(7) == (5, ["source own: 2 lines were added to its list, and are left out"])  # without, as it says
    path.write_text("".join(lines[:5]))
    (tmp_path / "more.tsv").write_text("".join(lines[5:]))
    options = {name: {"adapter": "urls", "list": str(tmp_path / f"{name}.tsv")} for name in ("list", "more")}
    sources = {"own": options["list"] | {"unit_inputs": 3}, "more": options["more"]}
    moved = BuildConfig.model_validate({"name": "g", "corpus": str(tmp_path / "corpus"), "sources": sources})
    for _ in range(2):
        made, notes = sources_of(moved), list[str]()
        declare(corpus, moved, made, [], notes.append, grow=True)
        origins = [item.origin for one in made for unit in one.units() for item in one.read(unit, lambda _: False)]
        assert origins == [line.partition("\t")[0] for line in lines] and notes == []
    lines[0] = "http://127.0.0.1:9/other.jpg\tother\n"
    for count in (4, 5, 7):
        with pytest.raises(RequestError, match=r"own\.list = .*another list than that of 5 inputs.*new name"):
            units(count)
