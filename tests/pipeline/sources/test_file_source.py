"""The base of file sources: choice of files, limits, keys, the declaration, unwanted samples."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import FileOptions
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import LONGEST_KEY, FileSample, FileSource
from microdit.pipeline.sources.source import Input
from tests.pipeline.helpers.dataset_archives import read_all


class Lines(FileSource):
    """Files of lines: a sample's key and, behind a space, its origin; `!` marks a failed one."""

    adapter = "lines"

    def __init__(self, folder: Path, **options: Any):
        super().__init__("own", FileOptions.model_validate(options), folder / "scratch")
        self._folder, self.closed = folder, 0

    def listing(self) -> Listing:
        return list_files(str(self._folder / "*.txt"), "sources.own.files")

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        try:
            for line in path.read_text().splitlines():
                key, _, origin = line.removeprefix("!").partition(" ")
                failed = line.startswith("!")
                yield FileSample(key, None if failed else line.encode(), "", origin, reason="bad" if failed else None)
        finally:
            self.closed += 1


def write(folder: Path, *sizes: int) -> None:
    for number, size in enumerate(sizes):
        (folder / f"part-{number}.txt").write_text("".join(f"k{number}-{i}\n" for i in range(size)))


def units(folder: Path, **options: Any) -> list[int]:
    return [int(unit.rpartition("-")[2]) for unit in Lines(folder, **options).units()]


def test_files_are_units_by_their_number_in_the_whole_listing(tmp_path: Path):
    write(tmp_path, *[1] * 12)
    assert units(tmp_path) == list(range(12))  # part-2 before part-10
    assert Lines(tmp_path).units()[0] == "own-000000"
    assert units(tmp_path, units=3) == [0, 1, 2]
    assert units(tmp_path, units=99) == list(range(12))
    assert units(tmp_path, units=["part-10.txt", "part-2.txt", "part-2.txt"]) == [2, 10]
    with pytest.raises(RequestError, match=r"units: there is no file 'part-12\.txt'; expected names of the 12 files"):
        units(tmp_path, units=["part-1.txt", "part-12.txt"])


def test_shuffle_is_an_order_that_more_files_do_not_change(tmp_path: Path):
    write(tmp_path, *[1] * 9)
    order = units(tmp_path, shuffle=1)
    assert sorted(order) == list(range(9)) and order != list(range(9)) and order != units(tmp_path, shuffle=2)
    assert units(tmp_path, shuffle=1, units=4) == order[:4]
    assert units(tmp_path, shuffle=1, units=[f"part-{n}.txt" for n in (5, 1, 7)]) == [
        n for n in order if n in (5, 1, 7)
    ]
    write(tmp_path, *[1] * 10)
    assert [n for n in units(tmp_path, shuffle=1) if n < 9] == order


def test_a_limit_is_shared_evenly(tmp_path: Path):
    write(tmp_path, 5, 5, 5)

    def counts(**options: Any) -> list[tuple[str, int]]:
        source = Lines(tmp_path, **options)
        return [(unit[-1], len(list(source.read(unit, lambda ordinal: True)))) for unit in source.units()]

    assert counts(limit=7) == [("0", 3), ("1", 2), ("2", 2)]
    assert counts(limit=2) == [("0", 1), ("1", 1)]  # a unit of nothing is none
    assert counts(limit=2, units=["part-2.txt"]) == [("2", 2)]
    assert counts(limit=99) == [("0", 5), ("1", 5), ("2", 5)]


def test_reading_stops_at_the_limit_and_closes_the_file(tmp_path: Path):
    write(tmp_path, 5)
    source = Lines(tmp_path, limit=2)
    assert [item.key for item in read_all(source)] == ["k0-0", "k0-1"] and source.closed == 1
    reading = source.read("own-000000", lambda ordinal: True)
    next(reading)
    reading.close()
    assert source.closed == 2


def test_the_declaration(tmp_path: Path):
    write(tmp_path, 1, 1)
    stage = Lines(tmp_path, license="mine").stage()
    assert stage["adapter"] == "lines" and stage["license"] == "mine" and stage["files"]
    # a wider try goes on from a smaller one; a limit is another thing
    assert Lines(tmp_path, license="mine", units=1, shuffle=3).stage() == stage
    assert Lines(tmp_path, license="mine", units=1, limit=3).stage() == stage | {
        "limit": 3,
        "units": 1,
        "shuffle": None,
    }
    write(tmp_path, 1, 2)
    assert Lines(tmp_path, license="mine").stage()["files"] != stage["files"]


def test_what_is_not_wanted_has_no_bytes_but_all_else(tmp_path: Path):
    (tmp_path / "part-0.txt").write_text("a x/a\n!b x/b\nc http://host/c\n")
    found = list(Lines(tmp_path, license="mine").read("own-000000", lambda ordinal: ordinal == 2))
    hashes = [hashlib.sha256(line).hexdigest() for line in (b"a x/a", b"c http://host/c")]
    assert found == [
        Input(0, "a", None, "own/part-0.txt/x/a", license="mine", sha256=hashes[0]),
        Input(1, "b", None, "own/part-0.txt/x/b", license="mine", reason="bad"),
        Input(2, "c", b"c http://host/c", "http://host/c", license="mine", sha256=hashes[1]),
    ]


def test_a_key_that_is_there_twice_fails_and_is_told_apart(tmp_path: Path):
    (tmp_path / "part-0.txt").write_text("a\na\n!a\nb\n")
    found = read_all(Lines(tmp_path))
    assert [(item.key, item.reason) for item in found] == [
        ("a", None), ("a-000000-000001", "duplicate_key"), ("a-000000-000002", "bad"), ("b", None),
    ]  # fmt: skip
    assert found[1].detail == "'a' is there a second time in part-0.txt" and found[1].data is None


def test_names_that_become_the_same_key_are_both_taken(tmp_path: Path):
    (tmp_path / "part-0.txt").write_text("a/b\na.b\na_b\n" + "x" * 300 + "1\n" + "x" * 300 + "2\n")
    found = read_all(Lines(tmp_path))
    assert [item.reason for item in found] == [None] * 5
    assert found[0].key == "a_b" and len({item.key for item in found}) == 5
    assert max(len(item.key) for item in found) == LONGEST_KEY
    assert [item.key for item in read_all(Lines(tmp_path))] == [item.key for item in found]


@given(st.lists(st.text("aB/._-é ", max_size=4) | st.just("000000-000001"), max_size=20))
@settings(max_examples=60, deadline=None)
def test_keys_are_fit_and_none_is_twice(tmp_path_factory: pytest.TempPathFactory, names: list[str]):
    folder = tmp_path_factory.mktemp("keys")
    names = [name.partition(" ")[0] for name in names]
    (folder / "part-0.txt").write_text("".join(f"{name} x\n" for name in names))
    found = read_all(Lines(folder))
    keys = [item.key for item in found]
    assert len(set(keys)) == len(keys) == len(names)
    assert all(1 <= len(key) <= LONGEST_KEY and re.fullmatch("[A-Za-z0-9_-]+", key) for key in keys)
    taken = [name for item, name in zip(found, names, strict=True) if item.reason is None and name]
    assert len(taken) == len(set(taken))


def test_a_table_is_there_within_running_alone(tmp_path: Path):
    with pytest.raises(RuntimeError, match="source own is read outside of its running"):
        Lines(tmp_path).table(0)
