"""Find out how a list of URLs and captions is written: encoding, delimiter, quotes, header, order of the columns."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from microdit.pipeline.base.secrets import without_secrets
from microdit.pipeline.sources.list_records import MAX_LINE, merged

SAMPLE = 1 << 20  # bytes from the beginning of a list that its format is found by
MAX_SHOWN = 4096  # characters of a line that are searched for secrets before its beginning is shown
EVEN = 0.9  # the share of the lines that must have the same number of columns
URL = re.compile(r"https?://\S+", re.IGNORECASE)
QUOTED = re.compile(r'"(?:[^"]|"")*"')
URL_NAMES = ("url", "image_url", "img_url", "imageurl", "image_link", "image", "link", "uri", "src")
CAPTION_NAMES = ("caption", "text", "top_caption", "alt_text", "alt", "title", "description", "prompt")
BYTE_ORDER_MARK = "\ufeff"
OTHER_FILES = {b"PAR1": "a Parquet file", b"\x1f\x8b": "compressed with gzip", b"PK\x03\x04": "a zip file"}
EXPECTED = "expected url<TAB>caption lines, or a first line that names the columns, such as url<TAB>caption<TAB>score"


@dataclass(frozen=True)
class ListFormat:
    """Format of a list's lines. The default is url<TAB>caption, where further tabs belong to the caption."""

    encoding: str = "utf-8"
    delimiter: str = "\t"
    quoted: bool = False
    """Cells may stand in double quotes, which are doubled inside of them."""
    start: int = 0
    """Bytes before the first input: a header that is none."""
    columns: int = 2
    url: int = 0
    caption: int = 1

    def stage(self) -> dict[str, Any]:
        """Declare the format where it is not the default."""
        return {} if self == PLAIN else {"format": asdict(self)}

    def parse(self, line: bytes) -> tuple[str, str]:
        """Parse the URL and the caption of a list's line, which is UTF-8 whatever the list is.

        Raises:
            ValueError: the line is malformed; the message says how.
        """
        if len(line) > MAX_LINE:
            raise ValueError(f"the line is longer than {MAX_LINE} bytes")
        text = line.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
        shown = without_secrets(text[:MAX_SHOWN])[:80]
        if self.encoding != "utf-8" and "\ufffd" in text:
            raise ValueError(f"expected {self.encoding}, found {shown!r}")
        if not self.quoted and self.columns == 2 and self.url == 0:
            url, tab, caption = text.partition(self.delimiter)
            if not tab or not url.strip():
                raise ValueError(f"expected url<TAB>caption, found {shown!r}")
        else:
            cells = split(text, self.delimiter, self.quoted)
            if len(cells) > self.columns or len(cells) <= max(self.url, self.caption):
                raise ValueError(f"expected {self.columns} columns, found {len(cells)}: {shown!r}")
            url, caption = cells[self.url], cells[self.caption]
        return url.strip(), " ".join(caption.split())


PLAIN = ListFormat()


def split(text: str, delimiter: str, quoted: bool) -> list[str]:
    """Split a line into its cells.

    Raises:
        ValueError: the quotes of a cell are not closed.
    """
    if not quoted:
        return text.split(delimiter)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise ValueError(f"{error}: {without_secrets(text[:MAX_SHOWN])[:80]!r}") from None


def find_format(head: bytes, whole: bool, limit: int | None = None) -> ListFormat:
    """Find the format of a list by its first bytes.

    Args:
        head: the first `SAMPLE` bytes.
        whole: they are the whole list.
        limit: the number of lines that are read.

    Raises:
        ValueError: these are no lines with a URL and a caption each, or it is open which columns they are.
    """
    for magic, what in OTHER_FILES.items():
        if head.startswith(magic):
            raise ValueError(f"it is {what}; {EXPECTED}")
    encoding = _encoding(head)
    lines = head.decode(encoding, "replace").removeprefix(BYTE_ORDER_MARK).split("\n")
    if not whole and len(lines) > 1:
        lines.pop()
    lines = [line.rstrip("\r") for line in lines]
    joined = {delimiter: [text for _, text in merged(((0, line) for line in lines), delimiter)] for delimiter in ",\t"}
    if limit is not None:
        lines = lines[: limit + 1]  # one may be the header
        joined = {delimiter: texts[: limit + 1] for delimiter, texts in joined.items()}
    filled = [line for line in lines if line.strip()]
    linked = [line for line in filled if URL.search(line)]
    delimiter = "\t" if 2 * sum("\t" in line for line in linked) >= len(linked) else ","
    if not any(delimiter in line for line in linked):
        found = without_secrets(filled[0][:MAX_SHOWN])[:80] if filled else ""
        raise ValueError(f"none of its first {len(filled)} lines has a URL and a caption: {found!r}; {EXPECTED}")
    texts = [text for text in joined[delimiter] if text.strip()]
    quoted = delimiter == "," or _is_quoted(texts)
    filled = texts if quoted else filled
    header = _header(lines[0], delimiter, quoted)
    if header is None:
        return ListFormat(encoding, delimiter, quoted, 0, *_by_content(filled, delimiter, quoted))
    url, caption = _named(header)
    if (encoding, delimiter, quoted, len(header), url) == ("utf-8", "\t", False, 2, 0):
        return PLAIN  # its header is an input that fails, as it always was: keys count the lines
    start = head.index("\n".encode(encoding)) + len("\n".encode(encoding))
    return ListFormat(encoding, delimiter, quoted, _aligned(head, start, encoding), len(header), url, caption)


def _aligned(head: bytes, start: int, encoding: str) -> int:
    """Find the end of the first line: in UTF-16 a line feed's bytes may also be parts of two characters."""
    feed = "\n".encode(encoding)
    while start % len(feed):
        start = head.index(feed, start - len(feed) + 1) + len(feed)
    return start


def _encoding(head: bytes) -> str:
    odd, even = head[1::2].count(0), head[::2].count(0)  # half of ASCII's bytes are zero in UTF-16
    if head.startswith(b"\xff\xfe") or (odd > even and 8 * odd > len(head)):
        return "utf-16-le"
    if head.startswith(b"\xfe\xff") or (even > odd and 8 * even > len(head)):
        return "utf-16-be"
    return "utf-8"


def _is_quoted(lines: Sequence[str]) -> bool:
    """Tell whether quotes are those of CSV: doubled in a cell or around all captions, and none that contradicts it."""
    doubled, bare = False, False
    for line in lines:
        if '"' not in line:
            bare = True
            continue
        try:
            cells = split(line, "\t", quoted=True)
        except ValueError:
            return False
        raw = line.split("\t") if len(line.split("\t")) == len(cells) else []
        if any('"' in cell and not QUOTED.fullmatch(cell) for cell in raw):
            return False
        doubled = doubled or any('"' in cell or "\n" in cell for cell in cells) or not raw
    return doubled or not (bare or len(lines) < 2)


def _header(line: str, delimiter: str, quoted: bool) -> list[str] | None:
    """Return the names of the columns if the first line is a header: it has no URL, and a column named as one."""
    try:
        names = [name.strip().lower() for name in split(line, delimiter, quoted)]
    except ValueError:
        return None
    if len(names) < 2 or URL.search(line) or not set(names) & {*URL_NAMES, *CAPTION_NAMES}:
        return None
    return names


def _named(names: Sequence[str]) -> tuple[int, int]:
    """Find the columns of the URL and the caption by their names."""
    found = []
    for what, known in (("URL", URL_NAMES), ("caption", CAPTION_NAMES)):
        name = next((name for name in known if name in names), None)
        if name is None:
            raise ValueError(
                f"its header names no column with the {what}: {', '.join(names)[:200]}; "
                f"expected {known[0]!r} among them"
            )
        found.append(names.index(name))
    return found[0], found[1]


def _by_content(lines: Sequence[str], delimiter: str, quoted: bool) -> tuple[int, int, int]:
    """Find the number of columns, and those of the URL and the caption, by what is in them."""
    rows = []
    for line in lines:
        try:
            rows.append(split(line, delimiter, quoted))
        except ValueError:
            continue
    rows = [row for row in rows if any(URL.fullmatch(cell.strip()) for cell in row)]
    widths = Counter(map(len, rows))
    width, count = max(widths.items(), key=lambda item: item[1], default=(0, 0))
    if width < 2 or count < EVEN * len(rows):
        if delimiter == "\t" and not quoted and not _numbers_behind(rows):
            width = 2  # tabs inside of captions
        else:
            raise ValueError(
                f"its lines have from {min(widths, default=0)} to {max(widths, default=0)} columns; {EXPECTED}"
            )
    same = [row for row in rows if len(row) >= width]
    urls = [sum(bool(URL.fullmatch(row[i].strip())) for row in same) for i in range(width)]
    if width == 2:
        url = 0 if urls[0] >= urls[1] else 1
        return width, url, 1 - url
    links = [i for i in range(width) if 2 * urls[i] > len(same)]
    texts = [i for i in range(width) if i not in links and not all(_is_number(row[i]) for row in same)]
    if len(links) != 1 or len(texts) != 1:
        raise ValueError(
            f"which of its {width} columns are the URL and the caption is open: "
            f"{without_secrets(delimiter.join(same[0])[:MAX_SHOWN])[:120]!r}; {EXPECTED}"
        )
    return width, links[0], texts[0]


def _numbers_behind(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether many lines have numbers behind the caption, which are then no part of it."""
    numbers = sum(len(row) > 2 and all(map(_is_number, row[2:])) for row in rows)
    return numbers > (1 - EVEN) * len(rows)


def _is_number(cell: str) -> bool:
    try:
        float(cell.strip() or 0)
    except ValueError:
        return False
    return True
