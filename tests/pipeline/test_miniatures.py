"""Real builds of every data set: the shipped configs against miniatures of what is published, sample by sample."""

import hashlib
import json
import pickle
import posixpath
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pipeline.check import verify
from pipeline.cli import app
from pipeline.config import BuildConfig, CaptionsColumn, load_config
from pipeline.corpus import Corpus
from pipeline.plan import Plan
from pipeline.retries import Retries
from pipeline.selections import select
from pipeline.source_options import TextcapsSource
from pipeline.sources import sources_of
from pipeline.stages import IMAGES, Row, declare, image_bytes, read_rows, stages_of
from pipeline.stages.ingest import ingest_unit
from tests.files_server import FilesServer, files_server
from tests.hub import TOKEN, Hub, hub
from tests.miniatures import LAYOUTS, Expected, Miniature, expand, layout
from tests.miniatures.encoders import publish_models
from tests.miniatures.real import BLIP3O, CC12M, MIRROR, cc12m, coco, sa1b, sa1b_links, sa1b_mirror, textcaps
from tests.miniatures.server import here, missed, publish
from tests.miniatures.synthetic import DIFFUSIONDB, FLUXREASON, JOURNEYDB, diffusiondb, fluxreason, journeydb

__all__ = ["files_server", "hub"]

NOISE = 4.0  # of 255: what a JPEG, and a second one after a resize, may change on average
HOUR = 3600
NO_ROOM = shutil._ntuple_diskusage(1000, 1000, 0)


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


def check(corpus: Corpus, source: str, expected: Sequence[Expected]) -> dict[str, Expected]:
    """Every sample of a source is what its miniature says, and there are no others; by their keys those that are ok."""
    images = rows_of(corpus, IMAGES, source)
    assert len(images) == len(expected), [(row.key, row.scalars["reason"]) for row in images]
    assert len({row.key for row in images}) == len(images)
    by_key = {row.key: row.scalars for row in rows_of(corpus, "captions/source", source)}
    by_origin = {posixpath.normpath(row.scalars["origin"]): row for row in images}
    found = {}
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
            assert by_key[row.key]["caption"] == one_line(sample.caption), sample.place
            found[row.key] = sample
    return found


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
    assert about["caption"] == one_line(sample.caption)
    fields = json.loads(about["fields"] or "{}")
    for name, value in sample.fields.items():
        found = fields.get(name)
        wanted = pytest.approx(value) if isinstance(value, float) else one_line(value)
        assert found == wanted, (sample.place, name)
    for name in ("caption", "origin", "license", "sha256", "width", "original_width"):
        assert note[name] == about[name]


def one_line(text: str | None) -> str | None:
    """A text as corpora have it."""
    return None if text is None else " ".join(text.split())


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


# -- the miniatures themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in LAYOUTS.glob("*.yaml")))
def test_layouts_count_what_they_name(name: str):
    about = layout(name)
    assert about["facts"] and about["licence"]
    if "links" in about:
        assert len(list(expand(about["links"]["rows"]))) == about["links"]["count"]
    for repository in about.get("repositories", {}).values():
        for one in [repository, *repository.get("subsets", {}).values()]:
            if isinstance(one, dict) and ("tars" in one or "zips" in one or "tgzs" in one):
                patterns = [one["tars"]] if "tars" in one else one.get("zips") or one["tgzs"]
                assert sum(len(list(expand(pattern))) for pattern in patterns) == one["count"]


def test_pictures_differ_by_more_than_noise():
    made = [journeydb(), cc12m(), diffusiondb("2m")]
    pictures = [e.picture for one in made for e in one.expected if e.picture is not None and not e.reason]
    for a in pictures:
        assert not a.kept or a.difference(a.data) < NOISE
        assert all(b.difference(a.data) > 3 * NOISE for b in pictures if b.name != a.name)


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


def of_webdataset() -> Made:
    files = f"hf://datasets/{BLIP3O}/{layout('sa1b')['repositories'][BLIP3O]['tars'].replace('000999', '000003')}"
    return sa1b_mirror(BLIP3O), {"adapter": "webdataset", "files": files, "license": "SA-1B's", "keys": "member"}


def of_parquet() -> Made:
    source = {"adapter": "parquet", "files": f"hf://datasets/{FLUXREASON}/fluxdb-*.parquet", "key": "id"}
    source |= {"caption": "caption_detail", "license": "Apache-2.0", "units": units_of(fluxreason())}
    return fluxreason(), source | {"fields": {"style": "caption_style", "image_clarity": "score_image_clarity"}}


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
    of_sa1b, of_sa1b_mirror, of_webdataset, of_parquet, of_cc12m, of_cc12m_llavanext, of_journeydb, of_journeydb_task2,
    of_diffusiondb, of_diffusiondb_2m, of_textcaps, of_coco,
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


def test_servers_that_fail_in_passing(tmp_path: Path, hub: Hub, files_server: FilesServer):
    """Answers that ask to wait, connections that break, and slow ones: it takes longer, and is the same."""
    publish([cc12m(), textcaps()], hub, files_server)
    hub.busy = [429]
    hub.faults = {"-0000.tar": [("cut", 20000)], "-0001.tar": [("status", 429), ("slow", 30000)]}
    urls = {
        name: here(url, files_server)
        for name, url in layout("textcaps")["urls"].items()
        if name in ("images", "captions")
    }
    files_server.files[urls["images"].removeprefix(f"{files_server.url}/")].faults = [("cut", 30000), ("status", 503)]
    _, source = of_cc12m()
    whole = config_of(tmp_path, source)
    config = whole.model_copy(
        update={"sources": {**whole.sources, "photos": TextcapsSource(adapter="textcaps", **urls)}}
    )
    corpus, _ = build(config)
    check(corpus, "it", cc12m().expected)
    check(corpus, "photos", textcaps().expected)
    assert [part for part in hub.ranges("-0000.tar") if part] == ["bytes=20000-"]


# -- the shipped configs -----------------------------------------------------------------------------------------------

CONFIGS = sorted(path.name for path in (Path(__file__).parent.parent.parent / "configs").glob("microdit-*.yaml"))


def paper(source: str) -> Miniature:
    """What the configs take of a data set: the captions that the paper trains on."""
    if source != "journeydb":
        makers = {"sa1b": sa1b, "cc12m": partial(cc12m, joined=True), "textcaps": textcaps, "diffusiondb": diffusiondb}
        return makers[source]()
    made = journeydb()
    return Miniature([e for e in made.expected if "/train/" in e.unit], made.repositories)


NAMES = ("sa1b", "cc12m", "textcaps", "journeydb", "diffusiondb")
# the units with samples in them, and one without; a test of all 14,000 would only take longer
UNITS = {
    "sa1b": ["sa_000000.tar", "sa_000001.tar", "sa_000002.tar", "sa_000999.tar"],
    "cc12m": ["cc12m-train-0000.tar", "cc12m-train-0001.tar", "cc12m-train-2175.tar"],
    "journeydb": ["train/000.tgz", "train/001.tgz", "train/199.tgz"],
    "diffusiondb": [
        "diffusiondb-large-part-1/part-000001.zip",
        "diffusiondb-large-part-1/part-000002.zip",
        "diffusiondb-large-part-2/part-010001.zip",
        "diffusiondb-large-part-2/part-014000.zip",
    ],
}


@pytest.fixture
def overrides(
    hub: Hub, files_server: FilesServer, links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """Everything is published; the overrides, by a config's name, that turn plain addresses to loopback."""
    publish([paper(name) for name in NAMES], hub, files_server)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def of(config: str) -> list[str]:
        sources = load_config(f"configs/{config}").sources
        urls = layout("textcaps")["urls"]
        given = [f"resources.scratch={tmp_path / 'scratch'}", "shard_samples=4"]
        given += [f"sources.{name}.units={UNITS[name]}" for name in sources if name in UNITS]
        if "sa1b" in sources:
            given.append(f"sources.sa1b.links={links}")
        if "textcaps" in sources:
            given += [f"sources.textcaps.{n}={here(urls[n], files_server)}" for n in ("images", "captions")]
        return [text.replace("%7Bsplit%7D", "{split}") for text in given]

    return of


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_reads_all_files(name: str, overrides: Callable[[str], list[str]]):
    """However many pages a listing has."""
    given = [f"sources.{source}.units=null" for source in UNITS]
    sources = load_config(f"configs/{name}").sources
    given = [text for text in given if text.split(".")[1] in sources]
    counts = {
        source.name: len(source.units())
        for source in sources_of(load_config(f"configs/{name}", [*overrides(name), *given]))
    }
    wanted = {
        "sa1b": layout("sa1b")["links"]["count"],
        "cc12m": layout("cc12m")["repositories"][CC12M]["count"],
        "textcaps": 1,
        "journeydb": layout("journeydb")["repositories"][JOURNEYDB]["count"] // 2,  # one split of two
        "diffusiondb": layout("diffusiondb")["repositories"][DIFFUSIONDB]["subsets"]["large"]["count"],
    }
    assert counts == {source: wanted[source] for source in sources}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config(
    name: str, overrides: Callable[[str], list[str]], tmp_path: Path, hub: Hub, files_server: FilesServer
):
    whole = load_config(f"configs/{name}", overrides(name), str(tmp_path / "corpus"))
    captions = {n: options for n, options in whole.columns.items() if isinstance(options, CaptionsColumn)}
    config = whole.model_copy(update={"columns": captions})
    corpus, told = build(config)
    for source in config.sources:
        found = check(corpus, source, paper(source).expected)
        for column, field in (("captions/llavanext", "llavanext_long"), ("captions/task2", "task2")):
            if column in captions:
                check_field(corpus, source, column, field, found)
    assert missed(hub, files_server) == []
    assert verify(corpus)["problems"] == []
    assert len(told) > len(config.sources)
    if name == "microdit-37m.yaml":  # whatever was kept of it is the paper's
        kept = Counter[str]()
        for commit in corpus.commits(IMAGES):
            kept[commit.source] += commit.counts["out"]
        assert select(corpus, "paper").rows == kept.total()
        assert select(corpus, "synthetic-only").rows == kept["journeydb"] + kept["diffusiondb"]


def check_field(corpus: Corpus, source: str, column: str, field: str, expected: Mapping[str, Expected]) -> None:
    """A captions column of a field: that, or the caption itself where the sample has none."""
    made = {row.key: row.scalars["caption"] for row in rows_of(corpus, column, source) if row.ok}
    assert made == {key: one_line(one.fields.get(field) or one.caption) for key, one in expected.items()}


def test_a_shipped_config_with_its_models(
    overrides: Callable[[str], list[str]], tmp_path: Path, hub: Hub, files_server: FilesServer
):
    """Small models of the same classes stand for the real ones: latents and embeddings of every sample."""
    publish_models(hub, tmp_path / "models")
    given = [*overrides("microdit-37m.yaml"), *(f"sources.{name}.units=[{units[1]}]" for name, units in UNITS.items())]
    given.append("resources.latents_batch=4")  # each batch is filled up, and here are few samples
    config = load_config("configs/microdit-37m.yaml", given, str(tmp_path / "corpus"))
    corpus, _ = build(config)
    read = {units[1] for units in UNITS.values()} | {"train_val_images.zip"}
    samples = [sample for name in NAMES for sample in paper(name).expected]
    wanted = sum(not s.reason for s in samples if s.unit.removeprefix("data/").replace("/imgs", "") in read)
    assert {column.partition("/")[0] for column in config.columns} == {"captions", "scores", "latents", "text"}
    for column in config.columns:
        assert sum(commit.counts["out"] for commit in corpus.commits(column)) == wanted, column
    assert missed(hub, files_server) == []
    assert verify(corpus)["problems"] == []


# -- the command line --------------------------------------------------------------------------------------------------


def microdit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_smallest_config_with_ray(
    overrides: Callable[[str], list[str]], tmp_path: Path, hub: Hub, files_server: FilesServer
):
    publish_models(hub, tmp_path / "models")  # the columns of all models are declared, though not made
    given = [
        "configs/microdit-1pct.yaml",
        "--corpus",
        tmp_path / "corpus",
        "--columns",
        "images,captions/source",
        "--json",
    ]
    found = microdit("build", *given, *overrides("microdit-1pct.yaml"))
    assert found.exit_code in (0, 1), found.output  # more than a fourth of a miniature is there to fail
    corpus = Corpus.open(str(tmp_path / "corpus"))
    for source in NAMES:
        check(corpus, source, paper(source).expected)
    assert "conceptual-12m" in found.stderr.lower() or "Conceptual 12M" in found.stderr
    assert missed(hub, files_server) == []


# -- mistakes ----------------------------------------------------------------------------------------------------------


def refused(*given: str) -> str:
    """The one message that a build ends with."""
    found = microdit("build", *given)
    assert found.exit_code == 2, (found.output, found.exception)
    said = [line for line in found.stderr.splitlines() if "microdit: " in line]
    assert len(said) == 1 and "Traceback" not in found.stderr, found.stderr
    return said[0]


@pytest.fixture
def synthetic(overrides: Callable[[str], list[str]], tmp_path: Path, hub: Hub) -> list[str]:
    publish_models(hub, tmp_path / "models")
    return [
        "configs/microdit-synthetic.yaml",
        "--corpus",
        str(tmp_path / "corpus"),
        *overrides("microdit-synthetic.yaml"),
    ]


@pytest.fixture
def real(overrides: Callable[[str], list[str]], tmp_path: Path, hub: Hub) -> list[str]:
    publish_models(hub, tmp_path / "models")
    return [
        "configs/microdit-22m-real.yaml",
        "--corpus",
        str(tmp_path / "corpus"),
        *overrides("microdit-22m-real.yaml"),
    ]


def test_no_token(synthetic: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    said = refused(*synthetic)
    for part in ("sources.journeydb.root", "JourneyDB/JourneyDB is gated", "hf auth login", "HF_TOKEN"):
        assert part in said


def test_terms_that_were_not_accepted(synthetic: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    said = refused(*synthetic)
    for part in ("has not accepted its terms", "https://huggingface.co/datasets/JourneyDB/JourneyDB"):
        assert part in said


def test_links_that_have_expired(real: list[str], links: Path, files_server: FilesServer):
    links.write_text(sa1b_links(files_server.url, int(time.time()) - HOUR))
    said = refused(*real)
    for part in ("sources.sa1b.links", str(links), "expired", "ai.meta.com/datasets/segment-anything-downloads"):
        assert part in said
    assert not [asked for asked in files_server.asked if "/m1/" in asked.path]  # told before the first byte


def test_a_list_of_links_that_is_not_there(real: list[str]):
    said = refused(*real, "sources.sa1b.links=nowhere.txt")
    assert "sources.sa1b.links = 'nowhere.txt'" in said
    assert "ai.meta.com" in said


def test_a_full_disk(real: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: NO_ROOM)
    said = refused(*real)
    for part in ("no room in the scratch folder", str(tmp_path / "scratch"), "resources.scratch"):
        assert part in said


def test_a_column_that_is_not_there(real: list[str]):
    table = "hf://datasets/PixArt-alpha/SAM-LLaVA-Captions10M@refs/convert/parquet/default/train/*.parquet"
    said = refused(*real, f"sources.sa1b.captions={table}", "sources.sa1b.captions_text=text")
    for part in ("sources.sa1b.captions", "'text'", "txt"):
        assert part in said
