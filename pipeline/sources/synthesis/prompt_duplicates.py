"""Find equal and similar prompts, tens of millions of them, in little memory: tables on the disk are sorted by hashes.

Similar are prompts whose sets of three words in a row overlap by 0.8 and more (Jaccard), as 64 MinHash values estimate
it: eight bands of eight values find pairs to compare (of pairs at 0.9 all but one in a hundred).
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from microdit.pipeline.base.liveness import alive
from microdit.pipeline.content.caption_faults import WORD
from microdit.pipeline.sources.synthesis.prompt_templates import mix
from microdit.pipeline.tables.database import connect

BANDS, PER_BAND = 8, 8
VALUES = BANDS * PER_BAND
SIMILAR = 0.8
SHINGLE = 3  # words
MEMORY = "1GB"  # of DuckDB; what does not fit goes to the disk
BATCH = 65_536
EXACT = ("exact_high", "exact_low")
BAND_NAMES = [f"band_{number}" for number in range(BANDS)]
EXACT_FIELDS = [pa.field(name, pa.uint64()) for name in EXACT]
NEAR_FIELDS = [*(pa.field(name, pa.uint64()) for name in BAND_NAMES), pa.field("signature", pa.binary(VALUES))]

_FAMILY = mix(np.arange(1, 2 * VALUES + 1, dtype=np.uint64)).reshape(VALUES, 2) | np.array([1, 0], np.uint64)
"""Odd factors and terms: each pair orders the shingles in another way."""


def exact_columns(texts: Sequence[str]) -> dict[str, pa.Array]:
    """Hash texts without regard to case: equal texts have equal hashes of 128 bits."""
    digests = [hashlib.blake2b(_folded(text).encode(), digest_size=16).digest() for text in texts]
    halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    return {name: pa.array(halves[:, number]) for number, name in enumerate(EXACT)}


def near_columns(texts: Sequence[str]) -> dict[str, pa.Array]:
    """Compute the MinHash signatures of texts, and the hashes of their bands."""
    values = signatures(texts)
    bands = np.zeros((len(texts), BANDS), np.uint64)
    for number in range(PER_BAND):
        bands = mix(bands ^ values[:, number::PER_BAND])
    low = np.ascontiguousarray(values.astype(np.uint8))
    columns = {name: pa.array(bands[:, number]) for number, name in enumerate(BAND_NAMES)}
    return columns | {"signature": pa.array([row.tobytes() for row in low], pa.binary(VALUES))}


def signatures(texts: Sequence[str]) -> np.ndarray:
    """Compute (n, `VALUES`) uint64 MinHash values; a text of fewer than three words is one shingle."""
    lists = [WORD.findall(_folded(text)) or [_folded(text)] for text in texts]
    known: dict[str, int] = {}
    for words in lists:
        for word in words:
            if word not in known:
                known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    counts = np.array([max(len(words), SHINGLE) for words in lists])
    ends = np.cumsum(counts)
    hashes = np.zeros(counts.sum(), np.uint64)  # short texts are filled up with zeros
    for words, end, count in zip(lists, ends.tolist(), counts.tolist(), strict=True):
        hashes[end - count : end - count + len(words)] = [known[word] for word in words]
    shingles = mix(mix(mix(hashes[:-2]) ^ hashes[1:-1]) ^ hashes[2:])
    inside = np.ones(len(shingles), bool)  # of one text
    inside[np.concatenate([ends[:-1] - 1, ends[:-1] - 2])] = False
    shingles = shingles[inside]
    starts = np.concatenate([[0], np.cumsum(counts - SHINGLE + 1)[:-1]])
    values = [np.minimum.reduceat(shingles * factor + term, starts) for factor, term in _FAMILY]
    return np.stack(values, 1)


def first_ones(parts: Sequence[Path], count: int, near: bool, spill: Path) -> tuple[np.ndarray, np.ndarray]:
    """Find the candidates that repeat one before them.

    Args:
        parts: Parquet files with `number`, ascending from 0 over all of them, and the columns of hashes.
        count: the candidates in all.
        spill: a folder for temporary files.

    Returns:
        (count,) bool: those that are equal to one before, and those that are similar to one before but not equal.
    """
    equal, similar = np.ones(count, bool), np.zeros(count, bool)
    files = f"read_parquet([{', '.join(_quoted(path) for path in parts)}])"
    with connect(memory_limit=MEMORY, temp_directory=str(spill), threads=2) as database:
        for batch in _batches(database, f"SELECT min(number) FROM {files} GROUP BY {', '.join(EXACT)}"):
            equal[batch.column(0).to_numpy()] = False
        if near:
            stored = np.memmap(spill / "signatures.bin", np.uint8, "w+", shape=(count, VALUES))
            for batch in _batches(database, f"SELECT number, signature FROM {files}"):
                values = np.frombuffer(b"".join(batch.column(1).to_pylist()), np.uint8).reshape(-1, VALUES)
                stored[batch.column(0).to_numpy()] = values
            for band in BAND_NAMES:
                first = f"min(number) OVER (PARTITION BY {band})"
                pairs = f"SELECT * FROM (SELECT number, {first} AS first FROM {files}) WHERE first < number"
                for batch in _batches(database, pairs):
                    number, head = (column.to_numpy() for column in batch.columns)
                    close = (stored[number] == stored[head]).mean(1) >= SIMILAR
                    similar[number[close]] = True
            del stored
            (spill / "signatures.bin").unlink()
    return equal, similar & ~equal


def _batches(database: duckdb.DuckDBPyConnection, sql: str) -> Iterator[pa.RecordBatch]:
    for batch in database.sql(sql).to_arrow_reader(BATCH):
        alive()
        yield batch


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split())).casefold()


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
