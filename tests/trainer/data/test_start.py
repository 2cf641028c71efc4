"""How the processes of a run come by its samples: one reads, the others map what it made."""

import mmap
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import load_config
from microdit.pipeline.corpus.cache_room import CacheRoom
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.selection import run_samples
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.run_samples import RunSamples, split
from microdit.pipeline.selection.sample_index import SampleIndex, index_samples
from microdit.pipeline.tables import status_table
from microdit.trainer.data.samples import open_samples
from microdit.trainer.processes import joined_team
from microdit.trainer.recipe import Recipe, load_recipe
from tests.trainer.conftest import build_corpus, build_recipe
from tests.trainer.test_shipped_recipes import CORPORA

COLUMNS = ["latents/demo-32", "text/tiny@source", "text/tiny@long"]


def _begin(rank: int, environment: dict[str, str], recipe: dict, log: Path, killed: bool) -> None:
    """One process of a start: a line in `log` for each sidecar that it reads, and one for what it has at the end."""
    os.environ.update(environment, RANK=str(rank))
    sidecar = Corpus.sidecar

    def write(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{rank} {text}\n")

    def read(self, commit, *columns):
        write("sidecar")
        if killed and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return sidecar(self, commit, *columns)

    Corpus.sidecar = read  # type: ignore[method-assign]
    with joined_team() as team:
        try:
            write(" ".join(index.digest for index in open_samples(Recipe.model_validate(recipe), team).legs))
        except RequestError as error:
            write(f"refused {error}")


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., list[list[str]]]]:
    """Begin a recipe in several processes, and some such jobs at once; gives the words that they wrote."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["microdit.trainer.train", "tests.trainer.conftest"])
    members = []

    def run(recipe: Recipe, world: int, killed: bool = False, jobs: int = 1) -> list[list[str]]:
        log, started = tmp_path / "log.txt", []
        log.write_text("")
        for _ in range(jobs):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            environment = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            given = environment, recipe.model_dump(mode="json"), log, killed
            started += [context.Process(target=_begin, args=(rank, *given)) for rank in range(world)]
        members.extend(started)
        for member in started:
            member.start()
        for member in started:
            member.join(60)
        return [line.split(maxsplit=1) for line in log.read_text().splitlines()]

    yield run
    for member in members:
        member.kill()


def is_mapped(array: np.ndarray) -> bool:
    base = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return isinstance(base, mmap.mmap)


def plain_samples(corpus: Corpus) -> list[SampleIndex]:
    """The slow way to what a leg trains on and what is held out."""
    index, _ = index_samples(corpus, newest_commits(corpus, COLUMNS))
    (left,), (held,) = split([index], 10, seed=3)
    return [left, held]


def test_one_process_reads_and_the_next_start_reads_nothing(corpus: Corpus, tmp_path: Path, begin) -> None:
    recipe = build_recipe(corpus, tmp_path / "run", cache_folder=str(tmp_path), hold_out=10)
    digest = plain_samples(corpus)[0].digest
    first = begin(recipe, world=3)
    assert [line for line in first if line[1] == "sidecar"] == [["0", "sidecar"]] * 18
    assert sorted(line for line in first if line[1] != "sidecar") == [[f"{n}", f"{digest} {digest}"] for n in range(3)]
    assert sorted(begin(recipe, world=3)) == [[f"{n}", f"{digest} {digest}"] for n in range(3)]

    samples = open_samples(recipe)
    for kept, plain in zip((samples.legs[0], samples.held), plain_samples(corpus), strict=True):
        assert kept.shards == plain.shards and is_mapped(kept.row) and is_mapped(kept.shard)
        assert np.array_equal(kept.shard, plain.shard) and np.array_equal(kept.row, plain.row)
    commits = newest_commits(corpus, COLUMNS)
    assert {column: dict(of) for column, of in samples.columns.items()} == commits


def test_a_first_process_that_dies_is_named_and_the_next_start_goes_on(corpus: Corpus, tmp_path: Path, begin) -> None:
    recipe = build_recipe(corpus, tmp_path / "run", cache_folder=str(tmp_path))
    lines = begin(recipe, world=2, killed=True)
    assert [line for line in lines if line[0] == "1"] == [["1", lines[-1][1]]]
    assert lines[-1][1].startswith("refused process 1: the first process of the run died")
    assert len([line for line in begin(recipe, world=2) if line[1] != "sidecar"]) == 2


def test_two_jobs_that_begin_at_once_read_once(corpus: Corpus, tmp_path: Path, begin) -> None:
    recipe = build_recipe(corpus, tmp_path / "run", cache_folder=str(tmp_path))
    lines = begin(recipe, world=1, jobs=2)
    assert sum(line[1] == "sidecar" for line in lines) == 18 and len(lines) == 20


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sidecars that this process reads."""
    read: list[str] = []
    sidecar = Corpus.sidecar

    def noted(self: Corpus, commit: Commit, *columns: list[str]) -> pa.Table:
        read.append(commit.name)
        return sidecar(self, commit, *columns)

    monkeypatch.setattr(Corpus, "sidecar", noted)
    return read


@pytest.mark.parametrize("damage", ["cut", "changed", "manifest", "gone"])
def test_damaged_arrays_are_made_again(corpus: Corpus, tmp_path: Path, reads, damage: str) -> None:
    recipe = build_recipe(corpus, tmp_path / "run", cache_folder=str(tmp_path))
    digest = open_samples(recipe).legs[0].digest
    reads.clear()
    rows, manifest = next(tmp_path.glob("*/*/row-0.npy")), next(tmp_path.glob("*/*/manifest.json"))
    if damage == "cut":
        rows.write_bytes(rows.read_bytes()[:-1])
    elif damage == "changed":
        rows.write_bytes(rows.read_bytes()[:-1] + b"x")
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes().replace(b"art-000000-01", b"art-000000-02", 1))
    else:
        rows.unlink()
    assert open_samples(recipe).legs[0].digest == digest and len(reads) == 18
    assert open_samples(recipe).legs[0].digest == digest and len(reads) == 18


def test_another_machine_reads_one_table_and_growth_only_what_is_new(tmp_path: Path, reads, monkeypatch) -> None:
    monkeypatch.setattr(status_table, "LEAST", 1)
    corpus = build_corpus(tmp_path / "corpus", failed={"latents/demo-32": (3,)})

    def begin(machine: str, **fields) -> RunSamples:
        reads.clear()
        return open_samples(build_recipe(corpus, tmp_path / "run", cache_folder=str(tmp_path / machine), **fields))

    first = begin("a")
    assert len(reads) == 18
    assert begin("b").legs[0].digest == first.legs[0].digest and not reads
    begin("c", stages=[{"latents": "latents/demo-64", "batch": 16, "learning_rate": 1e-3, "steps": 1}])
    assert len(reads) == 6  # of the other latents
    build_corpus_more(tmp_path)
    assert len(begin("a").legs[0]) > len(first.legs[0]) and 0 < len(reads) <= 12
    (table,) = sorted((tmp_path / "corpus/tables/statuses").glob("*.parquet"), key=os.path.getmtime)[-1:]
    table.write_bytes(b"x" + table.read_bytes()[1:])
    assert len(begin("d").legs[0]) == len(begin("a").legs[0])


def build_corpus_more(tmp_path: Path) -> None:
    """Add two units to the corpus of a folder, by a corpus with more of them."""
    build_corpus(tmp_path / "more", units=3, failed={"latents/demo-32": (3,)})
    for path in sorted((tmp_path / "more").rglob("*art-000002*")):
        to = tmp_path / "corpus" / path.relative_to(tmp_path / "more")
        if path.is_file():
            to.parent.mkdir(parents=True, exist_ok=True)
            path.rename(to)


def test_what_does_not_fit_is_refused_before_anything_is_read(s3_url: str, tmp_path: Path, monkeypatch) -> None:
    corpus = build_corpus(s3_url, units=1)
    monkeypatch.setattr(run_samples, "read_statuses", lambda *_: pytest.fail("it was read"))
    fields = {"cache_folder": str(tmp_path), "cache_gb": 5e-5}
    with pytest.raises(RequestError, match=r"cache_gb = 5e-05.* set cache_gb to 1 or more.*set cache_mb to 1 or more"):
        open_samples(build_recipe(corpus, tmp_path / "run", **fields))


@pytest.mark.parametrize("name", list(CORPORA))
def test_the_papers_recipes_fit_a_machine_of_8_gpus(name: str) -> None:
    recipe, corpus = load_recipe(f"configs/recipes/paper-{name}.yaml"), load_config(f"configs/{CORPORA[name]}.yaml")
    assert recipe.cache_folder is not None and recipe.cache_gb <= 2000 and 8 * recipe.cache_mb < 1 << 20
    room = CacheRoom(recipe.lanes // 8, recipe.shuffle_window, 8, recipe.cache_mb << 20, int(recipe.cache_gb * 1e9))
    for leg in recipe.stages:
        resolution = corpus.columns[leg.latents].resolution  # type: ignore[union-attr]
        sample = {leg.latents: 2 * (16 if "ostris" in leg.latents else 4) * (resolution // 8) ** 2}
        sample |= dict.fromkeys(recipe.text, 2 * 1024 * recipe.text_lengths[-1])
        # 1,536 bytes for the headers of a member, and its line of the sidecar
        sizes = {column: [corpus.shard_samples * (size + 1536)] * 28_741 for column, size in sample.items()}
        assert room.spread(sizes, recipe.lanes) == 1.0
        with pytest.raises(RequestError, match="cache_mb"):  # it is not the memory that would do
            CacheRoom(16, 4, 8, 2 << 30, None).spread(sizes, recipe.lanes)
