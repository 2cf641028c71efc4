"""`verify` of one shard: damaged objects, commits, sidecars, tars and lineage are found and named."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import DamagedError
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.open_shard import BrokenError, ShardReader
from microdit.pipeline.corpus.records import Commit, canonical
from microdit.pipeline.corpus.shard_files import TarWriter, write_table
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify_shard import tar_members
from tests.pipeline.helpers.small_corpus import (
    LATENTS,
    NEXT,
    REF,
    SHARD_SAMPLES,
    SOURCE,
    UNIT,
    fill,
    latents,
    make_corpus,
    problems,
    replace,
    write_column,
    write_images,
)


def _recommit(corpus: Corpus, commit: Commit, **change: Any) -> None:
    replace(corpus, commit.name, canonical(json.loads(commit.to_bytes()) | change))


def test_a_flipped_bit_anywhere_is_found_and_named(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    commits = [corpus.commits(column)[0] for column in corpus.columns()]
    for name in sorted({ref.name for commit in commits for ref in (commit.object, commit.sidecar)}):
        whole = corpus.store.get(name)
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        replace(corpus, name, bytes(flipped))
        assert problems(corpus) == [("checksum", name)]
        replace(corpus, name, whole)
    assert problems(corpus) == []


@pytest.mark.parametrize("change", [b"", b"x"])
def test_a_cut_or_longer_object_is_found(corpus_url: str, change: bytes) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    commit = latents(corpus)
    whole = corpus.store.get(commit.object.name)
    replace(corpus, commit.object.name, whole + change if change else whole[:-1024])
    assert problems(corpus) == [("size", commit.object.name)]


def test_a_deleted_object_is_found(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    tar, table = latents(corpus), corpus.commits("scores/basic")[0]
    corpus.store.delete([tar.object.name, tar.sidecar.name, table.object.name])
    assert sorted(problems(corpus)) == sorted(
        ("missing", name) for name in (tar.object.name, tar.sidecar.name, table.object.name)
    )


def test_a_damaged_commit_is_found(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    commit = corpus.commits("scores/basic")[0]
    replace(corpus, commit.name, commit.to_bytes()[:-9])
    assert problems(corpus) == [("commit", commit.name)]


def test_a_commit_under_another_name_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=2)
    commit = corpus.commits("scores/basic")[0]
    other = commit.name.replace(REF.shard, NEXT.shard)
    replace(corpus, other, commit.to_bytes())
    assert problems(corpus) == [("commit", other)]


def test_another_fingerprint_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=["scores/basic"])
    unit = corpus.units(SOURCE)[UNIT]
    _recommit(corpus, corpus.commits("scores/basic")[0], fingerprint="other")
    name = f"commits/units/{SOURCE}/{UNIT}.0.json"
    replace(corpus, name, unit.model_copy(update={"fingerprint": "other"}).to_bytes())
    assert sorted(problems(corpus)) == [
        ("fingerprint", "commits/scores/basic/demo/demo-000000-00.0.json"),
        ("fingerprint", name),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {"in": 6, "out": 6, "failed": 0}},
        {"counts": {"in": 7, "out": 5, "failed": 1}},
        {"reasons": {}},
        {"reasons": {"timeout": 1}},
    ],
)
def test_wrong_counts_are_found(tmp_path: Path, change: dict[str, Any]) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1)
    commit = latents(corpus)
    _recommit(corpus, commit, **change)
    assert problems(corpus) == [("counts", commit.sidecar.name)]


def test_a_rebuilt_input_makes_a_column_stale(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=2, columns=["captions/source", "text/minilm@source"])
    newer = write_images(corpus, REF, quality=50, generation=1)
    stale = [f"commits/{column}/demo/{REF.shard}.0.json" for column in ("captions/source", "text/minilm@source")]
    assert problems(corpus) == [("stale", name) for name in stale]
    columns = status(corpus).columns
    assert [columns[column][SOURCE].stale for column in ("images", "captions/source", "text/minilm@source")] == [
        0,
        1,
        1,
    ]
    captions = write_column(corpus, "captions/source", {"images": newer}, generation=1)
    assert problems(corpus) == [("stale", stale[1])] * 2  # for the images, and for the captions
    write_column(corpus, "text/minilm@source", {"images": newer, "captions/source": captions}, generation=1)
    assert problems(corpus) == []
    assert status(corpus).columns["text/minilm@source"][SOURCE].stale == 0


def test_inputs_that_are_not_those_that_are_there_are_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[LATENTS])
    commit = latents(corpus)
    true = json.loads(commit.to_bytes())["inputs"][0]
    for inputs in (
        [],
        [true | {"sha256": "other"}],
        [true | {"generation": 3}],
        [true | {"column": "captions/source"}],
    ):
        _recommit(corpus, commit, inputs=inputs)
        assert problems(corpus) == [("lineage", commit.name)]
    _recommit(corpus, commit)
    assert problems(corpus) == []


def _with_sidecar(corpus: Corpus, commit: Commit, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another sidecar, with a commit whose checksum and counts fit it."""
    table = change(corpus.sidecar(commit))
    path = Path(str(corpus.store.root)) / commit.sidecar.name
    path.unlink()
    write_table(path, table)
    data = path.read_bytes()
    ref = {"name": commit.sidecar.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_of = {"sidecar": ref} | ({"object": ref} if commit.object == commit.sidecar else {})
    lines = table.to_pylist()
    failed = [line["reason"] for line in lines if line["status"] == "failed"]
    counts = {"in": len(lines), "out": len(lines) - len(failed), "failed": len(failed)}
    _recommit(corpus, commit, **change_of, counts=counts, reasons={r: failed.count(r) for r in failed if r})


def _set(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    where = table.column_names.index(name)
    return table.set_column(where, pa.field(name, table.schema.field(name).type), pa.array(values, table[name].type))


@pytest.mark.parametrize(
    ("column", "change", "kinds"),
    [
        (LATENTS, lambda table: table.slice(0, 5), {"keys", "rows", "tar"}),
        (LATENTS, lambda table: table.take([1, 0, 2, 3, 4, 5]), {"rows", "keys", "tar"}),
        (LATENTS, lambda table: _set(table, "key", 0, "other"), {"keys", "tar"}),
        (LATENTS, lambda table: _set(table, "offset", 0, 0), {"tar"}),
        (LATENTS, lambda table: _set(table, "size", 3, 17), {"tar"}),
        (LATENTS, lambda table: _set(table, "offset", 2, 512), {"rows"}),
        (LATENTS, lambda table: _set(table, "status", 1, "maybe"), {"rows", "counts", "tar"}),
        (LATENTS, lambda table: _set(table, "reason", 1, "upstream"), {"rows"}),
        (LATENTS, lambda table: _set(table, "reason", 2, "timeout"), {"rows"}),
        (LATENTS, lambda table: table.drop_columns(["detail"]), {"sidecar"}),
        (LATENTS, lambda table: table.append_column("more", pa.nulls(len(table))), {"sidecar"}),
        ("scores/basic", lambda table: _set(table, "status", 2, "ok"), {"rows"}),
        ("scores/basic", lambda table: _set(table, "key", 1, "demo-000000-00-0"), {"keys"}),
        ("images", lambda table: _set(table, "key", 0, "a.b"), {"keys", "tar", "lineage"}),
    ],
)
def test_a_sidecar_that_contradicts_is_found(
    tmp_path: Path, column: str, change: Callable[[pa.Table], pa.Table], kinds: set[str]
) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1)
    _with_sidecar(corpus, corpus.commits(column)[0], change)
    assert {kind for kind, _ in problems(corpus)} == kinds


@pytest.mark.parametrize("column", ["images", LATENTS, "scores/basic"])
def test_a_sidecar_of_more_rows_than_its_commit_says_is_never_read(
    tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1)
    commit = corpus.commits(column)[0]
    _with_sidecar(corpus, commit, lambda table: table.take([0] * 300_000))
    _recommit(corpus, Corpus.open(corpus.url).commits(column)[0], counts=commit.counts, reasons=commit.reasons)
    corpus = Corpus.open(corpus.url)
    commit = corpus.commits(column)[0]

    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("it was read")

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.ParquetFile.read", read)
        with pytest.raises(DamagedError, match=f"{commit.sidecar.name} is damaged: it has 300,000 rows, the commit"):
            corpus.sidecar(commit)
        with pytest.raises(BrokenError, match=f"{commit.sidecar.name} is no sidecar: it has 300,000 rows"):
            ShardReader(corpus.store).open_ranges(commit)
    assert ("counts", commit.sidecar.name) in problems(corpus)


def _tar_bytes(tmp_path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    writer = TarWriter(tmp_path / "made.tar")
    for key, members in samples:
        writer.add(key, members)
    writer.close()
    return (tmp_path / "made.tar").read_bytes()


def _link_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.npy")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    return buffer.getvalue()


@settings(max_examples=60, deadline=None, print_blob=True)
@given(contents=st.lists(st.binary(max_size=1100), max_size=5), data=st.data())
def test_the_members_of_a_tar(
    contents: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    samples = [(f"key-{n}", {"npy": content, "json": b"{}"}) for n, content in enumerate(contents)]
    whole = _tar_bytes(tmp_path_factory.mktemp("tar"), samples)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert tar_members(io.BytesIO(whole)) == [(info.name, info.offset_data, info.size) for info in tar]
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    if damaged:
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        tar_members(io.BytesIO(bytes(damaged)))
    except ValueError:
        return


@pytest.mark.parametrize("damage", ["none", "order", "absent", "more", "double", "extension", "no tar", "link"])
def test_a_tar_that_is_not_what_the_sidecar_says_is_found(tmp_path: Path, damage: str) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus, shards=1)
    commit = latents(corpus)
    alive = [line["key"] for line in corpus.sidecar(commit).to_pylist() if line["status"] == "ok"]
    rows = [int(key[-1]) for key in alive]
    samples = [(k, {"npy": array_bytes(np.full((4, 8, 8), r, np.float16))}) for k, r in zip(alive, rows, strict=True)]
    data = _tar_bytes(
        tmp_path,
        {
            "order": samples[::-1],
            "absent": samples[:-1],
            "more": [*samples, ("more", samples[0][1])],
            "double": [(key, {"npy": members["npy"], "txt": b""}) for key, members in samples],
            "extension": [(key, {"npz": members["npy"]}) for key, members in samples],
        }.get(damage, samples),
    )
    if damage == "double":  # members of a sample are not side by side
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for extension in ("npy", "txt"):
                for key, members in samples:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(members["npy"])
                    tar.addfile(info, io.BytesIO(members["npy"]))
        data = buffer.getvalue()
    data = {"no tar": b"x" * 2000, "link": _link_tar()}.get(damage, data)
    replace(corpus, commit.object.name, data)
    ref = {"name": commit.object.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _recommit(corpus, commit, object=ref)
    # another extension for all samples is another tar, and whole
    wanted = [] if damage in ("none", "extension") else [("tar", commit.object.name)]
    assert problems(corpus) == wanted


def test_a_shard_that_is_too_long_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    commit = write_images(corpus, REF, rows=SHARD_SAMPLES + 1)
    assert problems(corpus) == [("rows", commit.sidecar.name)]
