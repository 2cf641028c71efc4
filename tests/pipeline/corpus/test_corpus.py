"""A corpus: its root, its declarations, and reading its commits."""

import pickle
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.storage.store import open_store
from tests.pipeline.helpers.small_corpus import (
    FAILED,
    REF,
    SHARD_SAMPLES,
    SOURCE,
    keys_of,
    make_corpus,
    write_column,
    write_images,
)


def test_create_makes_or_opens(corpus_url: str) -> None:
    made = Corpus.create(corpus_url, "one", 64)
    assert (made.name, made.shard_samples, made.url) == ("one", 64, corpus_url)
    for again in (Corpus.create(corpus_url, "one", 64), Corpus.open(corpus_url), pickle.loads(pickle.dumps(made))):
        assert (again.name, again.shard_samples) == ("one", 64)
    with pytest.raises(RequestError, match=r"shard_samples is 64, the config says 128; set shard_samples to 64"):
        Corpus.create(corpus_url, "one", 128)
    with pytest.raises(RequestError, match=r"name is 'one', the config says 'two'"):
        Corpus.create(corpus_url, "two", 64)


def test_there_is_no_corpus(corpus_url: str) -> None:
    with pytest.raises(RequestError, match=r"there is no corpus\.json"):
        Corpus.open(corpus_url)


def test_a_corpus_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for action in (lambda: Corpus.open(tmp_path / "file"), lambda: Corpus.create(tmp_path / "file" / "corpus", "x")):
        with pytest.raises(RequestError, match=r"file.*cannot be (reached|written)"):
            action()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr("microdit.pipeline.storage.bucket.FIRST_PATIENCE", 0.5)
    with pytest.raises(RequestError, match=r"s3://bucket/x: it cannot be reached"):
        Corpus.open("s3://bucket/x")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"{}", b'{"version": 1, "name": "x"}']
    + [b'{"version": 1, "name": "x", "shard_samples": %s}' % value for value in (b"null", b'"many"', b"0", b"1e999")],
)
def test_a_damaged_root_is_named(corpus_url: str, data: bytes) -> None:
    open_store(corpus_url).create("corpus.json", data)
    with pytest.raises(RequestError, match=r"corpus\.json is damaged"):
        Corpus.open(corpus_url)


def test_a_corpus_of_another_version_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).create("corpus.json", b'{"version": 2, "name": "x", "shard_samples": 1}')
    with pytest.raises(RequestError, match="format version is 2, this microdit reads 1"):
        Corpus.open(tmp_path)


def test_a_column_is_declared_once_for_ever(corpus_url: str) -> None:
    corpus = Corpus.create(corpus_url, "x")
    stage = {"model": {"name": "vae", "revision": "a"}, "resolution": 64}
    declared = corpus.declare_column("latents/vae-64", stage, {"norm": "float32"})
    assert corpus.declare_column("latents/vae-64", stage, {"norm": "float32"}) == declared
    assert Corpus.open(corpus_url).columns() == {"latents/vae-64": declared}
    with pytest.raises(RequestError, match=r"model\.revision: the corpus has 'a', the config says 'b'"):
        corpus.declare_column(
            "latents/vae-64", stage | {"model": {"name": "vae", "revision": "b"}}, {"norm": "float32"}
        )
    with pytest.raises(RequestError, match="its scalars differ"):
        corpus.declare_column("latents/vae-64", stage)
    with pytest.raises(RequestError, match=r"column 'text/x': .* it has: latents/vae-64"):
        corpus.column("text/x")
    source = corpus.declare_source("cc12m", {"adapter": "urls"})
    assert corpus.sources() == {"cc12m": source}
    with pytest.raises(RequestError, match="adapter: the corpus has 'urls', the config says 'tars'"):
        corpus.declare_source("cc12m", {"adapter": "tars"})


@pytest.mark.parametrize("scalars", [{"width": "int16"}, {"row": "int32"}])
def test_bad_scalars(tmp_path: Path, scalars: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="types are"):
        Corpus.create(tmp_path, "x").declare_column("images", {}, scalars)


def test_a_shard_is_written_and_read(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    images = write_images(corpus, REF)
    latents = write_column(corpus, "latents/demo-64", {"images": images})
    captions = write_column(corpus, "captions/source", {"images": images})
    assert images.counts == {"in": SHARD_SAMPLES, "out": SHARD_SAMPLES - 1, "failed": 1}
    assert images.reasons == {"http_404": 1} and latents.reasons == {"upstream": 1}
    assert latents.inputs == [images.as_input()]
    assert captions.object == captions.sidecar
    other = Corpus.open(corpus_url)
    assert other.commits("images") == [images] and other.commits("latents/demo-64") == [latents]
    assert other.committed("captions/source") == {(SOURCE, REF.shard): 0} == other.committed("captions/source", SOURCE)
    assert other.committed("captions") == other.committed("images", "elsewhere") == {}
    alive = [key for row, key in enumerate(keys_of(REF)) if row not in FAILED]
    with other.open_object(other.commit("images", SOURCE, REF.shard, 0)) as file:
        samples = list(read_tar(file))
    assert [key for key, _ in samples] == alive
    sidecar = other.sidecar(images).to_pylist()
    assert [line["key"] for line in sidecar] == keys_of(REF)
    for line, (_, members) in zip((line for line in sidecar if line["status"] == "ok"), samples, strict=True):
        assert other.store.get_range(images.object.name, line["offset"], line["size"]) == members["jpg"]
    assert [line["caption"] for line in other.sidecar(captions).to_pylist()][:3] == ["", "picture 1 — é", None]


def test_a_damaged_commit_is_named(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    corpus.store.create("commits/images/demo/demo-000000-00.0.json", b"{}")
    corpus.store.create("commits/images/demo/stray", b"{}")
    corpus.store.create("commits/units/demo/demo-000000.0.json", b"\x00")
    assert corpus.committed("images") == {(SOURCE, REF.shard): 0}
    for action in (lambda: corpus.commits("images"), lambda: corpus.commit("images", SOURCE, REF.shard, 0)):
        with pytest.raises(RequestError, match=r"commits/images/demo/demo-000000-00\.0\.json is damaged"):
            action()
    with pytest.raises(RequestError, match=r"commits/units/demo/demo-000000\.0\.json is damaged"):
        corpus.units(SOURCE)
