"""`damage`: problems become work, or are beyond a build."""

from pathlib import Path

import pytest
from obstore.exceptions import PermissionDeniedError

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.tables.sample_table import sample_table
from microdit.pipeline.upkeep.damage import damage
from tests.pipeline.helpers.small_corpus import (
    LATENTS,
    NEXT,
    REF,
    SOURCE,
    UNIT,
    fill,
    latents,
    make_corpus,
    replace,
    write_images,
)


def test_a_whole_corpus_has_no_damage(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    result = damage(corpus)
    assert not result.redo and not result.beyond


def test_damage_becomes_work(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, columns=[LATENTS, "captions/source"])
    replace(corpus, latents(corpus).object.name, b"damaged")
    replace(corpus, f"commits/captions/source/{SOURCE}/{NEXT.shard}.0.json", b"{")
    assert damage(corpus).redo == {LATENTS: {(SOURCE, REF.shard)}, "captions/source": {(SOURCE, NEXT.shard)}}
    write_images(corpus, NEXT, generation=1)  # and so the latents made of them are stale
    assert damage(corpus).redo[LATENTS] == {(SOURCE, REF.shard), (SOURCE, NEXT.shard)}


def test_a_unit_that_lacks_a_shard_is_read_again(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, columns=[])
    corpus.store.delete([f"commits/{IMAGES}/{SOURCE}/{NEXT.shard}.0.json"])
    assert damage(corpus).redo == {UNITS: {(SOURCE, UNIT)}, IMAGES: {(SOURCE, NEXT.shard)}}
    replace(corpus, f"commits/{UNITS}/{SOURCE}/{UNIT}.0.json", b"{")
    assert damage(corpus).redo == {UNITS: {(SOURCE, UNIT)}}


def test_a_damaged_table_is_deleted(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, columns=[])
    name = sample_table(corpus).parts["images", ""][0].name
    replace(corpus, name, b"damaged")
    result = damage(corpus)
    assert not result.redo and not result.beyond
    assert not corpus.store.exists(name)


def test_what_no_build_mends_is_told(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, columns=[])
    corpus.store.create("commits/notes.txt", b"")
    replace(corpus, "columns/scores/basic.json", b"{")
    assert sorted(str(problem).split(": ")[:2] for problem in damage(corpus.open(tmp_path)).beyond) == [
        ["declaration", "columns/scores/basic.json"],
        ["stray", "commits/notes.txt"],
    ]


@pytest.mark.parametrize("error", [PermissionDeniedError("403 Forbidden"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("method, part", [("open", ".tar"), ("get", ".0.json"), ("open", "tables/"), ("get", "units/")])
def test_what_cannot_be_read_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, method: str, part: str
) -> None:
    """A storage that refuses, or fails, says nothing about the bytes."""
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    sample_table(corpus)
    before = {item.name for item in corpus.store.list()}
    read = getattr(type(corpus.store), method)

    def refuse(self: object, name: str) -> object:
        if part in name:
            raise error
        return read(self, name)

    monkeypatch.setattr(type(corpus.store), method, refuse)
    with pytest.raises(RequestError, match=f"cannot be read, the first is .*{part}.*no damage"):
        damage(corpus)
    assert {item.name for item in corpus.store.list()} == before
