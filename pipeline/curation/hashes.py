"""Read the hashes of `scores/basic` and `scores/turned` of a whole corpus, and compare pictures by them."""

import binascii
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation import job
from microdit.pipeline.curation.hamming import Forest, Groups, groups, nearest
from microdit.pipeline.curation.job import TURNED
from microdit.pipeline.tables.sample_table import SampleTable

AC_BITS = np.uint64((1 << 63) - 1)  # of a hash: all frequencies but the mean
FLAT_BITS = 3  # of a flat picture's frequencies, at most, are above the median; any two such hashes are near each other
COLOUR = 4.0  # of 255, how far the mean colours of flat pictures may be apart
WAYS = 8  # to turn a picture, as `scores/turned` has them: 4 with mirror images, then 4 of the transposed picture
SOME_WAYS = (0, 1, 2, 5)  # of two pictures, however one is turned, some of these hashes are of the same picture
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
    turned: np.ndarray | None = None
    """(n, 8) uint64: hashes without borders, turned in all ways; the plain hash where there are none."""
    has_turned: int = 0
    """Samples that have them."""

    @cached_property
    def flat(self) -> np.ndarray:
        """Mask of flat pictures, as they are or without borders: their hash carries almost no information."""
        flat: np.ndarray = np.bitwise_count(self.phash & AC_BITS) <= FLAT_BITS
        if self.turned is not None:
            flat |= np.bitwise_count(self.turned[:, 0] & AC_BITS) <= FLAT_BITS
        return flat


def read_hashes(corpus: Corpus, table: SampleTable) -> Hashed:
    """Read the hashes of all samples that have them."""
    turning = TURNED in corpus.columns()
    names = ["status", "original_width", "original_height", "basic_phash", "basic_pixels_sha256"]
    coloured = corpus.columns()[job.BASIC].scalars.keys() >= COLOURS
    means = [f"basic_{name}" for name in sorted(COLOURS)] if coloured else []
    more = [*means, *(["turned_phashes"] if turning else [])]
    lines, hashes, pixels, areas, colours, turned = [], [], [], [], [], []
    number = ok = has_turned = 0
    for batch in job.batches(corpus, table, [*names, *more]):
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
        if turning:
            turned.append(turned_hashes(kept["turned_phashes"], hashes[-1]))
            has_turned += len(kept) - kept["turned_phashes"].null_count
        number += len(batch)
    line = _joined(lines, np.empty(0, np.int64))
    phash = _joined(hashes, np.empty(0, np.uint64))
    whole = _joined(pixels, np.empty((0, 2), np.uint64))
    area = _joined(areas, np.empty(0, np.int64))
    colour = _joined(colours, np.empty((0, 3), np.float32))
    ways = _joined(turned, np.empty((0, WAYS), np.uint64)) if turning else None
    return Hashed(line, phash, whole, area, colour, ok - len(line), ways, has_turned)


def _joined(parts: list[np.ndarray], none: np.ndarray) -> np.ndarray:
    """Concatenate parts, which are given up."""
    whole = np.concatenate([none, *parts])
    parts.clear()
    return whole


def turned_hashes(texts: pa.ChunkedArray, plain: np.ndarray) -> np.ndarray:
    """Parse the hashes of turned pictures, (n, 8) uint64; the plain hash stands for those that are missing."""
    found = np.repeat(plain[:, None], WAYS, 1)
    found[pc.is_valid(texts).to_numpy()] = numbers(texts.drop_null(), WAYS)
    return found


def linked(hashed: Hashed, distance: int) -> Groups:
    """Group the samples that are linked by steps of at most `distance` bits, however their pictures are turned."""
    if hashed.turned is None:
        return groups(hashed.phash, distance)
    count = len(hashed.phash)
    every = groups(np.concatenate([hashed.phash, *(hashed.turned[:, way] for way in SOME_WAYS)]), distance)
    forest = Forest(count)
    for start in range(0, len(every.labels), max(1, count)):
        forest.join(np.arange(count), every.labels[start : start + count] % max(1, count))
    return Groups(forest.labels(), every.cut, every.tables)


def bits_between(hashed: Hashed, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Count the bits between pairs of samples, of a picture that is turned by the way that has the fewest."""
    bits = np.bitwise_count(hashed.phash[ones] ^ hashed.phash[others])
    if hashed.turned is not None:
        one, other = hashed.turned[ones], hashed.turned[others]
        for way in range(WAYS):
            bits = np.minimum(bits, np.bitwise_count(one[..., 0] ^ other[..., way]))
            bits = np.minimum(bits, np.bitwise_count(one[..., way] ^ other[..., 0]))
    return bits


def near(hashed: Hashed, distance: int, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compare pairs of samples by their hashes; if one of them is flat, their colours or pixels decide."""
    close = bits_between(hashed, ones, others) <= distance
    flat = np.flatnonzero((hashed.flat[ones] | hashed.flat[others]) & close)
    if len(flat):
        some, with_ = (np.broadcast_to(each, close.shape)[flat] for each in (ones, others))
        apart = np.abs(hashed.colour[some] - hashed.colour[with_]).max(-1)
        equal = (hashed.pixels[some] == hashed.pixels[with_]).all(-1)
        close[flat] = (apart <= COLOUR) | equal
    return close


def nearest_turned(
    phash: np.ndarray, turned: np.ndarray | None, others: np.ndarray, others_turned: np.ndarray | None, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find for each picture the nearest of the others, as `nearest`; among turned ones too, if either has them."""
    index, away = nearest(phash, others, distance)
    if turned is None and others_turned is None:
        return index, away
    if others_turned is not None:
        found = [nearest(phash if turned is None else turned[:, 0], others_turned.ravel(), distance)]
        found = [(np.where(at < 0, at, at // WAYS), bits) for at, bits in found]
    else:
        assert turned is not None
        found = [nearest(turned[:, way], others, distance) for way in range(WAYS)]
    for at, bits in found:
        better = (at >= 0) & ((index < 0) | (bits < away))
        index, away = np.where(better, at, index), np.where(better, bits, away)
    return index, away


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
    parts = []
    for chunk in texts.chunks:
        digits = _digits(chunk)
        sizes = pc.fill_null(pc.equal(pc.binary_length(chunk), 16 * words), False)
        between = digits - np.uint8(ord("9") + 1) < ord("a") - ord("9") - 1  # capital letters, and others
        try:
            if between.any() or not pc.all(sizes, min_count=0).as_py():
                raise ValueError
            parts.append(binascii.unhexlify(digits.data))
        except ValueError:
            good = pc.fill_null(pc.match_substring_regex(chunk, f"^[0-9a-f]{{{16 * words}}}$"), False)
            bad = pc.filter(chunk, pc.invert(good))
            raise RequestError(
                f"hash {bad[0].as_py()!r}: expected {16 * words} hex digits; run `microdit verify`"
            ) from None
    return np.frombuffer(b"".join(parts), ">u8").astype(np.uint64).reshape(-1, words)


def _digits(texts: pa.StringArray) -> np.ndarray:
    """Return the bytes of all texts of an array, one behind the other, without a copy."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return np.empty(0, np.uint8)
    start, end = np.frombuffer(offsets, np.int32)[[texts.offset, texts.offset + len(texts)]]
    return np.frombuffer(data, np.uint8)[start:end]
