"""Join tables: sorted into the corpus, looked up by key."""

import gzip
import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.files.find import list_files
from microdit.pipeline.tables.joins import build as joins
from microdit.pipeline.tables.joins import lookup, readers
from microdit.pipeline.tables.joins.build import build
from microdit.pipeline.tables.joins.lookup import Joined
from microdit.pipeline.tables.joins.spec import JoinSpec


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus.create(tmp_path / "corpus", "joins", 4)


def built(corpus: Corpus, spec: JoinSpec, tmp_path: Path) -> tuple[Joined, list[str]]:
    said: list[str] = []
    build(corpus, spec, tmp_path / "scratch", said.append)
    told = [line for line in said if "rows read" not in line]  # how far it is: on a busy machine only
    return pickle.loads(pickle.dumps(Joined(corpus.store, spec))), told


def spec_of(path: Path, reader: str, key: str, fields: dict[str, str], key_of: str = "") -> JoinSpec:
    return JoinSpec(list_files(str(path), "table"), reader, key, fields, key_of)


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    data = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=6), st.none() | st.text(max_size=9)), max_size=60),
    st.text(max_size=6),
)
@settings(max_examples=40, deadline=None)
def test_a_key_is_found_if_its_rows_agree_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str | None]], other: str
) -> None:
    folder = tmp_path_factory.mktemp("table")
    corpus = Corpus.create(folder / "corpus", "joins", 4)
    rows = [("first", "one"), *rows]
    path = jsonl(folder / "t.jsonl", [{"key": key, "text": text} for key, text in rows])
    table, _ = built(corpus, spec_of(path, "jsonl", "key", {"caption": "text"}), folder)
    texts: dict[str, set[str | None]] = {}
    for key, text in rows:
        replaced = None if text is None or "\0" in text else text
        texts.setdefault(key, set()).add(replaced)
    wanted = {key: {"caption": next(iter(some))} if len(some) == 1 else lookup.AMBIGUOUS for key, some in texts.items()}
    assert {key: table.get(key) for key in wanted} == wanted
    many = {key: sum(other == key for other, _ in rows) for key in wanted}
    ambiguous = sum(many[key] for key in wanted if wanted[key] is lookup.AMBIGUOUS)
    assert table._table.left_out.get("ambiguous_key", 0) == ambiguous
    if other not in wanted:
        assert table.get(other) is None


def test_many_row_groups_in_any_order_cost_little_memory(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joins, "ROW_GROUP", 2048)  # DuckDB's least
    count = 20_000
    order = [(i * 7919) % count for i in range(count)]
    rows = [{"key": f"sa_{n}", "text": f"caption {n}"} for n in order]
    table, said = built(corpus, spec_of(jsonl(tmp_path / "t.jsonl.gz", rows), "jsonl", "key", {"c": "text"}), tmp_path)
    assert table._file.metadata.num_row_groups > lookup.KEPT
    for n in (0, 1, 9, 10, 999, 12_345, count - 1):
        assert table.get(f"sa_{n}") == {"c": f"caption {n}"}
        assert len(table._groups) <= lookup.KEPT
    assert table.get("sa_20000") is None and table.get("") is None and table.get("zz") is None
    assert said == ["table: a table of 20,000 rows, sorted by key"]


def test_a_long_key_whose_statistics_are_cut_is_found(corpus: Corpus, tmp_path: Path) -> None:
    keys = ["x" * 5000 + str(n) for n in range(10)]
    path = jsonl(tmp_path / "t.jsonl", [{"key": key, "n": key[-1]} for key in keys])
    table, _ = built(corpus, spec_of(path, "jsonl", "key", {"n": "n"}), tmp_path)
    assert [table.get(key) for key in keys] == [{"n": key[-1]} for key in keys]


def test_parquet_keeps_types_takes_inner_columns_and_a_key_of_two(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "metadata.parquet"
    columns = {
        "part_id": pa.array([2, 1, 1], pa.uint16()),
        "image_name": ["b.webp", "a.webp", None],
        "image_nsfw": pa.array([0.5, 2.0, 0.1], pa.float32()),
        "about": [{"caption": "B", "n": 1}, {"caption": "A", "n": 2}, None],
        "never_read": [b"x"] * 3,
    }
    pq.write_table(pa.table(columns), path)
    fields = {"nsfw": "image_nsfw", "caption": "about.caption"}
    table, said = built(corpus, spec_of(path, "parquet", "part_id/image_name", fields), tmp_path)
    assert table.get("1/a.webp") == {"nsfw": 2.0, "caption": "A"}
    assert table.get("2/b.webp") == {"nsfw": 0.5, "caption": "B"}
    assert said[1] == "metadata.parquet: 1 left out, no_key"


def test_a_tar_of_texts_up_to_its_broken_place(corpus: Corpus, tmp_path: Path) -> None:
    members = {f"./captions/sa_{n}.txt": f"caption {n}\n".encode() * 40 for n in range(3000)}
    path = tar_of(tmp_path / "captions.tar.gz", members | {"captions/README.md": b"no caption"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    table, said = built(corpus, spec_of(path, "tar_txt", "", {"joined": "txt"}, "stem"), tmp_path)
    assert table.get("sa_17") == {"joined": "caption 17\n" * 40}
    assert table.get("README") is None and table.get("sa_2999") is None
    assert said[1] == "captions.tar.gz: 1 left out, damaged_archive"


def test_a_jsonl_in_a_tar(corpus: Corpus, tmp_path: Path) -> None:
    rows: list[Any] = [
        {"img_path": f"./{n % 3:03d}/u-{n}.jpg", "prompt": f"p {n}", "Task2": {"Caption": f"c {n}"} if n % 2 else None}
        for n in range(300)
    ]
    rows[7:7] = ["{broken\n", "[1]\n", "\n", json.dumps({"img_path": None, "prompt": "x"}) + "\n"]
    path = tar_of(
        tmp_path / "anno.jsonl.tgz", {"._x": b"no", "anno.jsonl": jsonl(tmp_path / "x.jsonl", rows).read_bytes()}
    )
    fields = {"prompt": "prompt", "task2": "Task2.Caption"}
    table, said = built(corpus, spec_of(path, "tar_jsonl", "img_path", fields, "path_dir_stem"), tmp_path)
    assert table.get("002/u-299") == {"prompt": "p 299", "task2": "c 299"}
    assert table.get("001/u-298") == {"prompt": "p 298", "task2": None}
    assert said[1:3] == ["anno.jsonl.tgz: 2 left out, no_json", "anno.jsonl.tgz: 1 left out, no_key"]


def test_a_gzip_that_is_cut_is_said(corpus: Corpus, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl.gz", [{"key": str(n), "text": str(n * 7919)} for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-2000])
    table, said = built(corpus, spec_of(path, "jsonl", "key", {"c": "text"}), tmp_path)
    assert table.get("3") == {"c": "23757"}
    assert said[1] == "t.jsonl.gz: 1 left out, damaged" and "ends behind line" in said[2]


@pytest.mark.parametrize(
    ("reader", "key", "fields", "message"),
    [
        ("parquet", "id", {"c": "text"}, "table: table t.parquet: there is no column 'id'; it has key, text"),
        ("parquet", "key", {"c": "text.inner"}, "there is no column 'text.inner'; it has key, text"),
        ("jsonl", "id", {"c": "text"}, "table: table t.jsonl: there is no column 'id'; it has key, text"),
    ],
)
def test_a_wrong_column_is_named(
    reader: str, key: str, fields: dict[str, str], message: str, corpus: Corpus, tmp_path: Path
) -> None:
    path = tmp_path / f"t.{reader}"
    if reader == "parquet":
        pq.write_table(pa.table({"key": ["a"], "text": ["b"]}), path)
    else:
        jsonl(path, [{"key": str(n), "text": "b"} for n in range(200)])
    with pytest.raises(RequestError) as error:
        built(corpus, spec_of(path, reader, key, fields), tmp_path)
    assert message in str(error.value)
    assert not list((tmp_path / "corpus" / "tables").rglob("*.*"))


def test_a_table_of_nothing_ends_the_build(corpus: Corpus, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", ["no json\n"] * 3)
    with pytest.raises(RequestError, match=r"table: nothing in t\.jsonl can be read; no_json: line 1"):
        built(corpus, spec_of(path, "jsonl", "key", {"c": "text"}), tmp_path)


def test_it_is_built_once(corpus: Corpus, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"key": "a", "text": "b"}])
    spec = spec_of(path, "jsonl", "key", {"c": "text"})
    built(corpus, spec, tmp_path)
    before = sorted(corpus.store.names("tables"))
    path.unlink()  # not read again
    table, _ = built(corpus, spec, tmp_path)
    assert sorted(corpus.store.names("tables")) == before and len(before) == 2
    assert table.get("a") == {"c": "b"}
    assert list((tmp_path / "scratch").iterdir()) == []


def test_another_file_is_another_table(corpus: Corpus, tmp_path: Path) -> None:
    """A changed file of the same name and length, locally or on another server."""
    found = []
    for text in ("one", "two"):
        path = jsonl(tmp_path / "t.jsonl", [{"key": "a", "caption": text}])
        os.utime(path, ns=(len(found), len(found)))
        table, _ = built(corpus, spec_of(path, "jsonl", "key", {"caption": "caption"}), tmp_path)
        found.append(table.get("a"))
    assert found == [{"caption": "one"}, {"caption": "two"}]
    there = [
        list_files(f"https://{folder}/captions.jsonl?signed={folder}", "table") for folder in ("x/a", "x/b", "y/a")
    ]
    assert len({JoinSpec(listing, "jsonl", "key", {"caption": "caption"}).base for listing in there}) == 3
    again = list_files("https://x/a/captions.jsonl?signed=anew", "table")  # a link that was signed again
    assert JoinSpec(again, "jsonl", "key", {}).base == JoinSpec(there[0], "jsonl", "key", {}).base


@pytest.mark.parametrize("names", [("key", "n"), ("number", "f0"), ("Long", "long"), ('a"b', "select")])
def test_fields_may_be_called_anything(corpus: Corpus, tmp_path: Path, names: tuple[str, str]) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"id": key, "x": f"x{key}", "y": f"y{key}"} for key in "ba"])
    table, _ = built(corpus, spec_of(path, "jsonl", "id", dict(zip(names, "xy", strict=True))), tmp_path)
    assert table.get("a") == dict(zip(names, ("xa", "ya"), strict=True))


@pytest.mark.parametrize("bad", ["key", "caption"])
def test_strings_of_a_parquet_file_that_are_no_text(corpus: Corpus, tmp_path: Path, bad: str) -> None:
    raw = pa.array([b"ok", b"\xff\xfe"], pa.binary())
    columns = {"key": pa.array(["ok", "other"]), "caption": pa.array(["x", "y"])}
    columns[bad] = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table, _ = built(corpus, spec_of(tmp_path / "t.parquet", "parquet", "key", {"caption": "caption"}), tmp_path)
    assert table.get("ok") == {"caption": "ok" if bad == "caption" else "x"}
    assert table.get("other") == ({"caption": None} if bad == "caption" else None)
    assert table._table.left_out["not_text"] == 1


def test_a_signal_ends_it_as_itself(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SAY_EVERY", 0.0)
    path = jsonl(tmp_path / "t.jsonl", [{"key": str(i), "caption": "x"} for i in range(20_000)])

    class Stopped(KeyboardInterrupt):
        pass

    def say(text: str) -> None:
        raise Stopped("stopped")

    with pytest.raises(Stopped, match="stopped"):
        build(corpus, spec_of(path, "jsonl", "key", {"caption": "caption"}), tmp_path / "scratch", say)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_many_at_once_read_each_part_once(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joins, "ROW_GROUP", 2048)
    count = 40_000
    path = jsonl(tmp_path / "t.jsonl", [{"key": str(i), "caption": f"c{i}"} for i in range(count)])
    table, _ = built(corpus, spec_of(path, "jsonl", "key", {"caption": "caption"}), tmp_path)
    groups = table._file.metadata.num_row_groups
    assert groups > 2 * lookup.KEPT
    read: list[int] = []
    whole = table._file.read_row_group

    class Counted:
        def read_row_group(self, number: int) -> pa.Table:
            read.append(number)
            return whole(number)

    table.__dict__["_file"] = Counted()
    keys = [str(i * 7919 % count) for i in range(1000)] + ["no such key"]
    assert table.get_many(keys) == {key: {"caption": f"c{key}"} for key in keys[:-1]}
    assert len(read) == len(set(read)) <= groups


def test_what_a_killed_build_left_is_swept(corpus: Corpus, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    for name, age in (("microdit-join-old", 3 * 86_400), ("microdit-join-new", 0), ("other", 3 * 86_400)):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "spilled").write_bytes(b"x")
        os.utime(scratch / name, (time.time() - age, time.time() - age))
    path = jsonl(tmp_path / "t.jsonl", [{"key": "a", "caption": "x"}])
    built(corpus, spec_of(path, "jsonl", "key", {"caption": "caption"}), tmp_path)
    assert sorted(each.name for each in scratch.iterdir()) == ["microdit-join-new", "other"]


def test_a_key_whose_rows_fill_several_groups_is_ambiguous(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joins, "ROW_GROUP", 2048)
    rows = [{"key": "a", "text": "a"}, *[{"key": "b", "text": "b"}] * 5000, *[{"key": "c", "text": "c"}] * 5000]
    rows += [{"key": "c", "text": "other"}, {"key": "d", "text": "d"}]
    table, said = built(corpus, spec_of(jsonl(tmp_path / "t.jsonl", rows), "jsonl", "key", {"c": "text"}), tmp_path)
    assert [table.get(key) for key in "abcd"] == [{"c": "a"}, {"c": "b"}, lookup.AMBIGUOUS, {"c": "d"}]
    assert said[1:] == [
        "t.jsonl: 5,001 left out, ambiguous_key",
        "t.jsonl: ambiguous_key: 'c' comes 5,001 times with different values",
    ]
