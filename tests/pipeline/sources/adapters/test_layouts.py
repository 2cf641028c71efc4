"""The adapters `folder`, `jsonl` and `tfrecord`, split archives, and captions that are chosen among several."""

import base64
import csv
import gzip
import json
import random
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.files.tfrecords import parse_example
from microdit.pipeline.sources.file_source import MAX_BYTES
from tests.pipeline.helpers.dataset_archives import ingested, picture, write_tar
from tests.servers.hub import Hub, hub

__all__ = ["hub"]


# -- writers ---------------------------------------------------------------------------------------------------------
def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def example_class() -> Any:
    """`tf.Example` as TensorFlow's own files describe it, in protobuf's own implementation."""
    file = descriptor_pb2.FileDescriptorProto(name="e.proto", package="tf", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        made = file.message_type.add(name=name)
        for field, number, kind, label, type_name in fields:
            made.field.add(name=field, number=number, type=kind, label=label, type_name=type_name or None)
        return made

    many, one = kinds.LABEL_REPEATED, kinds.LABEL_OPTIONAL
    message("BytesList", ("value", 1, kinds.TYPE_BYTES, many, ""))
    message("FloatList", ("value", 1, kinds.TYPE_FLOAT, many, ""))
    message("Int64List", ("value", 1, kinds.TYPE_INT64, many, ""))
    lists = [(f"{n}_list", i, kinds.TYPE_MESSAGE, one, f".tf.{k}List") for i, (n, k) in
             enumerate((("bytes", "Bytes"), ("float", "Float"), ("int64", "Int64")), 1)]  # fmt: skip
    feature = message("Feature", *lists)
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", ("feature", 1, kinds.TYPE_MESSAGE, many, ".tf.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=kinds.TYPE_MESSAGE, label=one, type_name=".tf.Feature")
    message("Example", ("features", 1, kinds.TYPE_MESSAGE, one, ".tf.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


EXAMPLE = example_class()


def example(**features: bytes | str | float | int | list[Any]) -> bytes:
    made = EXAMPLE()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        feature = made.features.feature[name]
        if values and isinstance(values[0], bytes | str):
            feature.bytes_list.value.extend(v.encode() if isinstance(v, str) else v for v in values)
        elif values and isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return bytes(made.SerializeToString())


def told(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The end of each origin, the caption or the reason, and the reason's detail."""
    return [(row["origin"].rpartition("/")[2], row["reason"] or row["caption"], row["detail"] or "") for row in rows]


# -- tfrecord --------------------------------------------------------------------------------------------------------
texts, numbers = st.text(max_size=20).map(str.encode), st.integers(-(2**63), 2**63 - 1)
feature_values = st.lists(texts, max_size=4) | st.lists(numbers, max_size=4)
feature_values |= st.lists(st.floats(width=32, allow_nan=False), max_size=4)


@given(st.dictionaries(st.text(max_size=8), feature_values, max_size=5))
@settings(max_examples=60, deadline=None)
def test_an_example_is_read_as_protobuf_writes_it(features: dict[str, list[Any]]) -> None:
    found, names = parse_example(example(**features), set(features))
    assert sorted(names) == sorted(features)
    for name, values in features.items():
        assert found[name] == (values if len(values) > 1 else values[0] if values else None)


@given(st.binary(max_size=200), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_an_example_or_a_value_error(data: bytes, rng: random.Random) -> None:
    good = bytearray(example(image=b"123", caption="red", n=[1, 2, 3]))
    good[rng.randrange(len(good))] = rng.randrange(256)
    for each in (data, bytes(good)):
        try:
            parse_example(each, {"image", "caption", "n"})
        except ValueError as error:
            assert str(error)  # UnicodeDecodeError of a name is one, too


def test_tfrecords(tmp_path: Path) -> None:
    good = [example(image=picture(n), caption=[f"red {n}", "other"], score=0.5, n=n) for n in range(3)]
    damaged = bytearray(framed(good[1]))
    damaged[40] ^= 1
    whole = framed(good[0]) + bytes(damaged) + framed(b"\xff\xff") + framed(example(caption="no picture"))
    (tmp_path / "a.tfrecord").write_bytes(whole + framed(good[2]))
    (tmp_path / "b.tfrecord.gz").write_bytes(gzip.compress(framed(good[0]) + framed(good[1])[:200]))
    source = {"adapter": "tfrecord", "files": str(tmp_path / "*.tfrecord*"), "fields": {"score": "score", "n": "n"}}
    images, captions = ingested(tmp_path, source)
    found = told(images)
    assert [(origin, what) for origin, what, _ in found] == [
        ("record-0", "red 0"), ("1", "damaged_member"), ("record-2", "bad_value"), ("record-3", "missing"),
        ("record-4", "red 2"), ("record-0", "red 0"), ("", "damaged_archive"),
    ]  # fmt: skip
    assert "'image'" in found[3][2] and "caption" in found[3][2]
    assert json.loads(images[4]["fields"]) == {"score": 0.5, "n": 2}
    assert len(captions) == len(images) == 7
    assert [row["sha256"] for row in images if row["reason"] is None] != [""] * 3


def test_a_file_that_is_no_tfrecord_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.tfrecord").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UnreadableError, match="git-lfs pointer"):
        ingested(tmp_path, {"adapter": "tfrecord", "files": str(tmp_path / "a.tfrecord")})


# -- jsonl -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("packed", ["plain", "gzip", "list"])
def test_json_lines_with_pictures_inside_and_beside(tmp_path: Path, packed: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jpg").write_bytes(picture(0))
    inside = base64.b64encode(picture(1)).decode()
    rows: list[Any] = [
        {"image": "in/0.jpg", "caption": "beside", "score": 3},
        {"image": inside, "caption": ["", "inside"]},
        {"image": f"data:image/jpeg;base64,{inside}", "caption": None},
        {"image": "in/1.jpg", "caption": "gone"},
        {"image": "../0.jpg", "caption": "out"},
        {"image": "%%%", "caption": "no base64"},
        {"caption": "none"},
        [1],
    ]
    text = json.dumps(rows) if packed == "list" else "\n\n".join(map(json.dumps, rows)) + "\n{"
    data = text.encode()
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(data) if packed == "gzip" else data)
    source = {"adapter": "jsonl", "files": str(tmp_path / "a.jsonl"), "fields": {"score": "score"}}
    images, captions = ingested(tmp_path, source)
    whats = [what for _, what, _ in told(images)]
    cut = [] if packed == "list" else ["damaged_json"]
    good = ["beside", "inside", ""]
    assert whats == [*good, "missing", "bad_value", "bad_value", "missing", "damaged_json", *cut]
    assert json.loads(images[0]["fields"]) == {"score": 3}
    assert [row["reason"] for row in captions[:3]] == [None, None, "no_caption"]


def test_a_cut_gzip_keeps_the_lines_before(tmp_path: Path) -> None:
    line = json.dumps({"image": base64.b64encode(picture(1)).decode(), "caption": "red"}).encode() + b"\n"
    data = gzip.compress(line * 3, 0)
    (tmp_path / "a.jsonl.gz").write_bytes(data[: -len(line) - 4])
    images, _ = ingested(tmp_path, {"adapter": "jsonl", "files": str(tmp_path / "a.jsonl.gz")})
    assert [what for _, what, _ in told(images)][:1] == ["red"]
    assert told(images)[-1][1] == "damaged_archive" and len(images) < 4


# -- folder ----------------------------------------------------------------------------------------------------------
def pictures_in(folder: Path) -> list[str]:
    names = ["a.jpg", "b/c.jpg", "b/d.png", "b/e/f.v2.jpg"]
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(n))
    return names


def test_a_folder_with_texts_beside(tmp_path: Path) -> None:
    pictures_in(tmp_path / "in")
    for name, text in (("a.txt", "red"), ("b/c.txt", "green"), ("b/e/f.v2.txt", "blue"), ("._a.jpg", "mac")):
        (tmp_path / "in" / name).write_text(text)
    images, _ = ingested(tmp_path, {"adapter": "folder", "files": str(tmp_path / "in"), "unit_inputs": 1})
    assert {row["origin"]: row["caption"] for row in images} == {
        "own/./a.jpg": "red", "own/b/c.jpg": "green", "own/b#1/d.png": "", "own/b/e/f.v2.jpg": "blue",
    }  # fmt: skip
    assert len({row["key"] for row in images}) == 4


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_a_folder_with_a_table(tmp_path: Path, kind: str) -> None:
    names = pictures_in(tmp_path / "in")
    rows = [{"file_name": name, "text": f'a "{name}",\nand more', "n": n} for n, name in enumerate(names[:3])]
    table = tmp_path / "in" / f"metadata.{kind}"
    if kind in ("csv", "tsv"):
        with table.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["file_name", "text", "n"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        table.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    join = {"file": str(table), "key": "file_name", "by": "origin", "fields": {"text": "text"}}
    source = {"adapter": "folder", "files": str(tmp_path / "in"), "caption": "joined.text", "joins": [join]}
    images, captions = ingested(tmp_path, source)
    found = {row["origin"].removeprefix("own/").removeprefix("./"): row["caption"] for row in images}
    assert found == {name: f'a "{name}", and more' for name in names[:3]} | {names[3]: ""}
    assert sorted(row["reason"] or "" for row in captions) == ["", "", "", "no_caption"]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("red")
    with pytest.raises(RequestError, match=r"there is no picture below it among its 1 files, such as a\.txt"):
        ingested(tmp_path, {"adapter": "folder", "files": str(tmp_path / "in")})


def test_a_huge_file_of_a_folder_fails_alone(tmp_path: Path) -> None:
    pictures_in(tmp_path / "in")
    with (tmp_path / "in/huge.jpg").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    images, _ = ingested(tmp_path, {"adapter": "folder", "files": str(tmp_path / "in")})
    assert sorted(row["reason"] or "" for row in images) == ["", "", "", "", "too_large"]


# -- split archives --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("endings", [["00", "01", "02"], ["aa", "ab", "ac"], ["part1", "part2", "part3"]])
def test_a_split_archive_is_one_unit(tmp_path: Path, endings: list[str]) -> None:
    members = {f"image/{n}.jpg": picture(n) for n in range(3)}
    whole = write_tar(tmp_path / "whole.tgz", members, "w:gz").read_bytes()
    (tmp_path / "in").mkdir()
    cut = len(whole) // 3
    for n, ending in enumerate(endings):
        (tmp_path / f"in/gen.tar.gz.{ending}").write_bytes(whole[n * cut : None if n == 2 else (n + 1) * cut])
    rows = [{"input_prompt": f"red {n}", "output_image": f"image/{n}.jpg"} for n in range(3)]
    (tmp_path / "gen.json").write_text(json.dumps(rows))
    join = {"file": str(tmp_path / "gen.json"), "key": "output_image", "by": "origin"}
    source = {"adapter": "webdataset", "files": str(tmp_path / "in/gen.tar.gz.*"), "caption": "joined.prompt"}
    source |= {"joins": [join | {"fields": {"prompt": "input_prompt"}}]}
    images, _ = ingested(tmp_path, source)
    assert [row["caption"] for row in images] == ["red 0", "red 1", "red 2"]
    assert images[0]["origin"] == "own/gen.tar.gz/image/0.jpg"
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    (tmp_path / f"in/gen.tar.gz.{endings[1]}").unlink()
    with pytest.raises(RequestError, match=r"some are absent: there are"):
        ingested(tmp_path / "again", source)


# -- several captions ------------------------------------------------------------------------------------------------
def lines(folder: Path, count: int = 60) -> Path:
    image = base64.b64encode(picture(1)).decode()
    rows = [{"image": image, "a": f"a{n}" if n % 3 else None, "b": [f"b{n}"], "ok": bool(n % 2)} for n in range(count)]
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_first_caption_whose_gate_is_open(tmp_path: Path) -> None:
    caption = [{"long": "a", "if": "ok"}, {"short": "b"}]
    images, _ = ingested(tmp_path, {"adapter": "jsonl", "files": str(lines(tmp_path, 12)), "caption": caption})
    assert [row["caption"] for row in images] == [f"a{n}" if n % 2 and n % 3 else f"b{n}" for n in range(12)]
    assert json.loads(images[1]["fields"]) == {"long": "a1", "short": "b1"}
    assert json.loads(images[2]["fields"]) == {"short": "b2"}


def test_captions_by_weight_are_drawn_for_a_sample_always_the_same(tmp_path: Path) -> None:
    caption = [{"long": "a", "weight": 3}, {"short": "b", "weight": 1}]
    source = {"adapter": "jsonl", "files": str(lines(tmp_path)), "caption": caption}
    images, _ = ingested(tmp_path, source)
    again, _ = ingested(tmp_path / "again", source)
    assert [row["caption"] for row in again] == [row["caption"] for row in images]
    both = [row["caption"][0] for n, row in enumerate(images) if n % 3]
    assert 22 <= both.count("a") <= 37  # 30 of 40 on average
    assert {row["caption"][0] for row in images[::3]} == {"b"}


def test_one_weight_alone_and_names_given_twice_are_refused(tmp_path: Path) -> None:
    source = {"adapter": "jsonl", "files": "x"}
    for caption, said in (
        ([{"long": "a", "weight": 3}, {"short": "b"}], "a weight for each"),
        ([{"long": "a"}, {"long": "b"}], "is there already"),
        ([{"if": "ok"}], "WHERE"),
        ("joined.text", "name of a joined field"),
    ):
        with pytest.raises(ValueError, match=said):
            ingested(tmp_path, source | {"caption": caption})


# -- elsewhere -------------------------------------------------------------------------------------------------------
def test_layouts_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    """A folder, JSON lines with pictures beside them, and TFRecords, through the same client as archives."""
    inside = {"image": "in/1.jpg", "caption": "beside"}
    lost = {"image": "in/9.jpg", "caption": "gone"}
    hub.add(
        "me/set",
        {
            "README.md": b"#", "deep/in/1.jpg": picture(1), "deep/in/1.txt": b"red",
            "deep/a.jsonl": json.dumps(inside).encode() + b"\n" + json.dumps(lost).encode(),
            "r/a.tfrecord": framed(example(image=picture(2), caption="blue")),
        },
        kind="datasets",
    )  # fmt: skip
    root = "hf://datasets/me/set"
    folder, _ = ingested(tmp_path / "a", {"adapter": "folder", "files": f"{root}/deep"})
    assert [(row["origin"], row["caption"]) for row in folder] == [("me/set/in/1.jpg", "red")]
    lines, _ = ingested(tmp_path / "b", {"adapter": "jsonl", "files": f"{root}/deep/*.jsonl"})
    assert [row["reason"] or row["caption"] for row in lines] == ["beside", "missing"]
    assert lines[0]["sha256"] == folder[0]["sha256"]
    blue, _ = ingested(tmp_path / "c", {"adapter": "tfrecord", "files": f"{root}/r/*.tfrecord"})
    assert [row["caption"] for row in blue] == ["blue"]
