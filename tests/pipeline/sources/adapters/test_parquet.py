"""The adapter `parquet`: rows of a table with images inside."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.config.sources import ParquetSource
from microdit.pipeline.sources import file_source as files
from microdit.pipeline.sources.adapters.parquet import Parquet
from tests.pipeline.helpers.dataset_archives import by_key, read_all

ROWS = [
    {"image": {"bytes": b"A", "path": None}, "id": "a", "text": " one\ntwo", "scores": {"clear": 9.0}, "tags": ["x"]},
    {"image": {"bytes": None, "path": "b.jpg"}, "id": "b", "text": None, "scores": None, "tags": None},
    {"image": None, "id": "c", "text": "three", "scores": {"clear": 1.0}, "tags": []},
    {"image": {"bytes": b"D" * 10, "path": ""}, "id": "d", "text": "four", "scores": {"clear": 2.0}, "tags": ["y"]},
]


def source(path: Path, **options: Any) -> Parquet:
    given = {"adapter": "parquet", "files": str(path), **options}
    return Parquet("mine", ParquetSource.model_validate(given), path.parent / "scratch")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet", row_group_size=2)
    return tmp_path / "t.parquet"


def test_rows_are_samples(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microdit.pipeline.sources.adapters.parquet.MAX_BYTES", 5)
    fields = {"clear": "scores.clear", "tags": "tags"}
    found = by_key(source(table, key="id", caption="text", fields=fields))
    assert {key: (item.data, item.caption, item.reason) for key, item in found.items()} == {
        "a": (b"A", "one two", None),
        "b": (None, "", "missing"),
        "c": (None, "three", "missing"),
        "d": (None, "four", "too_large"),
    }
    assert found["a"].fields == {"clear": 9.0, "tags": '["x"]'}
    assert found["a"].origin == "mine/t.parquet/a"
    assert files.MAX_BYTES > 1 << 20


def test_without_a_key_the_place_is_one_and_plain_bytes_are_an_image(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [b"1", b"2"], "n": [1, 2]}), tmp_path / "t.parquet")
    assert [(item.key, item.data) for item in read_all(source(tmp_path / "t.parquet"))] == [
        ("000000-000000", b"1"), ("000000-000001", b"2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": "alt"}, r"sources\.mine\.caption = 'alt': t\.parquet has no such column; it has image, id, text"),
        ({"fields": {"x": "scores.none"}}, r"sources\.mine\.fields\.x = 'scores\.none'"),
        ({"image": "picture"}, r"sources\.mine\.image = 'picture'"),
    ],
)
def test_a_wrong_column_is_one_message(table: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_all(source(table, **options))


def test_two_columns_of_bytes_are_one_too_many(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [b"1"], "mask": [b"2"]}), tmp_path / "t.parquet")
    with pytest.raises(RequestError, match=r"2 columns of t\.parquet hold bytes \(jpg, mask\); name the one"):
        read_all(source(tmp_path / "t.parquet"))
    assert read_all(source(tmp_path / "t.parquet", image="mask"))[0].data == b"2"


def test_what_comes_before_a_broken_place_counts(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = [{"image": bytes([n]) * 5000, "id": str(n)} for n in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, compression="zstd", use_dictionary=False)
    offset = pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    found = read_all(source(path, key="id"))
    assert [item.key for item in found[:40]] == [str(n) for n in range(40)]
    assert found[-1].reason == "damaged_archive" and 40 < len(found) <= 61
    (tmp_path / "none.parquet").write_bytes(b"no parquet")
    with pytest.raises(UnreadableError, match=r"mine/none\.parquet: nothing can be read behind row 0"):
        read_all(source(tmp_path / "none.parquet"))
