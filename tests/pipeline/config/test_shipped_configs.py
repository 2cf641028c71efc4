"""The shipped configs against miniatures of what is published: real builds, and mistakes that are told."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from microdit.pipeline.cli.app import app
from microdit.pipeline.config.build import load_config
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.selection.selections import select
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.upkeep.verify import verify
from tests.miniatures import Expected, Miniature, layout
from tests.miniatures.built import HOUR, build, check, links, one_line, rows_of
from tests.miniatures.encoders import publish_models
from tests.miniatures.real import CC12M, cc12m, sa1b, sa1b_links, textcaps
from tests.miniatures.server import here, missed, publish
from tests.miniatures.synthetic import DIFFUSIONDB, JOURNEYDB, diffusiondb, journeydb
from tests.servers.files_server import FilesServer, files_server
from tests.servers.hub import TOKEN, Hub, hub

__all__ = ["files_server", "hub", "links"]
NO_ROOM = shutil._ntuple_diskusage(1000, 1000, 0)
CONFIGS = sorted(path.name for path in (Path(__file__).parents[3] / "configs").glob("microdit-*.yaml"))


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
    assert verify(corpus).problems == []
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
    assert verify(corpus).problems == []


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
