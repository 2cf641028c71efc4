"""Read the hashes of `scores/basic` of a whole corpus, and compare pictures by them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation import job
from microdit.pipeline.tables.sample_table import SampleTable

AC_BITS = np.uint64((1 << 63) - 1)  # of a hash: all frequencies but the mean
FLAT_BITS = 3  # of a flat picture's frequencies, at most, are above the median; any two such hashes are near each other
COLOUR = 4.0  # of 255, how far the mean colours of flat pictures may be apart
COLOURS = {"blue", "green", "red"}  # scalars of `scores/basic`


@dataclass(frozen=True)
class Hashed:
    """The samples of a corpus that have hashes, in the order of the sample table."""

    line: np.ndarray
    """(n,) int64: the line of the sample table."""
    phash: np.ndarray
    """(n,) uint64"""
    pixels: np.ndarray
    """(n, 2) uint64: the first 128 bits of the SHA-256 of the pixels."""
    area: np.ndarray
    """(n,) int64: pixels of the picture as it came."""
    colour: np.ndarray
    """(n, 3) float32: means of red, green and blue; nan if the column does not have them."""
    without: int
    """Samples that are ok and have no hash."""

    @cached_property
    def flat(self) -> np.ndarray:
        """Which pictures are flat: their hash says next to nothing."""
        return np.bitwise_count(self.phash & AC_BITS) <= FLAT_BITS


def read_hashes(corpus: Corpus, table: SampleTable) -> Hashed:
    """Read the hashes of all samples that have them."""
    names = ["status", "original_width", "original_height", "basic_phash", "basic_pixels_sha256"]
    coloured = corpus.columns()[job.BASIC].scalars.keys() >= COLOURS
    means = [f"basic_{name}" for name in sorted(COLOURS)] if coloured else []
    lines, hashes, pixels, areas, colours = [], [], [], [], []
    number = ok = 0
    for batch in job.batches(corpus, table, [*names, *means]):
        has_hash = pc.is_valid(batch["basic_phash"])
        ok += pc.sum(pc.equal(batch["status"], "ok")).as_py() or 0
        lines.append(np.flatnonzero(has_hash.to_numpy()) + number)
        kept = batch.filter(has_hash)
        hashes.append(numbers(kept["basic_phash"], 1)[:, 0])
        pixels.append(numbers(kept["basic_pixels_sha256"], 4)[:, :2])
        areas.append(job.areas(kept))
        colours.append(np.full((len(kept), 3), np.nan, np.float32))
        for channel, name in enumerate(means):
            colours[-1][:, channel] = kept[name].to_numpy()
        number += len(batch)
    line = np.concatenate([np.empty(0, np.int64), *lines])
    phash = np.concatenate([np.empty(0, np.uint64), *hashes])
    whole = np.concatenate([np.empty((0, 2), np.uint64), *pixels])
    area = np.concatenate([np.empty(0, np.int64), *areas])
    colour = np.concatenate([np.empty((0, 3), np.float32), *colours])
    return Hashed(line, phash, whole, area, colour, ok - len(line))


def near(hashed: Hashed, distance: int, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compare pairs of samples by their hashes; if one of them is flat, their colours or pixels decide."""
    close = np.bitwise_count(hashed.phash[ones] ^ hashed.phash[others]) <= distance
    flat = (hashed.flat[ones] | hashed.flat[others]) & close
    if flat.any():
        apart = np.abs(hashed.colour[ones] - hashed.colour[others]).max(-1)
        equal = (hashed.pixels[ones] == hashed.pixels[others]).all(-1)
        close &= ~flat | (apart <= COLOUR) | equal
    return close


def repeated(pixels: np.ndarray) -> np.ndarray:
    """Mark the (n, 2) pixel hashes that occur at a smaller index, too."""
    order = np.lexsort((pixels[:, 1], pixels[:, 0]))
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = (pixels[order[1:]] == pixels[order[:-1]]).all(1)
    return repeated


def equal_pixels(pixels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Find for each of (n, 2) pixel hashes the first of (m, 2) others that is equal; returns (n,) int64, -1 if none."""
    first: dict[tuple[int, ...], int] = {}
    for index, pair in enumerate(others.tolist()):
        first.setdefault(tuple(pair), index)
    same = np.full(len(pixels), -1, np.int64)
    maybe = np.flatnonzero(np.isin(pixels[:, 0], others[:, 0]))
    same[maybe] = [first.get(tuple(pair), -1) for pair in pixels[maybe].tolist()]
    return same


def numbers(texts: pa.ChunkedArray, words: int) -> np.ndarray:
    """Parse texts of 16 hex digits a word as (n, words) uint64.

    Raises:
        RequestError: one is something else.
    """
    good = pc.fill_null(pc.match_substring_regex(texts, f"^[0-9a-f]{{{16 * words}}}$"), False)
    if not pc.all(good, min_count=0).as_py():
        bad = pc.filter(texts, pc.invert(good))
        raise RequestError(f"hash {bad[0].as_py()!r}: expected {16 * words} hex digits; run `microdit verify`")
    data = bytes.fromhex("".join(texts.to_pylist()))
    return np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, words)
