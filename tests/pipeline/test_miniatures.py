"""Real builds of every data set: the shipped configs against miniatures of what is published, sample by sample."""

import hashlib
import json
import pickle
import posixpath
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.check import verify
from pipeline.config import BuildConfig
from pipeline.corpus import Corpus
from pipeline.plan import Plan
from pipeline.retries import Retries
from pipeline.sources import sources_of
from pipeline.stages import IMAGES, Row, declare, image_bytes, read_rows, stages_of
from pipeline.stages.ingest import ingest_unit
from tests.files_server import FilesServer, files_server
from tests.hub import TOKEN, Hub, hub
from tests.miniatures import Expected, Miniature, layout
from tests.miniatures.real import BLIP3O, MIRROR, cc12m, coco, sa1b, sa1b_links, sa1b_mirror, textcaps
from tests.miniatures.server import here, missed, publish
from tests.miniatures.synthetic import DIFFUSIONDB, FLUXREASON, diffusiondb, fluxreason, journeydb

__all__ = ["files_server", "hub"]

NOISE = 4.0  # of 255: what a JPEG, and a second one after a resize, may change on average
HOUR = 3600


def build(config: BuildConfig) -> tuple[Corpus, list[str]]:
    """Ingest and captions without Ray, as the engine does them; and what the user is told."""
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    declare(corpus, config)
    sources, stages, told = sources_of(config), stages_of(config), list[str]()
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


def check(corpus: Corpus, source: str, expected: Sequence[Expected], captions: str = "captions/source") -> None:
    """Every sample of a source is what its miniature says, and there are no others."""
    images = rows_of(corpus, IMAGES, source)
    assert len(images) == len(expected), [(row.key, row.scalars["reason"]) for row in images]
    assert len({row.key for row in images}) == len(images)
    by_key = {row.key: row.scalars for row in rows_of(corpus, captions, source)}
    by_origin = {posixpath.normpath(row.scalars["origin"]): row for row in images}
    for sample in expected:
        unit = posixpath.basename(sample.unit)
        if sample.member:
            place = posixpath.normpath(f"{unit}/{sample.member}")
            row = next(row for origin, row in by_origin.items() if origin.endswith(f"/{place}"))
        else:
            row = next(r for o, r in by_origin.items() if f"/{unit}" in o and r.scalars["reason"] == sample.reason)
        assert (row.scalars["reason"] or "") == sample.reason, (sample.place, row.scalars["detail"])
        assert row.scalars["license"]
        if sample.reason:
            assert by_key[row.key]["reason"] == "upstream"
        else:
            check_sample(row, sample)
            assert by_key[row.key]["caption"] == sample.caption, sample.place


def check_sample(row: Row, sample: Expected) -> None:
    picture, about, note = sample.picture, row.scalars, json.loads(row.members["json"])
    assert picture is not None
    stored = image_bytes(row.members)
    if picture.kept:
        assert stored == picture.data, sample.place
    else:
        assert picture.difference(stored) < NOISE, sample.place
    assert (about["width"], about["height"]) == picture.stored_size(), sample.place
    assert (about["original_width"], about["original_height"]) == picture.size
    assert about["sha256"] == hashlib.sha256(picture.data).hexdigest()
    assert about["caption"] == sample.caption
    fields = json.loads(about["fields"] or "{}")
    for name, value in sample.fields.items():
        found = fields.get(name)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), (sample.place, name)
    for name in ("caption", "origin", "license", "sha256", "width", "original_width"):
        assert note[name] == about[name]


def config_of(folder: Path, source: dict[str, Any], columns: dict[str, Any] | None = None) -> BuildConfig:
    """A config of one source, called `it`."""
    return BuildConfig.model_validate(
        {
            "name": "mini",
            "corpus": str(folder / "corpus"),
            "shard_samples": 4,
            "sources": {"it": source},
            "columns": columns or {"captions/source": {}},
            "resources": {"scratch": str(folder / "scratch")},
        }
    )


def units_of(miniature: Miniature) -> list[str]:
    return list(dict.fromkeys(sample.unit for sample in miniature.expected))


@pytest.fixture
def links(tmp_path: Path, files_server: FilesServer) -> Path:
    path = tmp_path / "links.tsv"
    path.write_text(sa1b_links(files_server.url, int(time.time()) + HOUR))
    return path


# -- each source -------------------------------------------------------------------------------------------------------

JOURNEYDB_UNITS = ["train/000.tgz", "train/001.tgz", "train/199.tgz", "valid/000.tgz", "valid/001.tgz"]
Made = tuple[Miniature, dict[str, Any]]


def of_sa1b() -> Made:
    return sa1b(), {"adapter": "sa1b", "links": "LINKS", "units": units_of(sa1b())}


def of_sa1b_mirror() -> Made:
    repository = layout("sa1b")["repositories"][MIRROR]
    files = f"hf://datasets/{MIRROR}@{repository['revision']}/{repository['tars'].replace('{000000..000999}', '*')}"
    source = {"adapter": "sa1b", "files": files, "captions": None, "caption": "txt"}
    return sa1b_mirror(), source | {"units": units_of(sa1b_mirror())}


def of_cc12m() -> Made:
    return cc12m(), {"adapter": "cc12m", "clean": True, "units": 3}


def of_cc12m_llavanext() -> Made:
    table = "hf://datasets/CaptionEmporium/conceptual-captions-cc12m-llavanext/train.jsonl.gz"
    return cc12m("long", joined=True), {"adapter": "cc12m", "llavanext": table, "caption": "llavanext_long", "units": 3}


def of_journeydb() -> Made:
    return journeydb(), {"adapter": "journeydb", "splits": ["train", "valid"], "units": JOURNEYDB_UNITS}


def of_journeydb_task2() -> Made:
    source = {"adapter": "journeydb", "splits": ["train", "valid"], "caption": "task2", "units": JOURNEYDB_UNITS}
    return journeydb("task2"), source


def of_diffusiondb() -> Made:
    made = diffusiondb()
    return made, {"adapter": "diffusiondb", "units": units_of(made)}


def of_diffusiondb_2m() -> Made:
    return diffusiondb("2m"), {"adapter": "diffusiondb", "subset": "2m", "units": 3}


def of_textcaps() -> Made:
    urls = layout("textcaps")["urls"]
    return textcaps(), {"adapter": "textcaps", "images": urls["images"], "captions": urls["captions"]}


def of_coco() -> Made:
    urls = layout("coco")["urls"]
    return coco(), {"adapter": "coco", "images": urls["images"], "captions": urls["captions"]}


SOURCES = [
    of_sa1b, of_sa1b_mirror, of_cc12m, of_cc12m_llavanext, of_journeydb, of_journeydb_task2, of_diffusiondb,
    of_diffusiondb_2m, of_textcaps, of_coco,
]  # fmt: skip


@pytest.mark.parametrize("made", SOURCES, ids=lambda made: made.__name__.removeprefix("of_"))
def test_every_sample(
    made: Callable[[], Made],
    tmp_path: Path,
    hub: Hub,
    files_server: FilesServer,
    links: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    miniature, source = made()
    publish([miniature], hub, files_server)
    for name, value in source.items():
        if value == "LINKS":
            source[name] = str(links)
        elif isinstance(value, str) and value.startswith("http"):
            source[name] = here(value, files_server)
    if any(repository.gated for repository in miniature.repositories.values()):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    corpus, told = build(config_of(tmp_path, source))
    check(corpus, "it", miniature.expected)
    assert missed(hub, files_server) == []
    assert verify(corpus)["problems"] == []
    assert told[0]
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file() and path.suffix != ".lock"]
