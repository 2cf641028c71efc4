"""Ingest: from inputs to committed shards of images, with every fault in its row, again and again without doubles."""

import io
import json
import tarfile
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from microdit.pipeline.config.build import BuildConfig, Resources
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.config.sources import FetchOptions, OpenmojiSource, UrlsSource
from microdit.pipeline.corpus.attempt import commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.sources.openmoji.source import Openmoji, cache_folder
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.ingest import SCALARS, ingest_stage, ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import UnitTask


@dataclass
class Given:
    """A source of inputs that are at hand. `stop_at`: the ordinal at which reading breaks off with an error."""

    inputs: list[Input]
    name: str = "given"
    terms: str = "made for a test"
    stop_at: int | None = None
    asked: list[int] = field(default_factory=list)

    def stage(self) -> dict:
        return {"adapter": "given"}

    def units(self) -> list[str]:
        return [f"{self.name}-000000"]

    def running(self, corpus, say):
        return nullcontext()

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        for item in self.inputs:
            if item.ordinal == self.stop_at:
                raise ConnectionError("the source is gone")
            if wanted(item.ordinal):
                self.asked.append(item.ordinal)
                yield item
            else:
                yield Input(item.ordinal, item.key, None, item.origin, item.caption, item.license)


def jpeg(seed: int = 0, size: tuple[int, int] = (48, 40)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def given(count: int, **faults: bytes | None) -> Given:
    """Inputs 0, 1, 2, ...; `row3=b"..."` has these bytes in place of an image, `row3=None` a reason and no bytes."""
    inputs = []
    for i in range(count):
        data = faults.get(f"row{i}", jpeg(i))
        reason = "http_404" if data is None else None
        inputs.append(
            Input(
                i,
                f"{i:09d}",
                data,
                f"http://x/{i}",
                f"number {i}",
                "CC0",
                reason=reason,
                detail="404 Not Found" * (data is None),
            )
        )
    return Given(inputs)


def config(tmp_path: Path, **images) -> BuildConfig:
    return BuildConfig(
        name="tried",
        corpus=str(tmp_path / "corpus"),
        shard_samples=4,
        sources={"given": UrlsSource(adapter="urls", list="not read")},
        images=ImageOptions(min_side=32, **images),
        resources=Resources(decode_threads=2),
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus.create(tmp_path / "corpus", "tried", 4)
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("given", {"adapter": "given", "images": ingest_stage(ImageOptions(min_side=32))})
    return corpus


def lines(corpus: Corpus) -> list[dict]:
    return [line for commit in corpus.commits("images") for line in corpus.sidecar(commit).to_pylist()]


def test_a_unit_becomes_shards(tmp_path: Path, corpus: Corpus):
    written: list[Commit] = []
    record = ingest_unit(corpus, given(10), UnitTask("given-000000"), config(tmp_path), written.append)
    assert record.inputs == 10
    assert record.shards == ["given-000000-00", "given-000000-01", "given-000000-02"]
    assert corpus.units("given") == {"given-000000": record}
    assert [(c.shard, c.counts["in"], c.counts["out"], c.counts["failed"]) for c in written] == [
        (shard, count, count, 0) for shard, count in zip(record.shards, (4, 4, 2), strict=True)
    ]
    assert all(c.timings["seconds"] >= 0 for c in written)
    commits = corpus.commits("images")
    assert {c.fingerprint for c in commits} == {corpus.source("given").fingerprint}
    assert [line["row"] for line in lines(corpus)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    first = lines(corpus)[0]
    assert {k: first[k] for k in ("key", "status", "caption", "origin", "license", "width", "height", "format")} == {
        "key": "000000000",
        "status": "ok",
        "caption": "number 0",
        "origin": "http://x/0",
        "license": "CC0",
        "width": 48,
        "height": 40,
        "format": "jpeg",
    }
    with corpus.open_object(commits[0]) as file:
        samples = list(read_tar(file))
    key, members = samples[0]
    assert key == "000000000"
    assert members["jpg"] == jpeg(0)
    assert first["bytes"] == first["size"] == len(jpeg(0))
    note = json.loads(members["json"])
    assert list(note) == [
        "key", "source", "caption", "origin", "license", "fields", "width", "height", "original_width",
        "original_height", "sha256",
    ]  # fmt: skip
    assert note["sha256"] == first["sha256"]
    assert all(list(json.loads(m["json"])) == list(note) for _, m in samples)


def test_stock_webdataset_opens_what_was_made(tmp_path: Path, corpus: Corpus):
    ingest_unit(corpus, given(4, row2=b"nothing"), UnitTask("given-000000"), config(tmp_path))
    url = str(tmp_path / "corpus" / corpus.commits("images")[0].object.name)
    found = list(webdataset.WebDataset(url, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in found] == ["000000000", "000000001", "000000003"]
    assert found[0]["jpg"].size == (48, 40)
    assert found[0]["json"]["caption"] == "number 0"


def test_every_fault_stands_in_its_row(tmp_path: Path, corpus: Corpus):
    whole = jpeg(1)
    source = given(
        8,
        row0=None,
        row1=whole[: len(whole) // 2],
        row3=b"<html>",
        row4=jpeg(4, (10, 10)),
        row6=b"",
        row7=b"\xff\xd8\xff",
    )
    record = ingest_unit(corpus, source, UnitTask("given-000000"), config(tmp_path))
    found = lines(corpus)
    assert [line["reason"] for line in found] == [
        "http_404", "truncated", None, "not_an_image", "too_small", None, "not_an_image", "truncated",
    ]  # fmt: skip
    assert [line["status"] for line in found].count("ok") == 2
    assert record.inputs == 8
    for commit in corpus.commits("images"):
        assert commit.counts["in"] == commit.counts["out"] + commit.counts["failed"] == 4
    assert all(line["detail"] for line in found if line["status"] == "failed")
    assert all(line["origin"] and line["caption"] for line in found)
    assert found[1]["sha256"] and found[1]["bytes"] == len(whole) // 2
    assert found[0]["sha256"] is None


def test_a_shard_without_any_image_is_committed_too(tmp_path: Path, corpus: Corpus):
    ingest_unit(corpus, given(4, row0=b"", row1=b"", row2=None, row3=b""), UnitTask("given-000000"), config(tmp_path))
    [commit] = corpus.commits("images")
    assert commit.counts == {"in": 4, "out": 0, "failed": 4}
    with corpus.open_object(commit) as file, tarfile.open(fileobj=file) as tar:
        assert tar.getnames() == []


def test_what_is_committed_is_not_read_again(tmp_path: Path, corpus: Corpus):
    broken = given(12)
    broken.stop_at = 10
    with pytest.raises(ConnectionError):
        ingest_unit(corpus, broken, UnitTask("given-000000"), config(tmp_path))
    [first] = corpus.commits("images")
    assert first.shard == "given-000000-00"
    assert corpus.units("given") == {}
    again = given(12)
    written: list[Commit] = []
    record = ingest_unit(corpus, again, UnitTask("given-000000"), config(tmp_path), written.append)
    assert again.asked == list(range(4, 12))
    assert [c.shard for c in written] == record.shards[1:]
    assert record.inputs == 12
    assert corpus.commits("images")[0] == first
    assert not list(corpus.store.unfinished())


def test_a_unit_that_is_done_is_left_as_it_is(tmp_path: Path, corpus: Corpus):
    record = ingest_unit(corpus, given(5), UnitTask("given-000000"), config(tmp_path))
    commits = corpus.commits("images")
    again = given(5)
    assert ingest_unit(corpus, again, UnitTask("given-000000"), config(tmp_path)) == record
    assert again.asked == []
    assert corpus.commits("images") == commits


def test_shards_of_two_units_do_not_mix(tmp_path: Path, corpus: Corpus):
    for unit in ("given-000000", "given-000001"):
        ingest_unit(corpus, given(5), UnitTask(unit), config(tmp_path))
    assert [c.shard[-9:] for c in corpus.commits("images")] == ["000000-00", "000000-01", "000001-00", "000001-01"]
    assert all(record.inputs == 5 for record in corpus.units("given").values())


def test_two_workers_at_once_make_one_unit(tmp_path: Path, corpus: Corpus):
    def in_between(commit: Commit) -> None:
        if commit.shard.endswith("-00"):
            ingest_unit(corpus, given(10), UnitTask("given-000000"), config(tmp_path))

    written: list[Commit] = []
    record = ingest_unit(
        corpus, given(10), UnitTask("given-000000"), config(tmp_path), lambda m: (written.append(m), in_between(m))
    )
    assert [c.shard for c in corpus.commits("images")] == record.shards
    named = {c.object.name for c in corpus.commits("images")} | {c.sidecar.name for c in corpus.commits("images")}
    assert {item.name for item in corpus.store.list("images")} == named


def test_a_repair_writes_the_next_generation_of_the_shards_that_are_named(tmp_path: Path, corpus: Corpus):
    record = ingest_unit(corpus, given(10), UnitTask("given-000000"), config(tmp_path))
    before = corpus.commits("images")
    corpus.store.delete([before[1].object.name])
    again = given(10)
    task = UnitTask("given-000000", redo={record.shards[1]: 1}, generation=1)
    repaired = ingest_unit(corpus, again, task, config(tmp_path))
    assert again.asked == [4, 5, 6, 7]
    assert (repaired.shards, repaired.inputs, repaired.generation) == (record.shards, 10, 1)
    after = corpus.commits("images")
    assert [commit.generation for commit in after] == [0, 1, 0]
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1].object.sha256 == before[1].object.sha256


def test_with_care_the_same_shards_come_out(tmp_path: Path, corpus: Corpus):
    other = Corpus.create(tmp_path / "other", "tried", 4)
    other.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
    other.declare_source("given", {"adapter": "given", "images": ingest_stage(ImageOptions(min_side=32))})
    source = given(6, row0=None, row2=b"<html>", row4=jpeg(4, (900, 700)))
    ingest_unit(corpus, source, UnitTask("given-000000"), config(tmp_path))
    ingest_unit(other, source, UnitTask("given-000000", isolated=True), config(tmp_path))
    assert lines(corpus) == lines(other)
    assert [c.object.sha256 for c in corpus.commits("images")] == [c.object.sha256 for c in other.commits("images")]


def test_long_sides_are_reduced_and_formats_unified(tmp_path: Path, corpus: Corpus):
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 10, 10)).save(buffer, "PNG")
    ingest_unit(corpus, given(2, row0=buffer.getvalue()), UnitTask("given-000000"), config(tmp_path, max_side=100))
    first, second = lines(corpus)
    assert (first["width"], first["height"], first["original_width"], first["original_height"]) == (150, 100, 300, 200)
    assert (first["format"], second["format"]) == ("png", "jpeg")
    with corpus.open_object(corpus.commits("images")[0]) as file:
        (_, members), _ = read_tar(file)
    with Image.open(io.BytesIO(members["jpg"])) as image:
        assert (image.format, image.size) == ("JPEG", (150, 100))


def test_captions_that_utf8_cannot_write_do_no_harm(tmp_path: Path, corpus: Corpus):
    source = Given([Input(0, "a", jpeg(), "http://x/\udc80", "lone \ud800 surrogate"), Input(1, "b", None, "\udfff")])
    ingest_unit(corpus, source, UnitTask("given-000000"), config(tmp_path))
    assert [line["caption"] for line in lines(corpus)] == ["lone ? surrogate", ""]
    assert [line["reason"] for line in lines(corpus)] == [None, "missing"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path):
    hashes = []
    for name in ("one", "two"):
        corpus = Corpus.create(tmp_path / name, "tried", 4)
        corpus.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
        corpus.declare_source("given", {"adapter": "given"})
        ingest_unit(corpus, given(4, row1=jpeg(1, (900, 700))), UnitTask("given-000000"), config(tmp_path))
        hashes.append(corpus.commits("images")[0].object.sha256)
    assert hashes[0] == hashes[1]


def test_the_ingest_options_are_part_of_the_source(tmp_path: Path):
    (tmp_path / "list.tsv").write_text("http://x/1\tone\n")
    asked = config(tmp_path).model_copy(
        update={"sources": {"given": UrlsSource(adapter="urls", list=str(tmp_path / "list.tsv"))}}
    )
    corpus = Corpus.create(asked.corpus, asked.name, asked.shard_samples)
    declare(corpus, asked, sources_of(asked), stages_of(asked))
    assert corpus.source("given").made_by["images"]["max_side"] == 512
    commit_unit(corpus, "given", "given-000000", 0, [])  # something of it is there
    other = asked.model_copy(update={"images": ImageOptions(min_side=32, max_side=400)})
    with pytest.raises(ValueError, match=r"images\.max_side: the corpus has 512, the config says 400"):
        declare(corpus, other, sources_of(other), stages_of(other))


# -- openmoji --------------------------------------------------------------------------------------------------------
def test_the_demo_source_from_end_to_end(tmp_path: Path):
    quick = FetchOptions(timeout=3, idle_timeout=1)
    options = OpenmojiSource(adapter="openmoji", cache=str(tmp_path / "cache"), limit=30, unit_inputs=24, fetch=quick)
    asked = BuildConfig(
        name="demo",
        corpus=str(tmp_path / "corpus"),
        shard_samples=16,
        sources={"openmoji": options},
        images=ImageOptions(min_side=32),
    )
    source = Openmoji("openmoji", options)
    with pytest.raises(RuntimeError, match="running"):
        source.read("openmoji-000000", lambda ordinal: True)
    corpus = Corpus.create(asked.corpus, asked.name, asked.shard_samples)
    declare(corpus, asked, sources_of(asked), stages_of(asked))
    with source.running(corpus, print):
        for unit in source.units():
            ingest_unit(corpus, source, UnitTask(unit), asked)
    found = {line["origin"]: line for line in lines(corpus)}
    assert len(found) == source.prepared.inputs == len(lines(corpus))
    wanted = {
        "not_found": "http_404", "hang": "timeout", "html": "not_an_image", "truncated": "truncated",
        "tiny": "too_small", "bomb": "bomb", "duplicate": None,
    }  # fmt: skip
    reasons = {url: wanted[kind] for kind, urls in source.prepared.bad.items() for url in urls}
    assert {url: line["reason"] for url, line in found.items()} == {url: reasons.get(url) for url in found}
    assert corpus.source("openmoji").made_by["attribution"].startswith("All emojis designed by OpenMoji")
    assert found[next(iter(found))]["license"] == "CC BY-SA 4.0"
    # the list, and so the declaration, is the same whatever port the server has
    assert Openmoji("openmoji", options).stage() == source.stage()
    assert corpus.column("images").scalars == SCALARS
    shard = ShardRef(source="openmoji", unit="openmoji-000000", shard="openmoji-000000-01")
    assert corpus.commit("images", shard.source, shard.shard, 0).counts["in"] == 8  # 24 = 16 + 8


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    options = OpenmojiSource(adapter="openmoji", cache=str(tmp_path / "file"), limit=30)
    with pytest.raises(ValueError, match=r"sources\.openmoji\.cache: .*file.* cannot be written"):
        Openmoji("openmoji", options).units()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "microdit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache/microdit"
    assert cache_folder(str(tmp_path / "mine")) == tmp_path / "mine"


def test_colour_profiles_are_counted_in_the_commit(tmp_path: Path, corpus: Corpus):
    cases = Path(__file__).parents[2] / "data" / "cases" / "images"
    adobe, broken = ((cases / name).read_bytes() for name in ("i-adobergb-jpg.jpg", "i-big-png.png"))
    ingest_unit(corpus, given(6, row1=adobe, row2=broken, row3=adobe), UnitTask("given-000000"), config(tmp_path))
    first, second = corpus.commits("images")
    assert (first.timings["profiles_converted"], first.timings["profiles_ignored"]) == (2, 1)
    assert not any(name.startswith("profiles") for name in second.timings)


def test_the_declaration_names_the_reduction_only_if_it_is_another() -> None:
    assert "reduce" not in ingest_stage(ImageOptions())
    assert ingest_stage(ImageOptions(reduce="fast"))["reduce"] == "fast"
