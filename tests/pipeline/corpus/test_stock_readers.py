"""Others read what we write: stock webdataset and datasets, and the reader on the page that defines the format."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from microdit.pipeline.corpus.attempt import commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.upkeep.ls import ls
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    FAILED,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    make_corpus,
    write_column,
    write_images,
)

PAGE = Path(__file__).parents[3] / "docs/reference/corpus.md"
SHARDS = 3
ALIVE = [row for row in range(SHARD_SAMPLES) if row not in FAILED]
UNIT = unit_name(SOURCE, 0)
SHARD = [shard_name(UNIT, number) for number in range(SHARDS)]


# in the first shard, which stock readers take the features from, nothing is alive
KEYS = [f"{shard}-{row}" for shard in SHARD[1:] for row in ALIVE]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three shards; of the first all rows fail, so that its tars are empty. Even rows have empty captions."""
    made = make_corpus(tmp_path_factory.mktemp("readers") / "corpus")
    ref = ShardRef(source=SOURCE, unit=UNIT, shard=SHARD[0])
    images = write_images(made, ref, failed=range(SHARD_SAMPLES))
    for column in COLUMNS:
        write_column(made, column, {"images": images})
    made_before = set(made.committed("images"))
    for shard in SHARD[1:]:
        newest = {"images": write_images(made, ShardRef(source=SOURCE, unit=UNIT, shard=shard))}
        for column in COLUMNS:
            newest[column] = write_column(made, column, newest)
    commit_unit(made, SOURCE, UNIT, SHARDS * SHARD_SAMPLES, SHARD)
    assert made_before < set(made.committed("images"))
    return made


def _check_image(row: int, image: Any, meta: dict[str, Any]) -> None:
    assert image.size == (64 + row, 64 + row) and image.mode == "RGB"
    assert {"key", "source", "caption", "origin", "license", "width", "height", "sha256"} <= meta.keys()
    assert (meta["width"], meta["caption"]) == (64 + row, f"picture {row} — é" if row % 2 else "")


def _check_array(column: str, row: int, array: Any) -> None:
    array = np.asarray(array)
    if not array.size:  # `datasets` gives nested lists, which say of nothing but that it is nothing
        array = array.reshape(0, 8)
    assert array.shape == ((4, 8, 8) if column.startswith("latents") else (4 if row % 2 else 0, 8))
    assert (array == row).all()


@pytest.mark.parametrize("column", ["images", "latents/demo-64", "text/minilm@source"])
def test_webdataset_decodes_every_tar(corpus: Corpus, column: str) -> None:
    urls = list(ls(corpus, column))
    assert len(urls) == SHARDS - 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == KEYS
    for sample in samples:
        row = int(sample["__key__"].rpartition("-")[2])
        if column == "images":
            _check_image(row, sample["jpg"], sample["json"])
        else:
            assert sample["npy"].dtype == np.float16
            _check_array(column, row, sample["npy"])


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("column", ["images", "latents/demo-64", "text/minilm@source"])
def test_datasets_decodes_every_tar(corpus: Corpus, column: str, streaming: bool, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(
        "webdataset",
        data_files={"train": list(ls(corpus, column))},
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path),
    )
    samples = list(loaded)
    assert [sample["__key__"] for sample in samples] == KEYS
    for sample in samples:
        row = int(sample["__key__"].rpartition("-")[2])
        if column == "images":
            _check_image(row, sample["jpg"], sample["json"])
        else:
            _check_array(column, row, sample["npy"])


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_every_table(corpus: Corpus, streaming: bool, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(
        "parquet",
        data_files={"train": list(ls(corpus, "captions/source"))},
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path),
    )
    lines = list(loaded)
    assert [line["row"] for line in lines] == list(range(SHARD_SAMPLES)) * (SHARDS - 1)
    assert [line["caption"] for line in lines[:3]] == ["", "picture 1 — é", None]


def test_an_empty_tar_is_a_tar(corpus: Corpus) -> None:
    empty = [commit for commit in corpus.commits("latents/demo-64") if not commit.counts["out"]]
    assert [commit.shard for commit in empty] == SHARD[:1]
    url = f"{corpus.url}/{empty[0].object.name}"
    assert list(webdataset.WebDataset([url], shardshuffle=False, empty_check=False)) == []


def _run_reader(program: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reader_on_the_page_reads_a_corpus(corpus: Corpus) -> None:
    section = PAGE.read_text().split("## 7. Reading without this project")[1].split("\n## ")[0]
    program, _ = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(program.strip().splitlines()) <= 20 and "import pipeline" not in program
    assert corpus.store.root is not None
    lines = _run_reader(program, corpus.store.root.parent).splitlines()
    assert lines == [f"{key[:-2]} {key} (4, 8, 8) float16" for key in KEYS]


def test_a_repaired_shard_is_read_from_its_newest_generation(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus, shards=1, columns=["latents/demo-64"])
    corpus.store.delete([corpus.commits("latents/demo-64")[0].object.name])  # what was repaired
    write_column(corpus, "latents/demo-64", {"images": corpus.commits("images")[0]}, generation=10)
    section = PAGE.read_text().split("## 7. Reading without this project")[1].split("\n## ")[0]
    program, _ = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(_run_reader(program, tmp_path).splitlines()) == len(ALIVE)


def test_the_page_and_the_code_name_the_same_things(corpus: Corpus) -> None:
    """The commit on the page has the fields of a commit, and the sidecar the columns that the page lists."""
    page = PAGE.read_text()
    (example,) = re.findall(r"```json\n(\{\"version\": 1, \"column\".*?)```", page, re.S)
    commit = corpus.commits("latents/demo-64")[0]
    assert json.loads(example).keys() == json.loads(commit.to_bytes()).keys()
    sidecar = pq.read_schema(io.BytesIO(corpus.store.get(commit.sidecar.name)))
    table = page.split("### 3.3 Sidecars")[1].split("and then the column's scalars")[0]
    names = [name for line in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", line)]
    assert names == sidecar.names


def test_images_are_what_they_say(corpus: Corpus) -> None:
    commit = corpus.commits("images")[1]
    for line in corpus.sidecar(commit).to_pylist():
        if line["status"] == "ok":
            data = corpus.store.get_range(commit.object.name, line["offset"], line["size"])
            with Image.open(io.BytesIO(data)) as image:
                assert image.size == (line["width"], line["height"])
