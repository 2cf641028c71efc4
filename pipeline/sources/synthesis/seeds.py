"""Choose the maker of each picture, and its seed: by hashes, so that whoever makes a picture makes the same."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

SEED_BITS = 53  # all that a program which reads JSON's numbers as doubles keeps


def picture_seed(base: int, source: str, row: int, variant: int, maker: str) -> int:
    """Return the seed of a picture.

    Args:
        row: of the prompt, in the whole prompt source, so that the size of units does not matter.
        variant: the picture's number among those of its prompt.
    """
    return _hash(f"seed\n{base}\n{source}\n{row}\n{variant}\n{maker}") >> (64 - SEED_BITS)


class Shares:
    """Choose a maker for each picture, in proportion to their weights."""

    def __init__(self, base: int, source: str, weights: Sequence[float]):
        self._base, self._source = base, source
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        self._bounds = list(accumulate(self.shares))[:-1]

    def maker(self, row: int, variant: int) -> int:
        """Return the number of the maker of a prompt's picture."""
        if not self._bounds:
            return 0
        drawn = _hash(f"maker\n{self._base}\n{self._source}\n{row}\n{variant}") / 2**64
        return bisect_right(self._bounds, drawn)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
