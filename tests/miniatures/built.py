"""Build miniatures without Ray, and check every sample of a corpus against its miniature."""

import hashlib
import json
import pickle
import posixpath
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.rows import Row, read_rows
from microdit.pipeline.engine.plan import Plan
from microdit.pipeline.engine.retries import Retries
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.rows import image_bytes
from tests.miniatures import Expected
from tests.miniatures.real import sa1b_links
from tests.servers.files_server import FilesServer

NOISE = 4.0  # of 255: what a JPEG, and a second one after a resize, may change on average
HOUR = 3600


def build(config: BuildConfig) -> tuple[Corpus, list[str]]:
    """Run ingest and captions without Ray, as the engine does; return the corpus and the lines for the user."""
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    sources, stages, told = sources_of(config), stages_of(config), list[str]()
    declare(corpus, config, sources, stages)
    told += [source.terms for source in sources]
    plan = Plan(corpus, {source.name: source.units() for source in sources}, stages)
    retries = Retries(1, corpus.shard_samples)
    by_name = {source.name: source for source in sources}
    while plan.units:
        unit = plan.units.popleft()
        source = by_name[unit.source]
        with source.running(corpus, told.append):
            copy = pickle.loads(pickle.dumps(source))  # as a worker gets it
            record = ingest_unit(corpus, copy, retries.unit_task(unit), config)
        for shard in record.shards:
            plan.committed(source.name, shard, IMAGES)
    for number in reversed(plan.downstream_first()):
        stages[number].load()
        while job := plan.take(number):
            for commit in stages[number].run(corpus, retries.task(job)):
                plan.committed(commit.source, commit.shard, commit.column)
            plan.release(job)
    return corpus, told


def rows_of(corpus: Corpus, column: str, source: str) -> list[Row]:
    return [row for commit in corpus.commits(column) if commit.source == source for row in read_rows(corpus, commit)]


def check(corpus: Corpus, source: str, expected: Sequence[Expected]) -> dict[str, Expected]:
    """Check that a source has the expected samples and no others; return the good ones by key."""
    images = rows_of(corpus, IMAGES, source)
    assert len(images) == len(expected), [(row.key, row.scalars["reason"]) for row in images]
    assert len({row.key for row in images}) == len(images)
    by_key = {row.key: row.scalars for row in rows_of(corpus, "captions/source", source)}
    by_origin = {posixpath.normpath(row.scalars["origin"]): row for row in images}
    found = {}
    for sample in expected:
        unit = posixpath.basename(sample.unit)
        if sample.member:
            path = posixpath.normpath(f"{unit}/{sample.member}")
            row = next(row for origin, row in by_origin.items() if origin.endswith(f"/{path}"))
        else:
            row = next(r for o, r in by_origin.items() if f"/{unit}" in o and r.scalars["reason"] == sample.reason)
        assert (row.scalars["reason"] or "") == sample.reason, (sample.path, row.scalars["detail"])
        assert row.scalars["license"]
        if sample.reason:
            assert by_key[row.key]["reason"] == "upstream"
        else:
            check_sample(row, sample)
            assert by_key[row.key]["caption"] == one_line(sample.caption), sample.path
            found[row.key] = sample
    return found


def check_sample(row: Row, sample: Expected) -> None:
    picture, about, note = sample.picture, row.scalars, json.loads(row.members["json"])
    assert picture is not None
    stored = image_bytes(row.members)
    if picture.kept:
        assert stored == picture.data, sample.path
    else:
        assert picture.difference(stored) < NOISE, sample.path
    assert (about["width"], about["height"]) == picture.stored_size(), sample.path
    assert (about["original_width"], about["original_height"]) == picture.size
    assert about["sha256"] == hashlib.sha256(picture.data).hexdigest()
    assert about["caption"] == one_line(sample.caption)
    fields = json.loads(about["fields"] or "{}")
    for name, value in sample.fields.items():
        found = fields.get(name)
        wanted = pytest.approx(value) if isinstance(value, float) else one_line(value)
        assert found == wanted, (sample.path, name)
    for name in ("caption", "origin", "license", "sha256", "width", "original_width"):
        assert note[name] == about[name]


def one_line(text: str | None) -> str | None:
    """Put a text on one line, as corpora have it."""
    return None if text is None else " ".join(text.split())


@pytest.fixture
def links(tmp_path: Path, files_server: FilesServer) -> Path:
    path = tmp_path / "links.tsv"
    path.write_text(sa1b_links(files_server.url, int(time.time()) + HOUR))
    return path
