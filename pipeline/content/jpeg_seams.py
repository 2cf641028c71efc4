"""Find where the colours of a JPEG jump from one MCU on to all that follow, as they do after a damage of its scan.

Means of blocks are stored as differences. A wrong one shifts its block and all after it, so that in reading order as
many MCUs as a row has differ from those above them by the same: from a column to the right edge, and in the next row
of MCUs from the left edge to that column. Edges of things seldom run so,
but windows on a screen may: it is a sign and no proof.
"""

import numpy as np

DARK, LIGHT = 4, 251  # means beyond which a colour may have been clipped, so that it says nothing
WORTH_A_LOOK = 0.5  # of jump by noise, of the rows of pixels beside the seam alone
LIKELY = 0.7  # of jump by noise: of parts of photos one in a hundred has more, of whole ones fewer
NOISE = 4.0  # levels
MOST = 64  # levels that one jump counts for
CLIPPED_BEFORE, CLIPPED_AFTER = 0.1, 0.7  # shares of MCUs: a shift beyond all colours
LEAST_PART = 0.08  # of all MCUs, clipped


def has_seam(pixels: np.ndarray, height: int, width: int) -> bool:
    """Check for a jump at the corner of a MCU, which has so many pixels of these."""
    rows = np.arange(height, pixels.shape[0] - 1, height)
    across = pixels.shape[1] // width
    if len(rows) < 2 or across < 4 or height < 4:
        return False
    above, below = np.split(_block_means(pixels, np.concatenate([rows - 1, rows]), width), 2)
    valid = (np.minimum(above, below) >= DARK) & (np.maximum(above, below) <= LIGHT)
    if _clipped_from_some_mcu_on(valid):
        return True
    if not _steps(below - above, valid, across, WORTH_A_LOOK):
        return False
    outer = _block_means(pixels, rows + 1, width) - _block_means(pixels, rows - 2, width)
    sharp = 1.5 * (below - above) - 0.5 * outer
    return any(_steps(jump, valid, across, LIKELY) for jump in (sharp, outer))  # colours of a half size are smoothed


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


def _steps(jump: np.ndarray, valid: np.ndarray, across: int, least: float) -> bool:
    """Check for a MCU from which on a row's length of MCUs jumps alike, by `least` times its noise."""
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
        return False
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
    return bool((contrast > least).any())
