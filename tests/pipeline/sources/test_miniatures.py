"""Real builds of every data set against miniatures of what is published, sample by sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.sources import TextcapsSource
from microdit.pipeline.upkeep.verify import verify
from tests.miniatures import LAYOUTS, Miniature, expand, layout
from tests.miniatures.built import NOISE, build, check, links
from tests.miniatures.real import BLIP3O, MIRROR, cc12m, coco, sa1b, sa1b_mirror, textcaps
from tests.miniatures.server import here, missed, publish
from tests.miniatures.synthetic import FLUXREASON, diffusiondb, fluxreason, journeydb
from tests.servers.files_server import FilesServer, files_server
from tests.servers.hub import TOKEN, Hub, hub

__all__ = ["files_server", "hub", "links"]


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
    assert verify(corpus).problems == []
    assert told[0]
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_servers_that_fail_in_passing(tmp_path: Path, hub: Hub, files_server: FilesServer):
    """Retry-After, broken connections and slow ones: the result is the same."""
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
