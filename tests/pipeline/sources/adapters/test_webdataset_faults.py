"""Tars with any names and faults: which members are samples, and which are failed rows with a reason."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.sources import WebdatasetSource
from microdit.pipeline.files.tars import Member
from microdit.pipeline.sources import neighbours
from microdit.pipeline.sources.adapters import webdataset as module
from microdit.pipeline.sources.adapters.webdataset import Webdataset
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.sources.source import Input
from tests.pipeline.helpers.dataset_archives import empty, ingested, picture, read_all, write_tar


def source(folder: Path, **options: Any) -> Webdataset:
    given = {"adapter": "webdataset", "files": str(folder / "*.tar"), **options}
    return Webdataset("own", WebdatasetSource.model_validate(given), folder)


def read(folder: Path, members: dict[str, bytes], **options: Any) -> list[Input]:
    write_tar(folder / "a.tar", members)
    return read_all(source(folder, **options))


def test_neighbours_with_one_name_are_a_sample(tmp_path: Path):
    members = {
        "./x/1.jpg": b"1", "./x/1.txt": b" one \n two", "./x/1.json": b"never parsed", "y/1.txt": b"other",
        "y/1.PNG": b"2", "y/2.jpg": b"3", "y/3.cls": b"no sample",
    }  # fmt: skip
    found = read(tmp_path, members)
    assert [(item.data, item.caption) for item in found] == [(b"1", "one two"), (b"2", "other"), (b"3", "")]
    assert [item.key for item in found] == ["000000-000000", "000000-000001", "000000-000002"]
    assert [item.origin for item in found] == ["own/a.tar/./x/1.jpg", "own/a.tar/y/1.PNG", "own/a.tar/y/2.jpg"]
    assert all(item.reason is None and item.fields == {} for item in found)


def test_captions_and_fields_of_json(tmp_path: Path):
    about = {
        "long": {"text": "A\nlong one"},
        "score": 0.5,
        "n": 3,
        "ok": False,
        "tags": ["é"],
        "no": None,
        "nan": float("nan"),
    }
    members = {"1.jpg": b"1", "1.json": json.dumps(about).encode(), "1.txt": b"short", "2.jpg": b"2"}
    fields = {name: f"json.{name}" for name in about} | {"deep": "json.long.text", "none": "json.n.x", "short": "txt"}
    first, second = read(tmp_path, members, caption="json.long.text", fields=fields)
    assert first.caption == "A long one"
    assert first.fields == {
        "long": '{"text": "A\\nlong one"}', "score": 0.5, "n": 3, "ok": False, "tags": '["é"]', "deep": "A\nlong one",
        "short": "short",
    }  # fmt: skip
    assert (second.caption, second.fields, second.reason) == ("", {}, None)
    assert [item.caption for item in read(tmp_path, members, caption="")] == ["", ""]


def test_which_image(tmp_path: Path):
    members = {"1.seg.png": b"seg", "1.png": b"png", "1.jpg": b"jpg", "2.v1.jpg": b"v1", "3.seg.png": b"seg3"}
    left = (None, "not_taken")
    found = read(tmp_path, members)
    assert [(item.data, item.reason) for item in found] == [(b"jpg", None), left, left, (b"v1", None), (b"seg3", None)]
    assert found[1].origin == "own/a.tar/1.seg.png" and "1.jpg is taken" in found[1].detail
    found = read(tmp_path, members, image=["Seg.png", "png"])
    assert [(item.data, item.reason) for item in found] == [(b"seg", None), left, (b"seg3", None)]


def test_what_cannot_be_a_sample_fails_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_JSON", 40)
    members = {
        "1.txt": b"alone", "2.json": b"{}", "3.jpg": b"3", "3.json": b"{broken", "4.jpg": b"4", "4.json": b"[1]",
        "5.jpg": b"5", "5.json": b"[" * 39, "6.jpg": b"6", "6.json": b'{"c": "' + b"x" * 40 + b'"}',
        "7.jpg": b"7", "7.json": b'{"c": "good"}',
    }  # fmt: skip
    found = by_key_of(read(tmp_path, members, caption="json.c", keys="member"))
    assert {key: item.reason for key, item in found.items()} == {
        "1": "missing", "2": "missing", "3": "damaged_json", "4": "damaged_json", "5": "damaged_json", "6": "too_large",
        "7": None,
    }  # fmt: skip
    assert all(item.data is None for item in found.values() if item.reason)
    assert found["1"].detail.startswith("it has no image (jpg or") and found["1"].detail.endswith("but txt")
    assert found["4"].detail == "its json is no object: b'[1]'"
    assert found["7"].caption == "good"


def by_key_of(found: list[Input]) -> dict[str, Input]:
    assert len({item.key for item in found}) == len(found)
    return {item.key: item for item in found}


def test_a_text_that_cannot_be_read_fails_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    first, second = read(tmp_path, {"1.jpg": b"1", "1.txt": b"x" * 11, "2.jpg": b"x" * 11, "2.txt": b"two"})
    assert (first.reason, first.origin) == ("too_large", "own/a.tar/1.txt")
    assert (second.reason, second.origin) == ("too_large", "own/a.tar/2.jpg")


def test_a_member_twice_is_another_sample(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for data in (b"1", b"2"):
            info = tarfile.TarInfo("1.jpg")
            info.size = 1
            tar.addfile(info, io.BytesIO(data))
    assert [item.data for item in read_all(source(tmp_path))] == [b"1", b"2"]
    found = read_all(source(tmp_path, keys="member"))
    assert [(item.data, item.reason) for item in found] == [(b"1", None), (None, "duplicate_key")]


def test_members_of_one_name_without_end_are_not_held(tmp_path: Path):
    found = read(tmp_path, {f"1.{n}.jpg": b"x" for n in range(2 * neighbours.MAX_MEMBERS + 1)})
    assert len(found) == 2 * neighbours.MAX_MEMBERS + 1 and all(item.data == b"x" for item in found)
    groups = neighbours.neighbours(Member(f"1.{n}.jpg", b"x") for n in range(1000))
    assert max(len(group.members) for group in groups) <= 2 * neighbours.MAX_MEMBERS


LETTERS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(st.lists(st.tuples(LETTERS, st.sampled_from(["jpg", "PNG", "txt", "json", "a.webp", "cls"])), max_size=12),
       st.sampled_from(["number", "member"]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_names(tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, str]], keys: str):
    folder = tmp_path_factory.mktemp("names")
    members = {f"{name.rstrip('/')}.{extension}": b"{}" for name, extension in names}
    stems = {name.rstrip("/").rpartition("/")[2] for name, extension in names if extension != "cls"}
    try:
        found = read(folder, members, caption="json.c", keys=keys)
    except UnreadableError as error:
        assert "none of its members has a known extension" in str(error)
        assert members and all("." in stem or not stem for stem in stems)  # "0..txt" has the extension ".txt"
        return
    assert not members or not all(extension == "cls" for _, extension in names)
    by_key_of(found)
    for item in found:
        assert 1 <= len(item.key) <= 80 and item.key.isascii() and "/" not in item.key and "." not in item.key
        assert (item.data is None) == (item.reason in ("missing", "duplicate_key", "not_taken", "not_side_by_side"))
    assert [item.ordinal for item in found] == list(range(len(found)))
    if all(extension in ("jpg", "PNG") for _, extension in names) and keys == "number":
        assert sum(item.data is not None for item in found) <= len(members)


def test_joins_by_key_and_by_origin(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"x/1.jpg": b"1", "x/2.jpg": b"2"})
    table = str(empty(tmp_path / "t.jsonl"))
    joins = [
        {"file": table, "key": "id", "fields": {"long": "text", "score": "s"}},
        {"file": table, "key": "id", "fields": {"short": "text"}, "by": "origin"},
    ]
    given = source(tmp_path, joins=joins)
    assert [(spec.reader, spec.key, spec.fields) for spec in given.tables()] == [
        ("jsonl", "id", {"long": "text", "score": "s"}), ("jsonl", "id", {"short": "text"}),
    ]  # fmt: skip
    first, second = read_all(given, {"1": {"long": "L", "score": None}}, {"x/2.jpg": {"short": "S"}})
    assert (first.fields, second.fields) == ({"long": "L"}, {"short": "S"})
    assert given.stage()["joins"] == ["key", "origin"] and len(given.stage()["tables"]) == 2


def test_a_table_of_another_kind_is_refused(tmp_path: Path):
    empty(tmp_path / "t.tar")
    join = {"file": str(empty(tmp_path / "t.xlsx")), "key": "id", "fields": {"a": "b"}}
    with pytest.raises(RequestError, match=r"sources\.own\.joins\.0\.file = .*expected \.parquet.*found t\.xlsx"):
        source(tmp_path, joins=[join]).tables()


@pytest.mark.parametrize(
    "options",
    [
        {"caption": "te..xt"}, {"caption": "json"}, {"caption": "a.json"}, {"caption": "json."},
        {"caption": "json.a..b"}, {"image": [".jpg"]}, {"image": [""]}, {"fields": {"a": "cls."}},
        {"fields": {"a": "txt"}, "joins": [{"file": "t.jsonl", "key": "k", "fields": {"a": "b"}}]},
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], tmp_path: Path):
    with pytest.raises(pydantic.ValidationError):
        source(tmp_path, **options)


def test_a_whole_build(tmp_path: Path):
    members: dict[str, bytes] = {}
    for n in range(5):
        members |= {f"{n}.jpg": picture(n), f"{n}.txt": f"number {n}".encode()}
    members |= {"3.jpg": b"broken", "4.txt": b""}
    write_tar(tmp_path / "in" / "a.tar", members)
    write_tar(tmp_path / "in" / "b.tar", {"7.txt": b"alone", "8.jpg": picture(8), "8.txt": b"number 8"}, "w:gz")
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps({"id": str(n), "text": f"long {n}"}) + "\n" for n in (8, 0, 9)))
    join = {"file": str(table), "key": "id", "fields": {"long": "text"}}
    options = {"adapter": "webdataset", "files": str(tmp_path / "in" / "*.tar"), "keys": "member", "joins": [join]}
    images, captions = ingested(tmp_path, options)
    assert [(row["key"], row["reason"]) for row in images] == [
        ("0", None), ("1", None), ("2", None), ("3", "not_an_image"), ("4", None), ("7", "missing"), ("8", None),
    ]  # fmt: skip
    assert {row["key"]: row["fields"] for row in images if row["fields"]} == {
        "0": '{"long": "long 0"}', "8": '{"long": "long 8"}',
    }  # fmt: skip
    said = {row["key"]: row["caption"] or row["reason"] for row in captions}
    assert said["0"] == "number 0" and said["8"] == "number 8" and said["4"] == "no_caption"


def test_it_is_a_source_of_a_config(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.jpg": b"1"})
    sources = {"own": {"adapter": "webdataset", "files": str(tmp_path / "*.tar"), "license": "mine"}}
    config = BuildConfig.model_validate({"name": "x", "corpus": str(tmp_path / "c"), "sources": sources})
    (made,) = sources_of(config)
    assert isinstance(made, Webdataset) and made.terms == "mine" and made.units() == ["own-000000"]
