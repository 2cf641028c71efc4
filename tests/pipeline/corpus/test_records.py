"""Records: what is stored comes back, and damage is one error."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, Declaration, InputRef, ObjectRef, UnitCommit, canonical
from tests.pipeline.helpers.small_corpus import (
    REF,
    make_corpus,
    write_images,
)

ROUND_TRIP = settings(max_examples=100, deadline=None, print_blob=True)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)

HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)

COUNTS = st.integers(0, 10**6)

COLUMNS = st.sampled_from(["images", "captions/source", "scores/basic", "latents/sdxl-256", "text/t5-xxl@long"])

SOURCES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    column, source, attempt = draw(COLUMNS), draw(SOURCES), f"20261101T101500-{draw(HASHES)[:8]}"
    unit = unit_name(source, draw(st.integers(0, 10**7)))
    shard = shard_name(unit, draw(st.integers(0, 120)))
    base = f"{column}/{source}/{shard}.{attempt}"
    table = column.startswith(("captions", "scores"))
    names = [f"{base}.parquet"] * 2 if table else [f"{base}.tar", f"{base}.rows.parquet"]
    data, sidecar = (ObjectRef(name=name, size=draw(COUNTS), sha256=draw(HASHES)) for name in names)
    return Commit(
        column=column,
        source=source,
        unit=unit,
        shard=shard,
        generation=draw(COUNTS),
        attempt=attempt,
        object=data,
        sidecar=sidecar,
        counts={"in": draw(COUNTS), "out": draw(COUNTS), "failed": draw(COUNTS)},
        reasons=draw(st.dictionaries(TEXT, COUNTS, max_size=3)),
        fingerprint=draw(HASHES),
        inputs=draw(
            st.lists(st.builds(InputRef, column=COLUMNS, generation=st.integers(0, 9), sha256=HASHES), max_size=2)
        ),
        timings=draw(st.dictionaries(TEXT, st.floats(0, 1e9), max_size=3)),
        host=draw(TEXT),
    )


@ROUND_TRIP
@given(commits())
def test_a_commit_gives_back_itself(commit: Commit) -> None:
    data = commit.to_bytes()
    back = Commit.parse(data)
    assert back.to_bytes() == data
    assert back.sha256 == commit.sha256 == hashlib.sha256(data).hexdigest() == pickle.loads(pickle.dumps(back)).sha256
    assert json.loads(data) == commit.model_dump()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@ROUND_TRIP
@given(commits(), st.integers(1, 4))
def test_the_hash_of_a_commit_is_that_of_the_stored_bytes(commit: Commit, indent: int) -> None:
    stored = json.dumps(json.loads(commit.to_bytes()) | {"more": 1}, indent=indent).encode()
    assert Commit.parse(stored).as_input().sha256 == hashlib.sha256(stored).hexdigest()


@ROUND_TRIP
@given(stage=st.dictionaries(TEXT, JSON, max_size=4), scalars=st.dictionaries(TEXT, TEXT, max_size=3))
def test_a_declaration_gives_back_itself(stage: dict[str, Any], scalars: dict[str, str]) -> None:
    declaration = Declaration(name="latents/x", kind="tar", stage=stage, scalars=scalars)
    back = Declaration.parse(declaration.to_bytes())
    assert back == declaration and back.to_bytes() == declaration.to_bytes()
    assert json.loads(declaration.to_bytes()) == {
        "name": "latents/x", "kind": "tar", "stage": stage, "scalars": scalars,
    }  # fmt: skip
    assert back.fingerprint == hashlib.sha256(canonical(stage)).hexdigest()


@ROUND_TRIP
@given(inputs=COUNTS, shards=st.lists(TEXT, max_size=4), fingerprint=HASHES)
def test_a_unit_commit_gives_back_itself(inputs: int, shards: list[str], fingerprint: str) -> None:
    record = UnitCommit(source="a", unit="a-000000", inputs=inputs, shards=shards, fingerprint=fingerprint)
    assert UnitCommit.parse(record.to_bytes()) == record


@ROUND_TRIP
@given(commits(), st.data())
def test_a_damaged_commit_is_another_commit_or_one_error(commit: Commit, data: st.DataObject) -> None:
    damaged = bytearray(commit.to_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        back = Commit.parse(bytes(damaged))
    except ValueError:
        return
    assert back.sha256 != commit.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"column": "../x"},
        {"column": "latents/../../etc"},
        {"source": "a/../b"},
        {"shard": "x/../../y"},
        {"attempt": "../../x"},
        {"version": 2},
        {"object": {"name": "/etc/passwd", "size": 1, "sha256": "0"}},
        {"sidecar": {"name": "../other/sidecar.parquet", "size": 1, "sha256": "0"}},
    ],
)
def test_a_commit_names_nothing_but_its_own_attempt(tmp_path: Path, change: dict[str, Any]) -> None:
    corpus = make_corpus(tmp_path)
    record = json.loads(write_images(corpus, REF).to_bytes())
    with pytest.raises(ValueError):
        Commit.parse(canonical(record | change))
