"""Real Parquet files: columns of all types, invalid values, damage, joins, a whole build."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.config.sources import ParquetSource
from microdit.pipeline.sources.adapters.parquet import Parquet
from tests.pipeline.helpers.dataset_archives import empty, ingested, picture, read_all


def source(folder: Path, **options: Any) -> Parquet:
    given = {"adapter": "parquet", "files": str(folder / "*.parquet"), **options}
    return Parquet("own", ParquetSource.model_validate(given), folder)


def write(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "t.parquet", **options)
    return folder / "t.parquet"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_columns_of_all_types(kind: pa.DataType, tmp_path: Path):
    columns = {
        "image": pa.array([{"bytes": b"1", "path": "x"}, {"bytes": b"", "path": "y"}],
                          pa.struct({"bytes": kind, "path": pa.string()})),
        "n": [0, 1],
        "when": [datetime(2020, 1, 2, tzinfo=UTC)] * 2,
        "nan": [float("nan"), 0.5],
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "with.dot": ["plain", ""],
        "deep": [{"a": {"b": [1, 2]}}, {"a": None}],
    }  # fmt: skip
    write(tmp_path, columns)
    fields = {"when": "when", "nan": "nan", "kind": "kind", "dot": "with.dot", "deep": "deep.a.b"}
    first, second = read_all(source(tmp_path, key="n", fields=fields))
    assert (first.key, first.data, first.origin) == ("0", b"1", "own/t.parquet/0")
    when = "2020-01-02 00:00:00+00:00"
    assert first.fields == {"when": when, "kind": "a", "dot": "plain", "deep": "[1, 2]"}
    assert (second.key, second.reason, second.fields) == ("1", "missing", {"when": when, "nan": 0.5, "kind": "b"})


def test_a_row_without_its_key_has_its_place(tmp_path: Path):
    write(tmp_path, {"jpg": [b"1", b"2", b"3"], "id": ["a", None, ""]})
    found = read_all(source(tmp_path, key="id"))
    assert [item.key for item in found] == ["a", "000000-000001", "000000-000002"]
    assert [item.origin for item in found] == ["own/t.parquet/a", "own/t.parquet/row-1", "own/t.parquet/row-2"]


def test_text_that_is_no_utf8_is_noted_in_its_row_alone(tmp_path: Path):
    text = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    write(tmp_path, {"jpg": [b"1", b"2", b"3"], "text": text})
    found = read_all(source(tmp_path, caption="text"))
    assert [(item.caption, item.reason) for item in found] == [("good", None), ("", None), ("fine", None)]
    assert "can't decode byte 0xff" in str(found[1].fields["not_text"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "n"}, r"image = 'n': that column of t\.parquet is of the type int64; expected bytes, or a struct"),
        ({"caption": "jpg"}, r"caption = 'jpg': that column of t\.parquet is of the type binary; expected text or a l"),
        ({"key": "deep"}, r"key = 'deep': that column .* expected text or numbers"),
        ({"caption": "alt"}, r"caption = 'alt': t\.parquet has no such column; it has jpg, n, deep\.a"),
    ],
)
def test_a_column_that_cannot_be_it_is_one_message(options: dict[str, Any], message: str, tmp_path: Path):
    write(tmp_path, {"jpg": [b"1"], "n": [1], "deep": [{"a": 1}]})
    with pytest.raises(RequestError, match=message):
        read_all(source(tmp_path, **options))


def test_without_any_column_of_bytes(tmp_path: Path):
    write(tmp_path, {"n": [1]})
    with pytest.raises(RequestError, match=r"image = null: 0 columns of t\.parquet hold bytes \(none of n\)"):
        read_all(source(tmp_path))


def test_any_damage_gives_rows_and_then_one_failed_row(tmp_path: Path):
    rows = 60
    columns = {"jpg": [bytes([n]) * 3000 for n in range(rows)], "text": [f"number {n}" for n in range(rows)]}
    path = write(tmp_path, columns, row_group_size=20, compression="snappy", use_dictionary=False)
    whole = path.read_bytes()
    for at in range(4, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes(60) + whole[at + 60 :])
        try:
            found = read_all(source(tmp_path, caption="text"))
        except UnreadableError as error:
            assert "nothing can be read behind row 0" in str(error)
            continue
        assert len(found) <= rows + 1
        assert [item.reason for item in found[:-1] if item.reason not in (None, "missing")] == []
        if len(found) != rows:
            assert found[-1].reason == "damaged_archive" and "behind row" in found[-1].detail
    for at in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at])
        with pytest.raises(UnreadableError, match=r"it is empty|nothing can be read behind row 0"):
            read_all(source(tmp_path))


def test_little_of_a_row_group_is_in_memory(tmp_path: Path):
    image = bytes(1 << 20)
    write(tmp_path, {"jpg": [image] * 96}, compression="none", use_dictionary=False, data_page_size=1 << 20,
          write_batch_size=1)  # fmt: skip
    before, most = pa.total_allocated_bytes(), 0
    for item in source(tmp_path).read("own-000000", lambda ordinal: True):
        assert item.data == image
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 32 << 20


def test_a_fault_of_a_joined_table_is_not_the_files(tmp_path: Path):
    class Broken(dict[str, Any]):
        def get(self, *_: Any) -> Any:
            raise pa.ArrowInvalid("the table is broken")

    write(tmp_path, {"jpg": [b"1"], "id": ["a"]})
    join = {"file": str(empty(tmp_path / "t.jsonl")), "key": "id", "fields": {"a": "b"}}
    with pytest.raises(pa.ArrowInvalid, match="the table is broken"):
        read_all(source(tmp_path, key="id", joins=[join]), Broken())


def test_joins(tmp_path: Path):
    write(tmp_path, {"jpg": [b"1", b"2"], "id": [7, 8]})
    table = str(empty(tmp_path / "t.jsonl"))
    by_key = {"file": table, "key": "id", "fields": {"long": "text"}}
    found = read_all(source(tmp_path, key="id", joins=[by_key]), {"7": {"long": "L"}})
    assert [item.fields for item in found] == [{"long": "L"}, {}]
    found = read_all(source(tmp_path, joins=[{**by_key, "by": "origin"}]), {"row-1": {"long": "L"}})
    assert [item.fields for item in found] == [{}, {"long": "L"}]
    with pytest.raises(pydantic.ValidationError, match="no key to look up"):
        source(tmp_path, joins=[by_key])


def test_a_whole_build(tmp_path: Path):
    images = [{"bytes": picture(n), "path": None} for n in range(6)]
    images[2], images[3] = {"bytes": b"broken", "path": None}, {"bytes": None, "path": None}
    columns = {"image": images, "id": [f"k{n}" for n in range(6)], "text": [f"number {n}" for n in range(5)] + [None]}
    write(tmp_path / "in", columns, row_group_size=4)
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"id": "k4", "text": "long 4"}) + "\n")
    join = {"file": str(table), "key": "id", "fields": {"long": "text"}}
    options = {"adapter": "parquet", "files": str(tmp_path / "in" / "*.parquet"), "key": "id", "caption": "text"}
    rows, captions = ingested(tmp_path, {**options, "joins": [join]})
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("k0", None), ("k1", None), ("k2", "not_an_image"), ("k3", "missing"), ("k4", None), ("k5", None),
    ]  # fmt: skip
    assert {row["key"]: row["fields"] for row in rows if row["fields"]} == {"k4": '{"long": "long 4"}'}
    said = {row["key"]: row["caption"] or row["reason"] for row in captions}
    assert (said["k0"], said["k4"], said["k5"]) == ("number 0", "number 4", "no_caption")
