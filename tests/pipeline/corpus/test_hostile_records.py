"""Records and sidecars that no program of ours wrote: one message each."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, UnitCommit, canonical
from microdit.pipeline.selection.selections import list_selections, select
from microdit.pipeline.selection.view import query
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.tables.commit_table import commit_table
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.small_corpus import REF, SOURCE, UNIT, fill, make_corpus, problems, replace

BRACKETS = b"[" * 100_000
ABSURD = [-1, 10**18, True, 1.0, 1.5, "1", None, [1]]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    made = make_corpus(tmp_path / "corpus")
    fill(made, shards=1, columns=("captions/source",))
    return made


@pytest.mark.parametrize(
    "data",
    [
        BRACKETS,
        b'{"a":' * 100_000,
        *(canonical({"name": "x", "version": 1, "shard_samples": value}) for value in (0, 2**31, *ABSURD)),
        canonical({"name": ["x"], "version": 1, "shard_samples": 4}),
    ],
)
def test_a_corpus_json_of_anything(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "corpus.json").write_bytes(data)
    with pytest.raises(RequestError, match=r"corpus.json is damaged \(.*\); restore it or begin a new corpus$"):
        Corpus.open(tmp_path)


def test_brackets_in_every_record_are_one_error(corpus: Corpus) -> None:
    chosen = select(corpus, "all", "SELECT * FROM samples WHERE status = 'ok'")
    names = [f"commits/images/{SOURCE}/{REF.shard}.0.json", f"commits/units/{SOURCE}/{UNIT}.0.json"]
    for name in [*names, "columns/images.json", f"sources/{SOURCE}.json"]:
        before = corpus.store.get(name)
        replace(corpus, name, BRACKETS)
        again = Corpus.open(corpus.url)
        assert verify(again).problems
        with pytest.raises(DamagedError, match=f"{name} is damaged"):
            for _ in (commit_table(again), again.columns(), again.sources()):
                pass
        replace(corpus, name, before)
    table = pq.read_table(io.BytesIO(corpus.store.get(chosen.path)))
    for about in (BRACKETS, b'{"rows": -1, "query": ""}', b'{"rows": 1, "query": "", "columns": {"../..": ""}}'):
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"microdit": about}), buffer)
        replace(corpus, chosen.path, buffer.getvalue())
        with pytest.raises(RequestError, match="is damaged: it does not say what it is"):
            list_selections(corpus)
        assert [kind for kind, _ in problems(corpus)] == ["selection"]


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("path", ["counts.in", "counts.failed", "reasons.http_404", "object.size", "generation"])
def test_absurd_numbers_of_a_commit(corpus: Corpus, path: str, value: Any) -> None:
    name = f"commits/images/{SOURCE}/{REF.shard}.0.json"
    about = json.loads(corpus.store.get(name))
    owner = about
    *above, last = path.split(".")
    for key in above:
        owner = owner[key]
    owner[last] = value if value != 10**18 or path != "object.size" else 2**60
    replace(corpus, name, json.dumps(about).encode())
    with pytest.raises(DamagedError, match=f"{name} is damaged"):
        corpus.commit("images", SOURCE, REF.shard, 0)
    with pytest.raises(DamagedError, match=name):
        query(corpus, "SELECT caption_source FROM samples")
    assert ("commit", name) in problems(corpus)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {}},
        {"counts": {"in": 1, "out": 1}},
        {"timings": {"seconds": float("inf")}},
        {"timings": {"seconds": float("nan")}},
        {"timings": {"seconds": 1e300}},
        {"inputs": [{"column": "../../x", "generation": 0, "sha256": ""}]},
        {"inputs": [{"column": "images", "generation": 2**40, "sha256": ""}]},
    ],
)
def test_other_absurd_commits(corpus: Corpus, change: dict[str, Any]) -> None:
    about = json.loads(corpus.store.get(f"commits/images/{SOURCE}/{REF.shard}.0.json"))
    with pytest.raises(ValueError):
        Commit.parse(json.dumps(about | change).encode())


@pytest.mark.parametrize("value", ABSURD)
def test_absurd_numbers_of_a_unit(corpus: Corpus, value: Any) -> None:
    about = json.loads(corpus.store.get(f"commits/units/{SOURCE}/{UNIT}.0.json"))
    with pytest.raises(ValueError):
        UnitCommit.parse(json.dumps(about | {"inputs": value if value != 10**18 else 2**60}).encode())


def test_a_generation_beyond_all_bounds_is_stray(corpus: Corpus) -> None:
    name = f"commits/images/{SOURCE}/{REF.shard}.{10**20}.json"
    corpus.store.create(name, corpus.store.get(f"commits/images/{SOURCE}/{REF.shard}.0.json"))
    assert query(corpus, "SELECT count(*) AS n FROM samples")["n"].to_pylist() == [6]
    assert len(commit_table(corpus)) == 3 and problems(corpus) == [("stray", name)]


@pytest.mark.parametrize(
    "caption",
    [
        pa.array([{"a": 1}] * 6),
        pa.array([["x"]] * 6),
        pa.array([b"\xff"] * 6),
        pa.array([1] * 6),
        pa.array(["x"] * 6).dictionary_encode(),
        None,
    ],
)
def test_a_caption_that_is_no_string(corpus: Corpus, caption: pa.Array | None) -> None:
    commit = corpus.commit("captions/source", SOURCE, REF.shard, 0)
    table = corpus.sidecar(commit)
    number = table.schema.get_field_index("caption")
    table = table.drop_columns(["caption"]) if caption is None else table.set_column(number, "caption", caption)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    replace(corpus, commit.sidecar.name, buffer.getvalue())
    message = rf"{commit.sidecar.name} is damaged: its column caption is .*, expected string; `microdit verify`"
    with pytest.raises(DamagedError, match=message):
        corpus.sidecar(commit)
    with pytest.raises(DamagedError, match=f"{commit.sidecar.name} is missing or damaged"):
        query(corpus, "SELECT caption_source FROM samples")


@pytest.mark.parametrize("to", [".", "..", "../..", "/", "self", "other"])
def test_links_that_lead_to_where_they_lie(corpus: Corpus, to: str) -> None:
    folder = Path(corpus.url) / "commits/images"
    (folder / "other").symlink_to("self")
    (folder / "self").symlink_to("self" if to in ("self", "other") else to)
    with pytest.raises(RequestError, match=r"commits/images/\w+ is a link to a folder that it lies in"):
        corpus.commits("images")


def test_a_link_to_another_disk_is_followed(corpus: Corpus, tmp_path: Path) -> None:
    folder = Path(corpus.url) / "commits/captions"
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    (Path(corpus.url) / "commits/gone").symlink_to(tmp_path / "gone")
    assert len(corpus.commits("captions/source")) == 1
    assert any("commits/" in name for name in open_store(corpus.url).names("commits"))
