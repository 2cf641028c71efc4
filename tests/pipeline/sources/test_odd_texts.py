"""Texts that are none, by one rule for all adapters: the picture stays, and the sample says `not_text`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.content.text_bytes import NotTextError, decode_text
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.sources.registry import source_of
from microdit.pipeline.sources.source import Input
from tests.pipeline.helpers.dataset_archives import write_tar, write_zip

CC12M = {"adapter": "cc12m", "require_caption": False}
SA1B = {"adapter": "sa1b", "captions": None, "caption": "txt", "require_caption": False}
DIFFUSIONDB = {"adapter": "diffusiondb", "image_nsfw": None, "prompt_nsfw": None}


def read(folder: Path, options: dict[str, Any], name: str = "files") -> list[Input]:
    given = {"name": "own", "corpus": str(folder / "corpus"), "sources": {"own": options}}
    where = {"folder": "", "root": ""}.get(name, "/00000.*")
    given["sources"] = {"own": options | {name: f"{folder}{where}"}}
    source = source_of(BuildConfig.model_validate(given), "own")
    assert isinstance(source, FileSource)
    source._joined = []
    return list(source.read("own-000000", lambda ordinal: True))


def of_tar(options: dict[str, Any], name: str = "files") -> Callable[[Path, bytes], list[Input]]:
    def made(folder: Path, text: bytes) -> list[Input]:
        write_tar(folder / "00000.tar", {"1.jpg": b"1", "1.txt": text, "2.jpg": b"2", "2.txt": b"sound"})
        return read(folder, options, name)

    return made


def json_member(folder: Path, text: str) -> list[Input]:
    members = {f"{n}.{e}": json.dumps({"c": t}).encode() for n, t in ((1, text), (2, "sound")) for e in ("jpg", "json")}
    write_tar(folder / "00000.tar", members)
    return read(folder, {"adapter": "webdataset", "caption": "json.c"})


def of_table(options: dict[str, Any], name: str) -> Callable[[Path, str], list[Input]]:
    def made(folder: Path, text: str) -> list[Input]:
        rows = {"key": ["1", "2"], "jpg": [b"1", b"2"], "caption": [text, "sound"], "status": ["success"] * 2}
        pq.write_table(pa.table(rows), folder / "00000.parquet")
        return read(folder, options, name)

    return made


def of_zip(folder: Path, text: str) -> list[Input]:
    about = {"1.webp": {"p": text}, "2.webp": {"p": "sound"}}
    part = {"1.webp": b"1", "2.webp": b"2", "part-000001.json": json.dumps(about).encode()}
    write_zip(folder / "diffusiondb-large-part-1/part-000001.zip", part)
    write_zip(folder / "diffusiondb-large-part-2/part-010001.zip", part)
    return read(folder, DIFFUSIONDB, "root")


def of_list(folder: Path, text: str) -> list[Input]:
    (folder / "00000.tsv").write_text(f"http://x/1\t{text}\nhttp://x/2\tsound\n")
    given = {"name": "own", "corpus": str(folder / "corpus")}
    options = {"own": {"adapter": "urls", "list": str(folder / "00000.tsv")}}
    source = source_of(BuildConfig.model_validate({**given, "sources": options}), "own")
    assert isinstance(source, Urls)
    return [item for (item, _), _ in source._requests("own-000000", lambda ordinal: False)]


BYTES = {
    "webdataset": of_tar({"adapter": "webdataset"}),
    "cc12m": of_tar(CC12M),
    "sa1b": of_tar(SA1B),
    "img2dataset": of_tar({"adapter": "img2dataset"}, "folder"),
}
VALUES = {
    "json": json_member,
    "parquet": of_table({"adapter": "parquet", "caption": "caption"}, "files"),
    "img2dataset": of_table({"adapter": "img2dataset"}, "folder"),
    "diffusiondb": of_zip,
    "urls": of_list,
}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis"]


def check(found: list[Input], right: str | None) -> None:
    first, second = found
    assert second.caption == "sound" and second.reason is None
    told = first.reason == "not_text" or bool(first.fields.get("not_text"))
    assert (first.caption, told) == ((right, False) if right is not None else ("", True))


@pytest.mark.parametrize("adapter", BYTES)
@given(st.text(st.characters(codec="utf-8"), max_size=12), st.sampled_from(ENCODINGS))
@settings(max_examples=40, deadline=None)
def test_bytes(tmp_path_factory: pytest.TempPathFactory, adapter: str, text: str, encoding: str) -> None:
    data = text.encode(encoding, "ignore")
    try:
        right = " ".join(decode_text(data).split())
    except NotTextError:
        right = None
    check(BYTES[adapter](tmp_path_factory.mktemp("odd"), data), right)


@pytest.mark.parametrize(
    ("adapter", "text"),
    [(adapter, "a\0b") for adapter in VALUES]
    + [(adapter, text) for adapter in ("json", "diffusiondb") for text in ("x\ud800", "\udfff")],
)
def test_values(tmp_path: Path, adapter: str, text: str) -> None:
    check(VALUES[adapter](tmp_path, text), None)
