"""A repair of images carries over what can still be read, and never makes a shard poorer."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.stages.ingest import SCALARS, ingest_stage, ingest_unit
from microdit.pipeline.stages.stage import UnitTask
from microdit.pipeline.upkeep.damage import damage
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.small_corpus import replace
from tests.pipeline.stages.test_ingest import Given, config, jpeg
from tests.pipeline.stages.test_ingest import given as inputs_of

UNIT, SHARD = "given-000000", "given-000000-00"
Members = dict[str, dict[str, bytes]]


def _corpus(tmp_path: Path, source: Given) -> Corpus:
    about = config(tmp_path)
    corpus = Corpus.create(tmp_path / "corpus", "tried", 4)
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("given", {"adapter": "given", "images": ingest_stage(about.images)})
    ingest_unit(corpus, source, UnitTask(UNIT), about)
    return corpus


def _repair(tmp_path: Path, corpus: Corpus, source: Given) -> list[Commit]:
    """What `--repair` does: make the damaged shards again in their next generation."""
    highest = corpus.committed("images")
    redo = {
        shard: highest[where] + 1 for where in damage(corpus).redo["images"] if (shard := where[1]) and where in highest
    }
    made: list[Commit] = []
    ingest_unit(corpus, source, UnitTask(UNIT, redo), config(tmp_path), made.append)
    return made


def _stopped(count: int, reason: str = "connection") -> Given:
    """The same inputs while their server is down."""
    source = inputs_of(count, **{f"row{row}": None for row in range(count)})
    source.inputs = [type(item)(**{**item.__dict__, "reason": reason}) for item in source.inputs]
    return source


def _flip(corpus: Corpus, name: str, place: int) -> None:
    data = bytearray(corpus.store.get(name))
    data[place] ^= 1
    replace(corpus, name, bytes(data))


def _members(corpus: Corpus, commit: Commit) -> Members:
    with corpus.open_object(commit) as file:
        return dict(read_tar(file))


def _lines(corpus: Corpus, commit: Commit) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("offset",)} for line in corpus.sidecar(commit).to_pylist()]


def test_one_flipped_bit_costs_one_row_and_only_until_the_server_is_back(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, inputs_of(8))
    whole = corpus.commit("images", "given", SHARD, 0)
    members, lines = _members(corpus, whole), _lines(corpus, whole)
    _flip(corpus, whole.object.name, lines[2]["size"] // 2 + corpus.sidecar(whole)["offset"][2].as_py())

    (made,) = _repair(tmp_path, corpus, _stopped(8))
    assert (made.generation, made.counts) == (1, {"in": 4, "out": 3, "failed": 1})
    assert _members(corpus, made) == {key: files for key, files in members.items() if key != lines[2]["key"]}
    assert [line for line in _lines(corpus, made) if line["row"] != 2] == [line for line in lines if line["row"] != 2]
    assert [(problem.kind, problem.what) for problem in verify(corpus).problems] == [("unrepaired", made.name)]

    with pytest.raises(ValueError, match="could not be had from the source this time either"):
        _repair(tmp_path, corpus, _stopped(8))
    assert corpus.committed("images")["given", SHARD] == 1  # no generation that gains nothing

    source = inputs_of(8)
    (made,) = _repair(tmp_path, corpus, source)
    assert (made.generation, made.object.sha256) == (2, whole.object.sha256) and source.asked == [2]
    assert verify(corpus).ok


def test_a_shard_whose_pictures_are_whole_needs_no_source(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, inputs_of(4))
    whole = corpus.commit("images", "given", SHARD, 0)
    ingest_unit(corpus, _stopped(4), UnitTask(UNIT, {SHARD: 1}), config(tmp_path))
    newest = corpus.commit("images", "given", SHARD, 1)
    assert newest.counts["out"] == 4 and newest.object.sha256 == whole.object.sha256


@pytest.mark.parametrize("lost", ["commit", "sidecar", "damaged commit"])
def test_pictures_outlive_their_records(tmp_path: Path, lost: str) -> None:
    corpus = _corpus(tmp_path, inputs_of(4))
    whole = corpus.commit("images", "given", SHARD, 0)
    if lost == "sidecar":
        _flip(corpus, whole.sidecar.name, 30)  # in a page: it may still be read, or not
    else:
        replace(corpus, whole.name, b"{" if lost == "damaged commit" else None)
    (made,) = _repair(tmp_path, corpus, _stopped(4))
    if lost != "sidecar":
        assert _members(corpus, made) == _members(corpus, whole) and verify(corpus).ok
        return
    before = _members(corpus, whole)
    assert all(before[key] == files for key, files in _members(corpus, made).items())
    assert made.timings["unrepaired"] == 4 - made.counts["out"] > 0
    (made,) = _repair(tmp_path, corpus, inputs_of(4))
    assert made.object.sha256 == whole.object.sha256 and verify(corpus).ok


def test_what_is_gone_for_good_is_not_waited_for(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, inputs_of(4))
    whole = corpus.commit("images", "given", SHARD, 0)
    corpus.store.delete([whole.object.name])
    (made,) = _repair(tmp_path, corpus, _stopped(4, "http_404"))
    assert made.counts["out"] == 0 and verify(corpus).ok


def test_other_inputs_than_before_are_refused(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, inputs_of(4))
    corpus.store.delete([corpus.commit("images", "given", SHARD, 0).object.name])
    shorter, swapped = inputs_of(3), inputs_of(4)
    a, b = swapped.inputs[1:3]
    swapped.inputs[1:3] = [type(a)(**{**b.__dict__, "ordinal": 1}), type(a)(**{**a.__dict__, "ordinal": 2})]
    numbered = inputs_of(4)  # keys that say nothing of the picture; only a source of files says the hash
    numbered.inputs[2] = type(a)(**{**numbered.inputs[2].__dict__, "sha256": "0" * 64})
    for source, message in (
        (shorter, "gives 3 inputs, it gave 4"),
        (swapped, "row 1 is '000000002' in the source now"),
        (numbered, r"row 2 \(http://x/2\) has other bytes in the source than before"),
    ):
        with pytest.raises(ValueError, match=message):
            _repair(tmp_path, corpus, source)
    assert corpus.committed("images")["given", SHARD] == 0


def png(seed: int) -> bytes:
    """A picture that is converted when it comes: what is stored has no hash of its own."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_repair_never_makes_a_shard_poorer(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is flipped, and whatever the source gives meanwhile: rows not hit stay, and wrong ones are not taken."""
    folder = tmp_path_factory.mktemp("corpus")
    source = inputs_of(4)
    converted = data.draw(st.sets(st.integers(0, 3)))
    source.inputs = [
        type(item)(**{**item.__dict__, "data": png(i) if i in converted else jpeg(i)})
        for i, item in enumerate(source.inputs)
    ]
    corpus = _corpus(folder, source)
    whole = corpus.commit("images", "given", SHARD, 0)
    members, lines = _members(corpus, whole), corpus.sidecar(whole).to_pylist()
    flips = data.draw(st.lists(st.integers(0, whole.object.size - 1), min_size=1, max_size=3, unique=True))
    for place in flips:
        _flip(corpus, whole.object.name, place)
    hit = {row for row, line in enumerate(lines) for f in flips if 0 <= f - line["offset"] < line["size"]}
    back = data.draw(st.sets(st.integers(0, 3)))
    down = _stopped(4)
    down.inputs = [source.inputs[row] if row in back else item for row, item in enumerate(down.inputs)]
    (made,) = _repair(folder, corpus, down)
    stored = _members(corpus, made)
    for row, line in enumerate(lines):
        if row in back or row not in hit:
            assert stored[line["key"]] == members[line["key"]]
        elif row not in converted:
            assert line["key"] not in stored  # it is known to be wrong
    waiting = {row for row in range(4) if row not in back and (row in hit or row in converted)}
    assert made.timings.get("unrepaired", 0) == len(waiting)
    if waiting:
        (made,) = _repair(folder, corpus, source)
    assert made.object.sha256 == whole.object.sha256 and verify(corpus).ok


def test_a_row_that_never_came_was_not_lost(tmp_path: Path) -> None:
    source = _stopped(4)
    source.inputs[0] = inputs_of(1).inputs[0]
    corpus = _corpus(tmp_path, source)
    corpus.store.delete([corpus.commits("images")[0].object.name])
    (made,) = _repair(tmp_path, corpus, source)
    assert made.counts == {"in": 4, "out": 1, "failed": 3} and "unrepaired" not in made.timings
    assert not verify(corpus).problems
