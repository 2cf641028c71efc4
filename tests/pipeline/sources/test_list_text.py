"""Lists of URLs in every form, from here and elsewhere: the same rows are the same inputs."""

import csv
import gzip
import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.config.sources import FetchOptions, UrlsSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.sources.list_columns import ListColumns
from microdit.pipeline.sources.source import Input
from tests.servers.files_server import FilesServer, files_server
from tests.servers.hub import Hub, hub
from tests.servers.s3 import BUCKET

__all__ = ["files_server", "hub"]

ROWS = [
    {"URL": f"http://a/{n}", "TEXT": f"caption {n}", "similarity": n / 4, "id": f"00{n}", "hash": "" if n else "0" * 32}
    for n in range(7)
]
OPTIONS = {"fields": {"score": "similarity", "id": "id"}, "md5": "hash"}


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=3)
    return sink.getvalue()


def as_zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)  # type: ignore[no-any-return]


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "list.csv": as_csv,
    "list.tsv": lambda rows: as_csv(rows, "\t"),
    "list.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "list.csv.zst": lambda rows: as_zstd(as_csv(rows)),
    "list.jsonl": as_jsonl,
    "list.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "list.jsonl.zst": lambda rows: as_zstd(as_jsonl(rows)),
    "list.parquet": as_parquet,
}


def made(folder: Path, pattern: str | Path, unit_inputs: int = 3, limit: int | None = None, **options: Any) -> Urls:
    columns = ListColumns.of(UrlsSource(adapter="urls", list=str(pattern), **options))
    scratch = folder / "scratch"
    return Urls("web", pattern, unit_inputs, FetchOptions(), limit, columns=columns, scratch=scratch)


def inputs(source: Urls) -> list[Input]:
    return [item for unit in source.units() for item in source.read(unit, lambda ordinal: False)]


def told(found: list[Input]) -> list[tuple[Any, ...]]:
    """The score of a text is a text: a CSV has no types."""
    return [
        (i.key, i.origin, i.caption, float(i.fields["score"]), i.fields["id"], i.reason)  # type: ignore[arg-type]
        for i in found
    ]


EXPECTED = [(f"{n:09d}", f"http://a/{n}", f"caption {n}", n / 4, f"00{n}", None) for n in range(7)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_of_a_list_gives_the_same_inputs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WRITERS[name](ROWS))
    source = made(tmp_path, tmp_path / name, **OPTIONS)
    assert told(inputs(source)) == EXPECTED
    assert told(inputs(made(tmp_path, tmp_path / name, limit=5, **OPTIONS))) == EXPECTED[:5]
    copy = pickle.loads(pickle.dumps(source))
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)  # another machine
    assert told(inputs(copy)) == EXPECTED


def test_a_list_is_known_by_its_content(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        (tmp_path / name).write_bytes(write(ROWS))
    stages = {name: made(tmp_path, tmp_path / name).stage() for name in WRITERS}
    assert stages["list.csv"] == stages["list.csv.gz"] == stages["list.csv.zst"] != stages["list.jsonl"]
    assert stages["list.jsonl"] == stages["list.jsonl.gz"] == stages["list.jsonl.zst"] == stages["list.parquet"]
    assert stages["list.jsonl"]["list"] == hashlib.sha256(as_jsonl(ROWS)).hexdigest()
    assert "more" not in stages["list.csv"]["format"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TEXTS


@settings(max_examples=40, deadline=None, print_blob=True)
@given(st.lists(st.tuples(VALUES, TEXTS), min_size=1, max_size=9))
def test_a_row_of_a_table_is_one_input(tmp_path_factory: pytest.TempPathFactory, values: list[tuple[Any, str]]) -> None:
    folder = tmp_path_factory.mktemp("list")
    rows = [{"url": f"http://a/{n}", "caption": text, "more": json.dumps(v)} for n, (v, text) in enumerate(values)]
    (folder / "list.parquet").write_bytes(as_parquet(rows))
    found = inputs(made(folder, folder / "list.parquet", fields={"more": "more"}))
    assert [item.origin for item in found] == [row["url"] for row in rows]
    assert [item.fields["more"] for item in found] == [row["more"] for row in rows]
    assert [item.caption for item in found] == [" ".join(text.split()) for _, text in values]


@pytest.mark.parametrize("name", ["list.csv.gz", "list.jsonl", "list.parquet"])
def test_lists_from_elsewhere(tmp_path: Path, name: str, files_server: FilesServer, hub: Hub, s3_url: str) -> None:
    data = WRITERS[name](ROWS)
    hub.add("some/list", {f"data/{name}": data}, kind="datasets")
    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"lists/{name}", Body=data)
    places = [files_server.add(name, data), f"s3://{BUCKET}/lists/{name}", f"hf://datasets/some/list/data/{name}"]
    for place in places:
        source = made(tmp_path, place, **OPTIONS)
        assert told(inputs(source)) == EXPECTED
        assert source.stage()["inputs"] == 7
    assert len(list((tmp_path / "scratch").glob("microdit-list-*"))) == 7  # one copy, and two notes of each place


def test_a_list_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "part-2.csv").write_bytes(as_csv(ROWS[:3]).rstrip())
    (tmp_path / "part-10.csv").write_bytes(as_csv(ROWS[3:]))
    assert told(inputs(made(tmp_path, tmp_path / "part-*.csv", **OPTIONS))) == EXPECTED
    (tmp_path / "part-2.parquet").write_bytes(as_parquet(ROWS[:3]))
    (tmp_path / "part-10.parquet").write_bytes(as_parquet(ROWS[3:]))
    assert told(inputs(made(tmp_path, tmp_path / "part-*.parquet", **OPTIONS))) == EXPECTED
    assert told(inputs(made(tmp_path, tmp_path / "part-*.parquet", limit=4, **OPTIONS))) == EXPECTED[:4]


def test_a_smaller_limit_is_still_the_same_list(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(as_parquet(ROWS))
    corpus = Corpus.create(tmp_path / "corpus", "x")
    whole = made(tmp_path, tmp_path / "list.parquet")
    corpus.declare_source("web", whole.stage())
    corpus.store.create("commits/units/web/web-000000.0.json", b"{}")
    made(tmp_path, tmp_path / "list.parquet", limit=2).keep_to_known_files(corpus, False, print)
    (tmp_path / "list.parquet").write_bytes(as_parquet(ROWS[1:]))
    with pytest.raises(RequestError, match="it is another list than that of 7 inputs"):
        made(tmp_path, tmp_path / "list.parquet", limit=2).keep_to_known_files(corpus, False, print)


def test_a_list_that_is_another_one_is_no_longer_read(tmp_path: Path, files_server: FilesServer) -> None:
    url = files_server.add("list.jsonl", as_jsonl(ROWS))
    source = made(tmp_path, url)
    files_server.add("list.jsonl", as_jsonl(ROWS[1:]))
    assert len(inputs(source)) == 7
    shutil.rmtree(tmp_path / "scratch")
    with pytest.raises(UnreadableError, match="is another one than at the beginning of the build"):
        inputs(source)
    assert len(inputs(made(tmp_path, url))) == 6


def test_columns_by_number_or_without_captions(tmp_path: Path) -> None:
    lines = "".join(f"{n}\tcat {n}\thttp://a/{n}\tde\n" for n in range(4))
    (tmp_path / "list.tsv").write_text(lines)
    found = inputs(made(tmp_path, tmp_path / "list.tsv", url=3, caption=2, fields={"language": 4}))
    assert [(i.origin, i.caption, dict(i.fields)) for i in found] == [
        (f"http://a/{n}", f"cat {n}", {"language": "de"}) for n in range(4)
    ]
    with pytest.raises(RequestError, match=r"url: its lines have 4 columns; expected a number from 1 to 4"):
        made(tmp_path, tmp_path / "list.tsv", url=5, caption=2)
    with pytest.raises(RequestError, match=r"first line names no column 'where'.*number of the column"):
        made(tmp_path, tmp_path / "list.tsv", url="where", caption=2)
    for text in ("http://a/1\nhttp://a/2,3\n", "url\nhttp://a/1\nhttp://a/2,3\n"):
        (tmp_path / "list.txt").write_text(text)
        found = inputs(made(tmp_path, tmp_path / "list.txt", caption=""))
        assert [(i.origin, i.caption) for i in found] == [("http://a/1", ""), ("http://a/2,3", "")]


def test_columns_of_any_name(tmp_path: Path) -> None:
    rows = [{"where": f"http://a/{n}", "Words": [f"cat {n}", "x"], "about": {"nsfw": 0.5}} for n in range(3)]
    (tmp_path / "list.jsonl").write_bytes(as_jsonl(rows) + b"no object\n" + b'{"where": 7}\n')
    options = {"url": "where", "caption": "Words", "fields": {"nsfw": "about.nsfw"}}
    found = inputs(made(tmp_path, tmp_path / "list.jsonl", **options))
    assert [(i.origin, i.caption, dict(i.fields)) for i in found[:3]] == [
        (f"http://a/{n}", f"cat {n}", {"nsfw": 0.5}) for n in range(3)
    ]
    assert [item.reason for item in found[3:]] == ["unreadable_list_line"] * 2
    with pytest.raises(RequestError, match=r"have no 'who'; expected one of where, Words, about"):
        made(tmp_path, tmp_path / "list.jsonl", url="where", caption="who")


def test_a_row_that_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    table = pa.table({"url": [f"http://a/{n}" for n in range(3)], "caption": texts, "png": [b"x"] * 3})
    pq.write_table(table, tmp_path / "list.parquet")
    found = inputs(made(tmp_path, tmp_path / "list.parquet"))
    assert [item.reason for item in found] == [None, "unreadable_list_line", None]
    assert [item.caption for item in found] == ["a", "", "c"]


@pytest.mark.parametrize("name", ["list.csv.gz", "list.jsonl.zst", "list.parquet"])
def test_a_damaged_list_is_refused(tmp_path: Path, name: str) -> None:
    data = WRITERS[name](ROWS)
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match=rf"sources\.web\.list = .*{name} is damaged: .*; expected a whole list"):
        made(tmp_path, tmp_path / name)
    assert not list((tmp_path / "scratch").glob("*.part"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": 0}, "url = 0: expected the name of a column, or its number from 1"),
        ({"fields": {"final_url": "x"}}, "fetching makes a field of this name"),
        ({"md5": ""}, "md5 = '': expected the name of a column"),
    ],
)
def test_columns_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        UrlsSource(adapter="urls", list="x", **options)
    assert message.rpartition(" = ")[2].partition(": ")[2] in str(raised.value) or message in str(raised.value)
