"""Table jobs over the hashes of `scores/basic`: which samples are double, and which are near an evaluation set.

`dedup` groups samples whose pictures are near-equal, `decontaminate` marks those near somebody else's pictures. Nothing
is removed: `microdit select` decides.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation import hamming as near
from microdit.pipeline.curation.job import (
    BASIC,
    CONTAMINATED,
    DUPLICATES,
    HASHES,
    Job,
    batches,
    job_base,
    keepers,
    made,
    texts,
    write_rows,
)
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.tables.published import Table, cached, publish
from microdit.pipeline.tables.sample_table import SampleTable, sample_table

HASH_TABLE = pa.schema([("key", pa.string()), ("pixels_sha256", pa.string()), ("phash", pa.string())])


class HashJob(Job):
    distance: int
    without_hash: int
    """Samples that are ok and have none, because `scores/basic` is not made yet or failed."""

    @property
    def present(self) -> str:
        return "basic_phash IS NOT NULL"

    def asked(self) -> dict[str, Any]:
        return {"distance": self.distance}


class DuplicatesTable(HashJob):
    groups: int
    exact: int
    """Samples of which another one has the same pixels and comes before it."""
    cut: int
    """`microdit.pipeline.curation.hamming.Groups.cut`."""


class ContaminatedTable(HashJob):
    against: list[dict[str, Any]]
    """Of each evaluation set: `name`, `rows`, `sha256` (of its hashes)."""
    exact: int
    """Samples whose pixels are those of one of its images."""

    def asked(self) -> dict[str, Any]:
        return {"distance": self.distance, "against": self.against}


@dataclass(frozen=True)
class Hashed:
    """The samples of a corpus that have hashes, in the order of the sample table."""

    table: SampleTable
    place: np.ndarray
    """(n,) int64: which line of the sample table."""
    phash: np.ndarray
    """(n,) uint64"""
    pixels: np.ndarray
    """(n, 2) uint64: the first 128 bits of the SHA-256 of the pixels."""
    area: np.ndarray
    """(n,) int64: pixels of the picture as it came."""
    without: int


# -- the jobs ----------------------------------------------------------------------------------------------------------
def dedup(corpus: Corpus, distance: int = 6) -> dict[str, Any]:
    """Group the samples whose 64-bit hashes are linked by steps of at most `distance` bits; at once if it was done.

    Of a group the sample with the largest picture, as it came, is kept, of several the first one in the order of the
    sample table. Another distance replaces the table.

    Returns:
        dict: `samples` (with a hash) = `kept` + `dropped`; `groups` (of two or more); `exact` of the dropped or kept
        have the pixels of one before them; `without_hash`; `distance`; `path` of the table; `cut`.

    Raises:
        RequestError: the corpus has no `scores/basic`, or the distance is out of bounds.
    """
    _check_distance(distance)
    table = _scored(corpus)
    base = job_base(DUPLICATES, table)
    found = made(corpus, base, DuplicatesTable, lambda job: job.distance == distance)
    if found is None:
        hashed = _hashed(corpus, table)
        grouped = near.groups(hashed.phash, distance)
        keeper, size = keepers(grouped.labels, hashed.area)
        exact = _repeated(hashed.pixels)
        members = np.flatnonzero(size > 1)

        def write(path: Path) -> int:
            ids = texts(corpus, table, "id", hashed.place[keeper[members]])
            away = np.bitwise_count(hashed.phash[members] ^ hashed.phash[keeper[members]])
            columns = [ids, pa.array(away, pa.int16()), pa.array(exact[members]), pa.array(keeper[members] == members)]
            return write_rows(corpus, table, path, hashed.place[members], columns, "duplicate_")

        record = partial(
            DuplicatesTable,
            distance=distance,
            samples=len(hashed.phash),
            without_hash=hashed.without,
            groups=int((keeper[members] == members).sum()),
            exact=int(exact.sum()),
            cut=grouped.cut,
        )
        found = publish(corpus, base, write, lambda object, rows: record(object=object, rows=rows))
    dropped = found.rows - found.groups
    return {**_told(found), "groups": found.groups, "dropped": dropped, "kept": found.samples - dropped} | {
        "exact": found.exact,
        "cut": found.cut,
    }


def decontaminate(corpus: Corpus, against: Sequence[str], distance: int = 6) -> dict[str, Any]:
    """Mark the samples at most `distance` bits from an image of an evaluation set; at once if it was done.

    Args:
        against: corpora, or hash tables (`hash_table`) as .parquet files. Another list replaces the table.

    Returns:
        dict: `contaminated` of `samples` (with a hash), `exact` of them with equal pixels, `by` evaluation set;
        `without_hash`; `distance`; `path` of the table; `against`.

    Raises:
        RequestError: as `dedup`, or an evaluation set cannot be read.
    """
    _check_distance(distance)
    table = _scored(corpus)
    sets = [_evaluation(where) for where in against]
    about = [
        {"name": where, "rows": len(found), "sha256": _sha256(found)}
        for where, found in zip(against, sets, strict=True)
    ]
    base = job_base(CONTAMINATED, table)
    found = made(corpus, base, ContaminatedTable, lambda job: (job.distance, job.against) == (distance, about))
    if found is None:
        hashed, others = _hashed(corpus, table), pa.concat_tables(sets).combine_chunks()
        index, away = near.nearest(hashed.phash, _numbers(others["phash"], 1)[:, 0], distance)
        members = np.flatnonzero(index >= 0)
        theirs = _numbers(others["pixels_sha256"], 4)[:, :2]
        known = {tuple(pair) for pair in theirs[np.unique(index[members])].tolist()}  # equal pixels have equal hashes
        exact = sum(tuple(pair) in known for pair in hashed.pixels[members].tolist())

        def write(path: Path) -> int:
            columns = [others["key"].take(pa.array(index[members])), pa.array(away[members], pa.int16())]
            return write_rows(corpus, table, path, hashed.place[members], columns, "contaminated_")

        record = partial(
            ContaminatedTable,
            distance=distance,
            samples=len(hashed.phash),
            without_hash=hashed.without,
            against=about,
            exact=exact,
        )
        found = publish(corpus, base, write, lambda object, rows: record(object=object, rows=rows))
    return {**_told(found), "contaminated": found.rows, "exact": found.exact, "against": found.against}


def hash_table(corpus: Corpus) -> Table:
    """The hashes of a corpus's pictures as a table of its own, made once: `key` (the sample's id), `pixels_sha256`,
    `phash`. It is all that others need to keep away from these pictures."""
    table = _scored(corpus)

    def write(path: Path) -> int:
        rows, names = 0, ["id", "basic_pixels_sha256", "basic_phash"]
        with pq.ParquetWriter(path, HASH_TABLE, compression="zstd") as writer:
            for batch in batches(corpus, table, names):
                kept = batch.filter(pc.is_valid(batch["basic_phash"]))
                writer.write_table(pa.table([kept[name] for name in names], schema=HASH_TABLE))
                rows += len(kept)
        return rows

    base = job_base(HASHES, table)
    return cached(corpus, base, Table) or publish(
        corpus, base, write, lambda object, rows: Table(object=object, rows=rows)
    )


# -- what both do ------------------------------------------------------------------------------------------------------
def _check_distance(distance: int) -> None:
    if not 0 <= distance <= near.MAX_DISTANCE:
        raise RequestError(f"distance {distance}: expected 0 to {near.MAX_DISTANCE} of the 64 bits")


def _scored(corpus: Corpus) -> SampleTable:
    declared = corpus.columns()
    if BASIC not in declared or not {"phash", "pixels_sha256"} <= declared[BASIC].scalars.keys():
        raise RequestError(
            f"corpus {corpus.url}: it has no {BASIC} with hashes; add `{BASIC}: {{}}` to the columns of its config and "
            "run `microdit build` again"
        )
    return sample_table(corpus)


def _told(found: HashJob) -> dict[str, Any]:
    return {
        "path": found.object.name,
        "distance": found.distance,
        "samples": found.samples,
        "without_hash": found.without_hash,
    }


def _hashed(corpus: Corpus, table: SampleTable) -> Hashed:
    names = ["status", "original_width", "original_height", "basic_phash", "basic_pixels_sha256"]
    places, hashes, pixels, areas = [], [], [], []
    number = ok = 0
    for batch in batches(corpus, table, names):
        there = pc.is_valid(batch["basic_phash"])
        ok += pc.sum(pc.equal(batch["status"], "ok")).as_py() or 0
        places.append(np.flatnonzero(there.to_numpy()) + number)
        kept = batch.filter(there)
        hashes.append(_numbers(kept["basic_phash"], 1)[:, 0])
        pixels.append(_numbers(kept["basic_pixels_sha256"], 4)[:, :2])
        area = pc.multiply(kept["original_width"].cast(pa.int64()), kept["original_height"].cast(pa.int64()))
        areas.append(pc.fill_null(area, 0).to_numpy())
        number += len(batch)
    place = np.concatenate([np.empty(0, np.int64), *places])
    phash = np.concatenate([np.empty(0, np.uint64), *hashes])
    whole = np.concatenate([np.empty((0, 2), np.uint64), *pixels])
    area = np.concatenate([np.empty(0, np.int64), *areas])
    return Hashed(table, place, phash, whole, area, ok - len(place))


def _numbers(texts: pa.ChunkedArray, words: int) -> np.ndarray:
    """Texts of 16 hex digits a word as (n, words) uint64.

    Raises:
        RequestError: one is something else.
    """
    good = pc.fill_null(pc.match_substring_regex(texts, f"^[0-9a-f]{{{16 * words}}}$"), False)
    if not pc.all(good, min_count=0).as_py():
        bad = pc.filter(texts, pc.invert(good))
        raise RequestError(f"hash {bad[0].as_py()!r}: expected {16 * words} hex digits; run `microdit verify`")
    data = bytes.fromhex("".join(texts.to_pylist()))
    return np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, words)


def _repeated(pixels: np.ndarray) -> np.ndarray:
    """Which (n, 2) pixel hashes were there before."""
    order = np.lexsort((pixels[:, 1], pixels[:, 0]))
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = (pixels[order[1:]] == pixels[order[:-1]]).all(1)
    return repeated


# -- evaluation sets ---------------------------------------------------------------------------------------------------
def _evaluation(where: str) -> pa.Table:
    """The hash table of an evaluation set: a file, or that of a corpus."""
    if where.endswith(".parquet"):
        folder, _, name = where.rpartition("/")
        store = open_store(folder or ".")
    else:
        corpus = Corpus.open(where)
        store, name = corpus.store, hash_table(corpus).object.name
    try:
        with store.open(name) as file:
            found = pq.ParquetFile(file).read(HASH_TABLE.names).cast(HASH_TABLE)
    except (pa.ArrowException, OSError, BaseError, KeyError, ValueError) as error:
        raise RequestError(
            f"--against {where}: it cannot be read ({first_line(error)}); expected a corpus, or the hash table of one: "
            "a Parquet file with key, pixels_sha256 and phash"
        ) from None
    if not len(found):
        raise RequestError(f"--against {where}: it has no hashes; build its {BASIC} first")
    _numbers(found["phash"], 1)
    _numbers(found["pixels_sha256"], 4)
    return found


def default_evaluation() -> str:
    """The corpus of `configs/coco-val.yaml`.

    Raises:
        RequestError: it is not built.
    """
    from microdit.pipeline.config.build import load_config

    url = load_config("configs/coco-val.yaml").corpus
    if not open_store(url).exists("corpus.json"):
        raise RequestError(
            f"--against is not given, and COCO val is not at {url}; run `microdit build configs/coco-val.yaml` once, "
            "or give a corpus or its hash table"
        )
    return url


def _sha256(found: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in HASH_TABLE.names:
        digest.update("".join(f"{text}\n" for text in found[name].to_pylist()).encode())
    return digest.hexdigest()
