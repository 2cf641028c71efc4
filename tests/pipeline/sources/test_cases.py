"""Data sets as people have them: every picture is a row, and no caption is at a wrong one."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.config.sources import ParquetSource, WebdatasetSource
from microdit.pipeline.content.images import BadImage, decode
from microdit.pipeline.content.text_bytes import NotTextError, decode_text
from microdit.pipeline.engine.workers import error_report
from microdit.pipeline.sources.adapters.parquet import Parquet
from microdit.pipeline.sources.adapters.webdataset import Webdataset
from tests.pipeline.helpers.dataset_archives import ingested, picture, read_all, write_tar

CASES = Path(__file__).parents[2] / "data" / "cases" / "sources"
NUMBERED_TWICE = CASES / "T-two-img2dataset-folders-same-keys"


def webdataset(files: str) -> Webdataset:
    options = WebdatasetSource.model_validate({"adapter": "webdataset", "files": files})
    return Webdataset("own", options, Path("no-scratch"))


def built(folder: Path, case: Path, glob: bool = True, **options: Any) -> dict[str, tuple[str | None, str | None]]:
    """Build a folder of tars; return the caption of each picture, or why it or its caption failed, by its origin."""
    source = {"adapter": "webdataset", "files": str(case / "**" / "*.tar") if glob else str(case), **options}
    images, captions = ingested(folder, source)
    reasons = [image["reason"] or text["reason"] for image, text in zip(images, captions, strict=True)]
    origins = [image["origin"].removeprefix("own/") for image in images]
    texts = [text["caption"] for text in captions]
    assert len(set(origins)) == len(origins)
    return dict(zip(origins, zip(texts, reasons, strict=True), strict=True))


def test_tables_beside_tars_are_joined_to_those_alone(tmp_path: Path) -> None:
    join = {"file": str(NUMBERED_TWICE / "*" / "*.parquet"), "key": "key", "fields": {"long": "caption"}}
    source = {"adapter": "webdataset", "files": str(NUMBERED_TWICE / "*" / "*.tar"), "joins": [join]}
    images, _ = ingested(tmp_path / "a", source)
    assert [image["fields"] for image in images] == [
        f'{{"long": "folder {folder} caption {n}"}}' for folder in "ab" for n in range(3)
    ]
    images, _ = ingested(tmp_path / "b", source | {"joins": [{**join, "rows_of": "all"}]})
    assert [image["fields"] for image in images] == [""] * 6


def test_a_table_that_lies_elsewhere_is_of_all_tars(tmp_path: Path) -> None:
    shutil.copytree(NUMBERED_TWICE / "a", tmp_path / "a")
    shutil.copytree(NUMBERED_TWICE / "b", tmp_path / "b")
    (tmp_path / "captions.parquet").write_bytes((NUMBERED_TWICE / "a" / "00000.parquet").read_bytes())
    join = {"file": str(tmp_path / "captions.parquet"), "key": "key", "fields": {"long": "caption"}}
    source = {"adapter": "webdataset", "files": str(tmp_path / "a" / "*.tar"), "joins": [join]}
    images, _ = ingested(tmp_path / "out", source)
    assert [image["fields"] for image in images] == [f'{{"long": "folder a caption {n}"}}' for n in range(3)]


def test_a_captions_column_says_that_a_key_is_ambiguous(tmp_path: Path) -> None:
    """Its table knows no files, so that nobody can tell whose caption it is."""
    table = str(NUMBERED_TWICE / "*" / "*.parquet")
    for keys, pattern in (("one", NUMBERED_TWICE / "a" / "*.tar"), ("two", NUMBERED_TWICE / "*" / "*.tar")):
        source = {"adapter": "webdataset", "files": str(pattern), "keys": "member"}
        column = {"join": table, "by": "key"}
        _, captions = ingested(tmp_path / keys, source, column)
        assert {(row["caption"], row["reason"]) for row in captions} == {(None, "ambiguous_key")}


def test_names_with_dots(tmp_path: Path) -> None:
    """`22.05.png` and `22.06.png` are two pictures, each with its own text."""
    found = built(tmp_path, CASES / "W2-dots-in-names")
    with tarfile.open(CASES / "W2-dots-in-names" / "dots.tar") as tar:
        texts = {m.name: tar.extractfile(m).read().decode().strip() for m in tar if m.name.endswith(".txt")}  # type: ignore[union-attr]
    assert found == {
        f"dots.tar/{name.removesuffix('txt')}png": (" ".join(text.split()), None) for name, text in texts.items()
    }


@pytest.mark.parametrize("keys", ["number", "member"])
def test_dotted_extensions_name_texts(tmp_path: Path, keys: str) -> None:
    case = CASES / "W1-dotted-extensions-both"
    found = built(tmp_path, case, image=["input.jpg"], caption="outputs.txt", keys=keys)
    assert len(found) > 5 and all(text and reason is None for text, reason in found.values())


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("images-then-texts", {"no_caption": 5, "not_side_by_side": 5}),
        ("texts-then-images", {"missing": 5, "not_side_by_side": 5}),
        ("pairs-interleaved", {"no_caption": 4, "not_side_by_side": 4}),
    ],
)
@pytest.mark.parametrize("keys", ["number", "member"])
def test_members_that_lie_apart(tmp_path: Path, name: str, reasons: dict[str, int], keys: str) -> None:
    source = {"adapter": "webdataset", "files": str(CASES / "W3-not-side-by-side" / f"{name}.tar"), "keys": keys}
    images, captions = ingested(tmp_path, source)
    found = [image["reason"] or text["reason"] for image, text in zip(images, captions, strict=True)]
    assert Counter(found) == reasons
    details = [row["detail"] for row in (*images, *captions) if row["reason"] == "not_side_by_side"]
    assert all("pack the tar again" in detail for detail in details)


STEMS = st.lists(st.sampled_from(["22", "22.05", "22.06", "22.5.1", "a", "a.b", "x/22.05"]), unique=True, max_size=7)


@given(STEMS, st.randoms(), st.sampled_from(["png", "jpg"]))
@settings(max_examples=80, deadline=None)
def test_every_picture_is_a_row_and_no_text_is_at_another(
    tmp_path_factory: pytest.TempPathFactory, stems: list[str], random: Random, extension: str
) -> None:
    folder = tmp_path_factory.mktemp("dots")
    members = [(f"{name}.{ending}", name.encode()) for name in stems for ending in (extension, "txt")]
    members = [member for member in members if random.random() < 0.8]
    random.shuffle(members)
    write_tar(folder / "a.tar", dict(members))
    if not any(name.endswith(extension) for name, _ in members):
        return
    found = read_all(webdataset(str(folder / "*.tar")))
    origins = [item.origin.removeprefix("own/a.tar/") for item in found]
    assert {name for name, _ in members if name.endswith(extension)} <= set(origins)
    assert len(origins) == len(set(origins)) or all(item.reason for item in found if origins.count(item.origin) > 1)
    for item in found:
        if item.caption and item.caption != item.data.decode():  # type: ignore[union-attr]
            # the one picture of `22.05.png` and `22.txt`
            assert item.data.decode().rpartition("/")[2].partition(".")[0] == item.caption.rpartition("/")[2]  # type: ignore[union-attr]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "shift_jis"]


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.sampled_from(ENCODINGS))
def test_a_text_in_any_encoding_is_right_or_no_text(text: str, encoding: str) -> None:
    data = text.encode(encoding, "ignore")
    text = data.decode(encoding)
    try:
        found = decode_text(data)
    except NotTextError:
        assert "\0" in text or encoding not in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
        return
    if encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert found == text.removeprefix("\ufeff") or found == text
    else:  # by chance it is UTF-8 as well
        assert found.encode() == data or data[:2] in (b"\xff\xfe", b"\xfe\xff")


def test_texts_in_odd_bytes_keep_their_picture(tmp_path: Path) -> None:
    texts = {
        "a": "né".encode("utf-16"), "b": "né".encode("latin-1"), "c": "né".encode("utf-8-sig"), "d": b"a\0b",
        "e": b"\xed\xa0\x80", "f": "né".encode("utf-16-le"),
    }  # fmt: skip
    members: dict[str, bytes] = {}
    for n, (name, data) in enumerate(texts.items()):
        members |= {f"{name}.jpg": picture(n), f"{name}.txt": data}
    write_tar(tmp_path / "in" / "x.tar", members)
    write_tar(tmp_path / "in" / "y.tar", {"a.jpg": picture(9), "a.json": b'{"c": "x\\ud800"}', "a.txt": b"T"})
    found = built(tmp_path, tmp_path / "in")
    no = (None, "not_text")
    right = ("né", None)
    assert [found[f"x.tar/{name}.jpg"] for name in texts] == [right, no, right, no, no, no]
    assert found["y.tar/a.jpg"] == ("T", None)
    found = built(tmp_path / "2", tmp_path / "in", caption="json.c")
    assert found["y.tar/a.jpg"] == no
    images, _ = ingested(tmp_path / "3", {"adapter": "cc12m", "files": str(tmp_path / "in" / "*.tar")})
    assert [image["reason"] for image in images[:6]] == [None, "not_text", None, "not_text", "not_text", "not_text"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((CASES / "L-3-of-10-tars-are-lfs-pointers" / "00003.tar").read_bytes(), "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML page"), (b"", "empty"), (b"no tar at all" * 99, "no member begins here"),
        ((CASES / "W9-nothing-known-in-tar" / "img-cap.tar").read_bytes(), r"5 \.img, 5 \.cap.*image: \[img\], capt"),
    ],
)  # fmt: skip
def test_a_unit_of_which_nothing_can_be_read_is_no_row(tmp_path: Path, data: bytes, message: str) -> None:
    shutil.copy(CASES / "L-3-of-10-tars-are-lfs-pointers" / "00000.tar", tmp_path / "0.tar")
    (tmp_path / "1.tar").write_bytes(data)
    source = webdataset(str(tmp_path / "*.tar"))
    assert len(list(source.read("own-000000", lambda ordinal: True))) > 0
    with pytest.raises(UnreadableError, match=rf"^own/1\.tar: .*{message}"):
        list(source.read("own-000001", lambda ordinal: True))
    assert error_report(UnreadableError("x")).is_final and not error_report(UnreadableError("x")).is_request


def test_the_advice_for_unknown_extensions_works(tmp_path: Path) -> None:
    options = {"image": ["img"], "caption": "cap"}
    found = built(tmp_path, CASES / "W9-nothing-known-in-tar" / "img-cap.tar", glob=False, **options)
    assert len(found) == 5 and all(text and reason is None for text, reason in found.values())


def test_tiffs_are_pictures(tmp_path: Path) -> None:
    found = built(tmp_path, CASES / "W9-nothing-known-in-tar" / "tiff.tar", glob=False)
    assert [reason for _, reason in found.values()] == ["no_caption"] * 5


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_of_any_kind_and_its_first_page(mode: str, compression: str | None) -> None:
    light = Image.new("L", (40, 30), 200)
    page = Image.fromarray(np.full((30, 40), 200 << 8, np.uint16)) if mode == "I;16" else light.convert(mode)
    buffer = io.BytesIO()
    page.save(buffer, "TIFF", compression=compression, save_all=True, append_images=[Image.new("RGB", (9, 9))])
    image = decode(buffer.getvalue(), 10**6)
    assert (image.width, image.height, image.format) == (40, 30, "tiff")
    assert abs(float(image.pixels.mean()) - 200) < (60 if mode == "1" else 2)


def test_a_tiff_without_a_known_range_is_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((30, 40), np.float32)).save(buffer, "TIFF")
    with pytest.raises(BadImage, match="floating point") as caught:
        decode(buffer.getvalue(), 10**6)
    assert caught.value.reason == "unsupported"


def test_names_that_begin_again_in_each_tar(tmp_path: Path) -> None:
    case = CASES / "W6-names-begin-anew-in-each-tar"
    images, captions = ingested(tmp_path, {"adapter": "webdataset", "files": str(case / "*.tar"), "keys": "member"})
    assert [image["key"] for image in images] == [f"{file:06d}-{n:09d}" for file in (0, 1) for n in range(3)]
    assert all(row["reason"] is None for row in (*images, *captions))
    (tmp_path / "one").mkdir()
    images, _ = ingested(tmp_path / "2", {"adapter": "webdataset", "files": str(case / "00000.tar"), "keys": "member"})
    assert [image["key"] for image in images] == [f"{n:09d}" for n in range(3)]


@pytest.mark.parametrize("case", ["caption-is-a-number", "caption-is-a-list-of-structs"])
def test_captions_of_a_wrong_type_are_refused_before_anything_is_read(tmp_path: Path, case: str) -> None:
    source = {"adapter": "parquet", "files": str(CASES / case / "l.parquet"), "caption": "caption"}
    with pytest.raises(
        RequestError, match=r"caption = 'caption': .* of the type (int64|list).*expected text or a list"
    ):
        ingested(tmp_path, source)
    assert not list((tmp_path / "corpus" / "commits").rglob("*.json"))


@pytest.mark.parametrize(("rule", "text"), [("first", "b"), ("longest", "long one"), ("join", "b long one")])
def test_lists_of_texts(tmp_path: Path, rule: str, text: str) -> None:
    columns = {"jpg": [picture(1)] * 2, "text": [["", "b", "long one"], []]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = {"adapter": "parquet", "files": str(tmp_path / "a.parquet"), "caption": "text", "texts": rule}
    _, captions = ingested(tmp_path, source)
    assert [row["caption"] for row in captions] == [text, None]
    members = {"a.jpg": picture(1), "a.json": json.dumps({"c": columns["text"][0]}).encode()}
    write_tar(tmp_path / "in" / "a.tar", members)
    found = built(tmp_path / "2", tmp_path / "in", caption="json.c", texts=rule)
    assert found == {"a.tar/a.jpg": (text, None)}


def test_a_table_of_another_schema_is_set_aside_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [picture(1)], "text": ["t"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"jpg": [picture(1)], "other": ["t"]}), tmp_path / "b.parquet")
    options = {"adapter": "parquet", "files": str(tmp_path / "*.parquet"), "caption": "text"}
    source = Parquet("own", ParquetSource.model_validate(options), tmp_path)
    assert len(list(source.read("own-000000", lambda ordinal: True))) == 1
    with pytest.raises(UnreadableError, match=r"caption = 'text': b\.parquet has no such column"):
        list(source.read("own-000001", lambda ordinal: True))


def test_a_first_table_of_another_schema_is_set_aside_alone_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [picture(1)], "other": ["t"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"jpg": [picture(1)], "text": ["t"]}), tmp_path / "b.parquet")
    options = {"adapter": "parquet", "files": str(tmp_path / "*.parquet"), "caption": "text"}
    with pytest.raises(UnreadableError, match=r"a\.parquet has no such column.*this file alone is set aside"):
        ingested(tmp_path, options)
    with pytest.raises(RequestError, match=r"caption = 'txet': a\.parquet has no such column") as caught:
        ingested(tmp_path, options | {"caption": "txet"})
    assert not isinstance(caught.value, UnreadableError)


def test_what_macos_adds_is_passed_over(tmp_path: Path) -> None:
    members = {"._a.jpg": b"junk", "a.jpg": picture(1), "._a.txt": b"junk", "a.txt": b"A", "__MACOSX/a.jpg": b"junk"}
    write_tar(tmp_path / "in" / "a.tar", members)
    assert built(tmp_path, tmp_path / "in") == {"a.tar/a.jpg": ("A", None)}
