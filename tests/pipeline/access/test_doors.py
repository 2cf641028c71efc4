"""The doors of an opened corpus: SQL and Arrow, and datasets of webdataset, torch and Ray."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
import webdataset
from torch.utils.data import DataLoader

import microdit
from microdit.pipeline.access.joined import JoinedRow
from microdit.pipeline.access.reader import ColumnCounts, CorpusReader
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.selections import select
from tests.pipeline.access.test_joined import ALL, OK, WHERE
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    LATENTS,
    NEXT,
    REF,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    make_corpus,
    write_images,
)

TEXT = "text/minilm@source"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    made = make_corpus(tmp_path_factory.mktemp("doors") / "corpus")
    fill(made, units=2)
    sql = "SELECT source, shard, row, width AS weight FROM samples WHERE status = 'ok' AND row IN (1, 4)"
    select(made, "some", sql)
    return made


@pytest.fixture(scope="module")
def opened(corpus: Corpus) -> CorpusReader:
    return microdit.open_corpus(corpus.url)


def ids(rows: Iterator[JoinedRow]) -> list[str]:
    return [row.id for row in rows]


def test_what_is_there(opened: CorpusReader, tmp_path: Path, s3_url: str) -> None:
    assert opened.columns == sorted(ALL) and opened.name == "made"
    assert repr(opened) == f"<corpus 'made' at {opened.url}: {', '.join(sorted(ALL))}>"
    counts = opened.counts()
    assert counts.keys() == set(ALL)
    for column, found in counts.items():
        assert (found.shards, found.rows, found.ok, found.failed, found.stale) == (4, 24, 20, 4, 0), column
        assert found.bytes > 0
    with pytest.raises(RequestError, match=r"there is no corpus\.json"):
        microdit.open_corpus(tmp_path)
    fill(make_corpus(s3_url), shards=1)
    assert microdit.open_corpus(s3_url).counts()[LATENTS].ok == len(OK)


def test_counts_of_what_is_empty_or_stale(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "corpus")
    assert set(CorpusReader(made).counts().values()) == {ColumnCounts()}
    fill(made)
    write_images(made, REF, generation=1, quality=70)
    counts = CorpusReader(made).counts()
    assert {column: counts[column].stale for column in ALL} == dict.fromkeys(COLUMNS, 1) | {"images": 0}


def test_sql(opened: CorpusReader) -> None:
    sql = "SELECT row, count(*) AS n, max(width) AS width FROM samples WHERE status = 'ok' GROUP BY row ORDER BY row"
    wanted = [{"row": row, "n": 4, "width": 64 + row} for row in OK]
    assert opened.query(sql) == wanted
    table = opened.to_arrow(sql)
    assert isinstance(table, pa.Table) and table.to_pylist() == wanted
    for read in (opened.query, opened.to_arrow):
        with pytest.raises(RequestError, match=r"SQL: .*nothing_such"):
            read("SELECT nothing_such FROM samples")


# -- webdataset --------------------------------------------------------------------------------------------------------
def test_webdataset_decodes_joined_samples(opened: CorpusReader) -> None:
    dataset = opened.to_webdataset(ALL)
    assert isinstance(dataset, webdataset.DataPipeline)
    samples = list(dataset.decode("pil"))
    assert [sample["__key__"] for sample in samples] == ids(opened.rows(ALL))
    for sample in samples:
        row = int(sample["__key__"].rpartition("-")[2])
        caption = f"picture {row} — é" if row % 2 else ""
        assert sample.keys() == {
            "__key__", "__url__", "images.jpg", "images.json", "captions/source.txt", "scores/basic.json",
            f"{LATENTS}.npy", f"{TEXT}.npy",
        }  # fmt: skip
        assert sample["images.jpg"].size == (64 + row,) * 2 and sample["images.json"]["caption"] == caption
        assert sample["captions/source.txt"] == caption
        assert sample["scores/basic.json"] == {"sharpness": pytest.approx(row / 10)}
        assert sample[f"{LATENTS}.npy"].dtype == np.float16 and (sample[f"{LATENTS}.npy"] == row).all()
        assert sample[f"{TEXT}.npy"].shape == (len(caption.split()), 8)
        assert sample["__url__"].startswith(f"{opened.url}/images/{SOURCE}/")
    again = [sample["__key__"] for sample in dataset]  # the raw one, a second time
    assert again == ids(opened.rows(ALL))


def test_webdataset_of_a_selection_with_workers(opened: CorpusReader) -> None:
    dataset = opened.to_webdataset([LATENTS, "captions/source"], "some").decode().shuffle(10)
    pairs = dataset.to_tuple("__key__", f"{LATENTS}.npy").batched(2)
    found: list[str] = []
    for keys, latents in DataLoader(pairs, batch_size=None, num_workers=2):
        assert latents.shape == (len(keys), 4, 8, 8)
        found += keys
    assert sorted(found) == sorted(ids(opened.rows(LATENTS, "some"))) and len(found) == 8


# -- torch -------------------------------------------------------------------------------------------------------------
def test_torch_dataset_is_the_rows_in_any_order(opened: CorpusReader) -> None:
    dataset, rows = opened.to_torch_dataset(ALL), list(opened.rows(ALL))
    assert len(dataset) == len(rows) == 2 * len(WHERE) and (dataset.weights == 1).all()
    for position in [*reversed(range(len(rows))), -1]:
        sample, row = dataset[position], rows[position]
        assert sample.keys() == {"id", "weight", *ALL} and (sample["id"], sample["weight"]) == (row.id, 1.0)
        for column in (LATENTS, TEXT):
            assert sample[column].dtype == torch.float16 and np.array_equal(sample[column].numpy(), row[column])
        assert all(sample[column] == row[column] for column in ("images", "captions/source", "scores/basic"))
    assert [sample["id"] for sample in dataset] == [row.id for row in rows]  # IndexError ends it
    with pytest.raises(IndexError, match="sample 20 of 20"):
        dataset[20]


def test_torch_batches_with_workers_and_weights(opened: CorpusReader) -> None:
    dataset = opened.to_torch_dataset(["captions/source", "scores/basic", LATENTS], "some")
    assert dataset.weights.tolist() == [65.0, 68.0] * 4
    batches = list(DataLoader(dataset, batch_size=3, shuffle=True, num_workers=2))
    assert sorted(name for batch in batches for name in batch["id"]) == ids(opened.rows(LATENTS, "some"))
    assert batches[0][LATENTS].shape == (3, 4, 8, 8) and batches[0]["scores/basic"]["sharpness"].shape == (3,)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[5][LATENTS], dataset[5][LATENTS])


def test_torch_dataset_on_a_bucket(s3_url: str) -> None:
    fill(make_corpus(s3_url), shards=1)
    opened = microdit.open_corpus(s3_url)
    dataset = opened.to_torch_dataset([LATENTS, "images"])
    assert [sample["id"] for sample in dataset] == ids(opened.rows(LATENTS))
    assert (dataset[1][LATENTS] == 1).all() and dataset[1]["images"][:2] == b"\xff\xd8"


# -- Ray ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_ray_dataset_has_the_rows(opened: CorpusReader) -> None:
    dataset = opened.to_ray_dataset(ALL)
    found = sorted(dataset.take_all(), key=lambda row: row["id"])
    assert [row["id"] for row in found] == ids(opened.rows(ALL))
    for row, wanted in zip(found, opened.rows(ALL), strict=True):
        where = (wanted.source, wanted.shard, wanted.row, wanted.key, wanted.weight)
        assert tuple(row[name] for name in ("source", "shard", "row", "key", "weight")) == where
        assert all(np.array_equal(row[column], wanted[column]) for column in (LATENTS, TEXT))
        assert all(row[column] == wanted[column] for column in ("images", "captions/source", "scores/basic"))
    some = opened.to_ray_dataset([LATENTS, "captions/source"], "some")
    assert sorted((row["shard"], row["row"], row["weight"]) for row in some.take_all()) == [
        (row.shard, row.row, row.weight) for row in opened.rows(LATENTS, "some")
    ]
    batch = next(iter(some.select_columns([LATENTS]).iter_torch_batches(batch_size=8)))
    assert batch[LATENTS].shape == (8, 4, 8, 8)


def test_all_doors_refuse_what_rows_refuses(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus)
    write_images(corpus, NEXT, generation=1, quality=70)
    opened = CorpusReader(corpus)
    assert SHARD_SAMPLES == 6
    for door in (opened.rows, opened.to_webdataset, opened.to_torch_dataset, opened.to_ray_dataset):
        with pytest.raises(RequestError, match=rf"column {LATENTS}, shard {NEXT.shard}: it was made from generation 0"):
            door([LATENTS])
        with pytest.raises(RequestError, match="there is no such selection"):
            door(["images"], "none")
        with pytest.raises(RequestError, match="has no such column"):
            door("nothing")
