"""Table jobs over the hashes of `scores/basic`: near-duplicates, and contamination by evaluation sets.

`dedup` groups samples whose pictures are near-equal, `decontaminate` marks those near an evaluation set's pictures.
Nothing is removed: `microdit select` decides.
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
from microdit.pipeline.corpus.records import Record
from microdit.pipeline.curation.greedy import nearest_kept
from microdit.pipeline.curation.hamming import MAX_DISTANCE
from microdit.pipeline.curation.hashes import (
    bits_between,
    equal_pixels,
    linked,
    near,
    nearest_turned,
    numbers,
    read_hashes,
    repeated,
    turned_hashes,
)
from microdit.pipeline.curation.job import (
    BASIC,
    CONTAMINATED,
    DUPLICATES,
    HASHES,
    TURNED,
    Grouped,
    GroupsTable,
    TableJob,
    batches,
    cached_job,
    job_base,
    job_since,
    write_groups,
    write_rows,
)
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.tables.published import Table, cached, publish
from microdit.pipeline.tables.sample_table import SampleTable, sample_table

METHOD = 2  # 1: groups by chains of links; the first of equal hashes for the picture that is found

HASH_TABLE = pa.schema([("key", pa.string()), ("pixels_sha256", pa.string()), ("phash", pa.string())])
TURNED_TABLE = HASH_TABLE.append(pa.field("phashes", pa.string()))  # of a corpus that has `scores/turned`


class HashJob(TableJob):
    """A table job over perceptual hashes."""

    distance: int
    """Bits that may differ."""
    without_hash: int
    """Samples that are ok and have no hash, because `scores/basic` is not made yet or failed."""
    turned: int = 0
    """Samples that have hashes of `scores/turned`."""

    @property
    def present(self) -> str:
        return "basic_phash IS NOT NULL"

    def asked(self) -> dict[str, Any]:
        return {"distance": self.distance}


class DuplicatesTable(HashJob, GroupsTable):
    """The record of `dedup`; `cut` is `microdit.pipeline.curation.hamming.Groups.cut`."""

    exact: int
    """Samples whose pixels an earlier sample has."""


class EvaluationSet(Record):
    """A set to keep away from: its name, and number and hash of its hashes."""

    name: str
    rows: int
    sha256: str


class ContaminatedTable(HashJob):
    """The record of `decontaminate`."""

    against: list[EvaluationSet]
    exact: int
    """Samples whose pixels are those of an image of an evaluation set."""

    def asked(self) -> dict[str, Any]:
        return {"distance": self.distance, "against": [each.model_dump() for each in self.against]}


@dataclass(frozen=True)
class Deduplication(Grouped):
    """Result of `dedup`; `samples` have a hash."""

    distance: int
    without_hash: int
    exact: int
    """Samples, dropped or kept, whose pixels an earlier sample has."""
    turned: int
    """Samples that were compared turned and without borders, too."""


@dataclass(frozen=True)
class Decontamination:
    """Result of `decontaminate`: `contaminated` of `samples` (with a hash)."""

    path: str
    """Of the table."""
    distance: int
    samples: int
    without_hash: int
    contaminated: int
    exact: int
    """Contaminated samples with the very pixels of an image of an evaluation set."""
    turned: int
    """Samples that were compared turned and without borders, too."""
    against: list[EvaluationSet]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "against": [each.model_dump() for each in self.against]}


# -- the jobs ----------------------------------------------------------------------------------------------------------
def dedup(corpus: Corpus, distance: int = 6) -> Deduplication:
    """Drop the samples whose 64-bit hashes are at most `distance` bits from that of a sample that is kept.

    Of samples near each other the one with the largest picture, as it came, is kept, of several the first one in the
    order of the sample table (`nearest_kept`). Flat pictures must also be of one colour (`FLAT_BITS`). With the column
    `scores/turned` pictures are compared without their borders, mirrored and rotated, too. Returns
    immediately if the table exists; another distance replaces it.

    Raises:
        RequestError: the corpus has no `scores/basic`, or the distance is out of bounds.
    """
    _check_distance(distance)
    table = _scored(corpus)
    base = job_base(DUPLICATES, table)
    job = cached_job(corpus, table, base, DuplicatesTable, lambda job: (job.distance, job.method) == (distance, METHOD))
    if job is None:
        hashed = read_hashes(corpus, table)
        links = linked(hashed, distance)
        chosen = nearest_kept(links.labels, hashed.area, partial(near, hashed, distance))
        away = bits_between(hashed, chosen.members, chosen.kept)
        exact = repeated(hashed.pixels)

        def write(path: Path) -> int:
            columns = [pa.array(away, pa.int16()), pa.array(exact[chosen.members])]
            return write_groups(corpus, table, path, hashed.line, chosen, columns, "duplicate_")

        record = partial(
            DuplicatesTable,
            distance=distance,
            samples=len(hashed.phash),
            without_hash=hashed.without,
            turned=hashed.has_turned,
            exact=int(exact.sum()),
            cut=links.cut,
            beyond=int((away > distance).sum()),
            method=METHOD,
            groups=chosen.count,
            largest=chosen.largest,
        )
        job = publish(corpus, base, write, lambda object, rows: record(object=object, rows=rows))
    return Deduplication(
        **job.counts, distance=job.distance, without_hash=job.without_hash, exact=job.exact, turned=job.turned
    )


def decontaminate(corpus: Corpus, against: Sequence[str], distance: int = 6) -> Decontamination:
    """Mark the samples at most `distance` bits from an image of an evaluation set.

    Returns immediately if the table exists; other sets or another distance replace it.

    Args:
        against: corpora, or hash tables (`hash_table`) as .parquet files.

    Raises:
        RequestError: as `dedup`, or an evaluation set cannot be read.
    """
    _check_distance(distance)
    table = _scored(corpus)
    sets = [_evaluation(url) for url in against]
    about = [
        EvaluationSet(name=name, rows=len(hashes), sha256=_sha256(hashes))
        for name, hashes in zip(against, sets, strict=True)
    ]
    base, asked = job_base(CONTAMINATED, table), (distance, about, METHOD)
    job = cached_job(
        corpus, table, base, ContaminatedTable, lambda job: asked == (job.distance, job.against, job.method)
    )
    if job is None:
        hashed, others = read_hashes(corpus, table), pa.concat_tables(sets).combine_chunks()
        plain = numbers(others["phash"], 1)[:, 0]
        ways = turned_hashes(others["phashes"], plain) if others["phashes"].null_count < len(others) else None
        index, away = nearest_turned(hashed.phash, hashed.turned, plain, ways, distance)
        same = equal_pixels(hashed.pixels, numbers(others["pixels_sha256"], 4)[:, :2])
        index = np.where(same >= 0, same, index)  # of pictures with one hash the equal one is named
        away = np.where(same >= 0, 0, away)
        members, exact = np.flatnonzero(index >= 0), int((same >= 0).sum())

        def write(path: Path) -> int:
            columns = [others["key"].take(pa.array(index[members])), pa.array(away[members], pa.int16())]
            return write_rows(corpus, table, path, hashed.line[members], columns, "contaminated_")

        record = partial(
            ContaminatedTable,
            distance=distance,
            samples=len(hashed.phash),
            without_hash=hashed.without,
            turned=len(hashed.phash) if ways is not None else hashed.has_turned,
            against=about,
            exact=exact,
            method=METHOD,
        )
        job = publish(corpus, base, write, lambda object, rows: record(object=object, rows=rows))
    return Decontamination(
        path=job.object.name,
        distance=job.distance,
        samples=job.samples,
        without_hash=job.without_hash,
        contaminated=job.rows,
        exact=job.exact,
        turned=job.turned,
        against=job.against,
    )


def hash_table(corpus: Corpus) -> Table:
    """Publish the hashes of a corpus's pictures, once: all that others need to keep away from these pictures.

    Its columns are `key` (the sample's id), `pixels_sha256` and `phash`; and `phashes`, if it has `scores/turned`.
    """
    table = _scored(corpus)
    turned = TURNED in corpus.columns()
    schema = TURNED_TABLE if turned else HASH_TABLE

    def write(path: Path) -> int:
        rows, names = 0, ["id", "basic_pixels_sha256", "basic_phash", *(["turned_phashes"] if turned else [])]
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in batches(corpus, table, names):
                kept = batch.filter(pc.is_valid(batch["basic_phash"]))
                writer.write_table(pa.table([kept[name] for name in names], schema=schema))
                rows += len(kept)
        return rows

    base = job_base(HASHES, table)
    return cached(corpus, base, Table, job_since(HASHES, table)) or publish(
        corpus, base, write, lambda object, rows: Table(object=object, rows=rows)
    )


# -- what both do ------------------------------------------------------------------------------------------------------
def _check_distance(distance: int) -> None:
    if not 0 <= distance <= MAX_DISTANCE:
        raise RequestError(f"distance {distance}: expected 0 to {MAX_DISTANCE} of the 64 bits")


def _scored(corpus: Corpus) -> SampleTable:
    """Return the sample table of a corpus that has hashes."""
    declared = corpus.columns()
    if BASIC not in declared or not {"phash", "pixels_sha256"} <= declared[BASIC].scalars.keys():
        raise RequestError(
            f"corpus {corpus.url}: it has no {BASIC} with hashes; add `{BASIC}: {{}}` to the columns of its config and "
            "run `microdit build` again"
        )
    return sample_table(corpus)


# -- evaluation sets ---------------------------------------------------------------------------------------------------
def _evaluation(url: str) -> pa.Table:
    """Read the hash table of an evaluation set: of a file, or of a corpus."""
    if url.endswith(".parquet"):
        folder, _, name = url.rpartition("/")
        store = open_store(folder or ".")
    else:
        corpus = Corpus.open(url)
        store, name = corpus.store, hash_table(corpus).object.name
    try:
        with store.open(name) as file:
            parquet = pq.ParquetFile(file)
            schema = TURNED_TABLE if "phashes" in parquet.schema_arrow.names else HASH_TABLE
            hashes = parquet.read(schema.names).cast(schema)
    except (pa.ArrowException, OSError, BaseError, KeyError, ValueError) as error:
        raise RequestError(
            f"--against {url}: it cannot be read ({first_line(error)}); expected a corpus, or the hash table of one: "
            "a Parquet file with key, pixels_sha256 and phash"
        ) from None
    if not len(hashes):
        raise RequestError(f"--against {url}: it has no hashes; build its {BASIC} first")
    numbers(hashes["phash"], 1)
    numbers(hashes["pixels_sha256"], 4)
    if schema is HASH_TABLE:
        return hashes.append_column(TURNED_TABLE.field("phashes"), pa.nulls(len(hashes), pa.string()))
    numbers(hashes["phashes"].drop_null(), 8)
    return hashes


def default_evaluation() -> str:
    """Return the root of the corpus of `configs/coco-val.yaml`.

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


def _sha256(hashes: pa.Table) -> str:
    digest = hashlib.sha256()
    names = TURNED_TABLE.names if hashes["phashes"].null_count < len(hashes) else HASH_TABLE.names
    for name in names:
        digest.update("".join(f"{text}\n" for text in hashes[name].to_pylist()).encode())
    return digest.hexdigest()
