"""Marks that people set on samples: objects that are only ever added (docs/reference/corpus.md, section 6).

The marks of a corpus are numbered; of a sample the one with the highest number counts.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import Field

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import KEY, SHARD, SOURCE
from microdit.pipeline.corpus.records import VERSION, Count, Record

FOLDER = "marks"
NAME = re.compile(r"marks/([0-9]{10})\.json")
LONGEST_NOTE = 1000  # characters
TRIES = 100  # numbers that are tried while others mark at the same time
WORDS = ("keep", "drop")

MARKS = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("row", pa.int32()),
        pa.field("mark", pa.string()),
        pa.field("mark_note", pa.string()),
    ]
)


class Mark(Record):
    """A person's judgement of a sample. Without `mark` and `note` it takes back the one before."""

    version: Literal[1] = VERSION
    source: Annotated[str, Field(pattern=f"^(?:{SOURCE.pattern})$")]
    shard: Annotated[str, Field(pattern=f"^(?:{SHARD.pattern})$")]
    row: Count
    key: Annotated[str, Field(pattern=f"^(?:{KEY.pattern})$")]
    mark: Literal["keep", "drop"] | None = None
    note: Annotated[str, Field(max_length=LONGEST_NOTE)] = ""
    who: Annotated[str, Field(max_length=200)] = ""
    time: Annotated[str, Field(max_length=40)] = ""
    """UTC, `YYYY-mm-ddTHH:MM:SSZ`."""


class Marks:
    """The marks of a corpus, by number; those that were read are not read again."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.by_number: dict[int, Mark] = {}

    def read(self) -> None:
        """Read the marks that were added.

        Raises:
            DamagedError: one cannot be understood.
        """
        names = {int(match[1]): match[0] for name in self.corpus.store.names(FOLDER) if (match := NAME.fullmatch(name))}
        missing = sorted(names.keys() - self.by_number.keys())
        read = threaded(lambda number: self.corpus.read_record(names[number], Mark), missing)
        self.by_number |= dict(zip(missing, read, strict=True))

    @property
    def next(self) -> int:
        """The number that the next mark has: it names a state of all marks."""
        return max(self.by_number, default=-1) + 1

    def newest(self) -> dict[tuple[str, str, int], Mark]:
        """Give the mark that counts of each sample, by source, shard and row; also those that take one back."""
        ordered = (self.by_number[number] for number in sorted(self.by_number))
        return {(mark.source, mark.shard, mark.row): mark for mark in ordered}

    def add(self, mark: Mark) -> None:
        """Write a mark under the next free number.

        Raises:
            RequestError: others mark so fast that no number was free.
        """
        for _ in range(TRIES):
            number = self.next
            try:
                self.corpus.store.create(f"{FOLDER}/{number:010d}.json", mark.to_bytes())
            except FileExistsError:
                self.read()
            else:
                self.by_number[number] = mark
                return
        raise RequestError(f"corpus {self.corpus.url}: others mark at the same time; try again")


def marks_table(marks: Iterable[Mark]) -> pa.Table:
    """Build the table that the view `samples` is joined with."""
    lines = [
        {"source": m.source, "shard": m.shard, "row": m.row, "mark": m.mark, "mark_note": m.note or None}
        for m in marks
        if m.mark or m.note
    ]
    return pa.Table.from_pylist(lines, MARKS)
