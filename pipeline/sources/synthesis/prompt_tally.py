"""Count the prompts of a source that are not taken, by reason."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

EXAMPLES = 5
SHOWN = 80  # characters of a prompt in a message


@dataclass(frozen=True)
class RawPrompt:
    """A prompt as its source has it: its 0-based place, its text, its fields, and its place in words for messages."""

    row: int
    text: str
    fields: dict[str, str | int | float]
    place: str


RawPrompts = Iterator[RawPrompt]


@dataclass
class LeftOut:
    """Prompts that are not taken: counts by reason, and the first few of them."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, example: str) -> None:
        """Count one prompt."""
        self.counts[reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{reason}: {example}")


def shown(text: str) -> str:
    """Cut a prompt for a message."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
