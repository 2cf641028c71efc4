"""Find where the colours of a JPEG jump from one MCU on to all that follow, as they do once its scan lost its place.

Means of blocks are stored as differences. A wrong one shifts its block and all after it, so that in reading order as
many MCUs as a row has differ from those above them by the same: from a column to the right edge, and in the next row
of MCUs from the left edge to that column. Edges of things seldom run so.
"""

from dataclasses import dataclass

import numpy as np

DARK, LIGHT = 4, 251  # means beyond which a colour may have been clipped, so that it says nothing
WORTH_A_LOOK = 0.5  # of jump by noise, of the rows of pixels beside the seam alone
LIKELY = 0.7  # of jump by noise: of parts of photos one in a hundred has more, of whole ones fewer
NOISE = 4.0  # levels
MOST = 64  # levels that one jump counts for
CLIPPED_BEFORE, CLIPPED_AFTER = 0.1, 0.7  # shares of MCUs: a shift beyond all colours
LEAST_PART = 0.08  # of all MCUs, clipped
CANDIDATES = 4  # that are looked at more closely


@dataclass(frozen=True)
class Seam:
    """What the pixels say: `likely` that the scan lost its place, or as good as `certain`."""

    likely: bool
    certain: bool


def find_seam(pixels: np.ndarray, height: int, width: int) -> Seam:
    """Look for a jump at the corner of a MCU, which has so many pixels of these."""
    rows = np.arange(height, pixels.shape[0] - 1, height)
    across = pixels.shape[1] // width
    if len(rows) < 2 or across < 4 or height < 4:
        return Seam(False, False)
    above, below = np.split(_block_means(pixels, np.concatenate([rows - 1, rows]), width), 2)
    valid = (np.minimum(above, below) >= DARK) & (np.maximum(above, below) <= LIGHT)
    clipped = _clipped_from_some_mcu_on(valid)
    if not len(_likely_steps(below - above, valid, across, WORTH_A_LOOK)[0]):
        return Seam(clipped, False)
    outer = _block_means(pixels, rows + 1, width) - _block_means(pixels, rows - 2, width)
    likely = clipped
    for jump in (1.5 * (below - above) - 0.5 * outer, outer):  # sharp, and smoothed as colours of a half size are
        for start, colour in zip(*_likely_steps(jump, valid, across, LIKELY), strict=True):
            likely = True
            if _is_certain(jump[:, colour], above[:, colour], valid[:, colour], int(start), across):
                return Seam(True, True)
    return Seam(likely, False)


def _block_means(pixels: np.ndarray, rows: np.ndarray, width: int) -> np.ndarray:
    """Return the means of as many pixels of each row as a MCU is wide: (MCUs, colours), float32."""
    colours = pixels.shape[2]
    within = pixels[rows, : pixels.shape[1] // width * width].reshape(-1, width * colours).astype(np.float32)
    return within @ np.tile(np.eye(colours, dtype=np.float32) / width, (width, 1))


def _sums(values: np.ndarray) -> np.ndarray:
    sums = np.zeros((values.shape[1], len(values) + 1), np.float32)
    np.cumsum(values.T, axis=1, out=sums[:, 1:])
    return sums.T


def _clipped_from_some_mcu_on(valid: np.ndarray) -> bool:
    """Check that a colour is at its limit in most MCUs from one on, and in few before."""
    count = len(valid)
    if valid.size - np.count_nonzero(valid) < LEAST_PART * CLIPPED_AFTER * count:
        return False
    sums = _sums(~valid)
    first = count // 20 + 1
    before = np.arange(first, count - int(LEAST_PART * count), dtype=np.float32)[:, None]
    inside = sums[first : first + len(before)]
    few, most = inside < CLIPPED_BEFORE * before, sums[-1] - inside > CLIPPED_AFTER * (count - before)
    return bool((few & most).any())


def _likely_steps(jump: np.ndarray, valid: np.ndarray, across: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the MCUs from which on a row's length of MCUs jumps alike, the likeliest last: their numbers and colours."""
    counted = np.clip(jump, -MOST, MOST)
    if not valid.all():
        counted *= valid
    counts, sums = _sums(valid), _sums(counted)
    count, total = counts[across:] - counts[:-across], sums[across:] - sums[:-across]
    wide = (np.abs(total) > least * NOISE * count) & (count >= max(4, across / 5))
    start, colour = np.nonzero(wide)
    keep = start % across != 0  # from the left edge on it is an edge like any other
    start, colour = start[keep], colour[keep]
    if not len(start):
        return start, colour
    count, mean = count[start, colour], total[start, colour] / count[start, colour]
    squares = _sums(counted * counted)
    spread = np.sqrt(np.maximum((squares[start + across, colour] - squares[start, colour]) / count - mean * mean, 0))
    keep = np.abs(mean) > least * (spread + NOISE)
    start, colour, mean, spread = start[keep], colour[keep], mean[keep], spread[keep]
    row = start - start % across
    last = np.minimum(row + 2 * across, len(jump))
    limits = [(start, row + across), (row + across, start + across), (row, start), (start + across, last)]
    found = [counts[end, colour] - counts[begin, colour] for begin, end in limits]
    means = [
        (sums[end, colour] - sums[begin, colour]) / np.maximum(number, 1)
        for (begin, end), number in zip(limits, found, strict=True)
    ]
    inside = np.minimum(np.sign(mean) * means[0], np.sign(mean) * means[1])
    contrast = (inside - np.maximum(np.abs(means[2]), np.abs(means[3]))) / (spread + NOISE)
    contrast[(found[0] < 1) | (found[1] < 1) | (found[2] + found[3] < 2)] = 0
    best = np.argsort(contrast)[-CANDIDATES:]
    best = best[contrast[best] > least]
    return start[best], colour[best]


def _is_certain(jump: np.ndarray, above: np.ndarray, valid: np.ndarray, start: int, across: int) -> bool:
    """Check that all MCUs of a row's length jump by the same, whatever is above them, and those beside them do not."""
    row = start - start % across
    parts = [(start, row + across), (row + across, start + across), (row, start), (start + across, row + 2 * across)]
    right, left, before, after = (jump[begin:end][valid[begin:end]] for begin, end in parts)
    inside = np.concatenate([right, left])
    if min(len(right), len(left)) < 3 or len(inside) < max(12, 0.6 * across) or len(before) + len(after) < 0.6 * across:
        return False
    shift = float(np.median(inside))
    noise = 1.48 * float(np.median(np.abs(inside - shift)))
    over = above[start : start + across][valid[start : start + across]]
    variety = 1.48 * float(np.median(np.abs(over - np.median(over))))
    texture = float(np.median(np.abs(np.diff(over))))
    sign = 1 if shift > 0 else -1
    beside = max((abs(float(np.median(part))) for part in (before, after) if len(part)), default=0.0)
    return (
        abs(shift) >= 12
        and min(sign * float(np.median(right)), sign * float(np.median(left))) >= 0.8 * abs(shift)
        and beside <= 0.2 * abs(shift)
        and noise <= 0.3 * abs(shift)
        and variety >= max(3.5, 2 * noise)
        and texture >= 1.5
    )
