"""Cut a quoted list into its records: one with line breaks inside of its quotes is one input."""

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from typing import BinaryIO

MAX_LINE = 64 << 10


@cache
def _open_at_end(delimiter: str) -> re.Pattern[str]:
    """Match lines that end inside of a quoted cell; only a quote at the beginning of a cell opens one."""
    end = re.escape(delimiter)
    quoted, bare = rf'"(?:[^"]|"")*+"[^{end}]*', rf'[^"{end}][^{end}]*'
    return re.compile(rf'(?:(?:{quoted}|{bare}|){end})*+"(?:[^"]|"")*+', re.DOTALL)


def merged(lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, str]]:
    """Join lines to records, each with its size: those between an opening quote and the one that closes it.

    What is not closed within 64 KiB, or is no record then, stays as the lines that it is.
    """
    rest, returned = iter(lines), deque[tuple[int, str]]()
    opens = _open_at_end(delimiter)
    while (line := returned.popleft() if returned else next(rest, None)) is not None:
        if line[1].count('"') % 2 == 0 or len(line[1]) > MAX_LINE or not opens.fullmatch(line[1]):
            yield line
            continue
        group, length, closed = [line], len(line[1]), False
        while not closed and length <= MAX_LINE:
            following = returned.popleft() if returned else next(rest, None)
            if following is None:
                break
            group.append(following)
            length += 1 + len(following[1])
            closed = following[1].count('"') % 2 == 1
        text = "\n".join(text for _, text in group)
        if closed and length <= MAX_LINE and _is_record(text, delimiter):
            yield sum(size for size, _ in group), text
        else:
            returned.extendleft(reversed(group[1:]))
            yield line


def _is_record(text: str, delimiter: str) -> bool:
    """Tell whether joined lines are one record, and not several of which two have a stray quote."""
    try:
        [cells] = csv.reader([text], delimiter=delimiter, strict=True)
    except (csv.Error, ValueError):
        return False
    return not any("\n" in cell and _url_beside(delimiter).search(cell) for cell in cells)


@cache
def _url_beside(delimiter: str) -> re.Pattern[str]:
    return re.compile(rf'https?://[^\s{delimiter}]*{delimiter}|{delimiter}\s*"?https?://', re.IGNORECASE)


def records(file: BinaryIO, encoding: str, delimiter: str) -> Iterator[tuple[int, str]]:
    """Read the records of a file from where it is: the bytes that each takes, and its text without the line end.

    Of one that is longer than `MAX_LINE` the text is cut, and still longer than that.
    """
    return merged(_lines(file, encoding), delimiter)


def read_records(file: BinaryIO, encoding: str, delimiter: str, count: int) -> Iterator[bytes]:
    """Read `count` records, as UTF-8."""
    for _, text in islice(records(file, encoding, delimiter), count):
        yield text.encode("utf-8", "surrogateescape")


def _lines(file: BinaryIO, encoding: str) -> Iterator[tuple[int, str]]:
    feed = "\n".encode(encoding)
    errors = "surrogateescape" if encoding == "utf-8" else "replace"
    while True:
        size, kept = 0, b""
        while part := file.readline(MAX_LINE):
            part += file.read(-len(part) % len(feed))  # a line feed's byte may be the first of a character
            size += len(part)
            if len(kept) <= 4 * MAX_LINE:
                kept += part
            if part.endswith(feed):
                break
        if not size:
            return
        yield size, kept.decode(encoding, errors).rstrip("\r\n")
