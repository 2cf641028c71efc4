"""Combine templates and lists to prompts; they are counted before they are made."""

import math
import re
from collections.abc import Iterator

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.prompts import PLACEHOLDER
from microdit.pipeline.sources.synthesis.prompt_tally import RawPrompt, RawPrompts

MOST = 200_000_000
"""Prompts that are made without a limit."""
ROUNDS = 6
BLOCK = 4096


class Templates:
    """Templates with the entries of their lists.

    Args:
        what: the block of the config, for messages.
        shuffle: a seed for the order of all combinations; None goes through the lists of each template, the last list
            first.

    Raises:
        RequestError: there are more combinations than are made without a limit.
    """

    def __init__(
        self, templates: list[str], lists: dict[str, list[str]], what: str, shuffle: int | None, limit: int | None
    ):
        self._templates, self._lists, self._shuffle = templates, lists, shuffle
        self._names = [_names(template) for template in templates]
        self._counts = [math.prod(len(lists[name]) for name in names) for names in self._names]
        if len(self) > MOST and limit is None:
            each = "; ".join(f"{text[:60]!r}: {n:,}" for text, n in zip(templates, self._counts, strict=True))
            raise RequestError(
                f"{what}.templates: they make {len(self):,} prompts ({each[:500]}); expected at most {MOST:,}; give "
                "limit, and shuffle for a fair choice"
            )

    def __len__(self) -> int:
        return sum(self._counts)

    def read(self) -> RawPrompts:
        """Make the prompts, one after the other."""
        for row in range(len(self)) if self._shuffle is None else permutation(len(self), self._shuffle):
            yield self._prompt(row)

    def _prompt(self, row: int) -> RawPrompt:
        number, index = 0, row
        while index >= self._counts[number]:
            index -= self._counts[number]
            number += 1
        values: dict[str, str | int | float] = {}
        for name in reversed(self._names[number]):
            index, at = divmod(index, len(self._lists[name]))
            values[name] = self._lists[name][at]
        values = {name: values[name] for name in self._names[number]}

        def fill(match: re.Match[str]) -> str:
            token = match[0]
            return token[0] if token in ("{{", "}}") else str(values[token[1:-1]])

        text = PLACEHOLDER.sub(fill, self._templates[number])
        return RawPrompt(row, " ".join(text.split()), values, f"combination {row + 1:,}")


def _names(template: str) -> list[str]:
    """List the placeholders of a template, each once."""
    return list(dict.fromkeys(match[1] for match in PLACEHOLDER.finditer(template) if match[1] is not None))


def permutation(count: int, seed: int) -> Iterator[int]:
    """Give the numbers below `count`, each once, in an order that depends on the seed; nothing is kept in memory.

    A Feistel network permutes the numbers of an even count of bits; those that are too large are passed over.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.Generator(np.random.PCG64(seed % (1 << 64))).integers(0, 1 << 63, ROUNDS, np.uint64)
    for start in range(0, 1 << (2 * half), BLOCK):
        numbers = np.arange(start, min(start + BLOCK, 1 << (2 * half)), dtype=np.uint64)
        left, right = numbers >> np.uint64(half), numbers & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        permuted = (left << np.uint64(half)) | right
        yield from (number for number in permuted.tolist() if number < count)


def mix(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit numbers (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
