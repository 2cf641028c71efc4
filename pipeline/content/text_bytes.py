"""Decode texts that came as bytes, by one rule: a byte order mark is honoured, everything else is UTF-8 or no text."""

import codecs

from microdit.pipeline.content.caption_faults import SURROGATES

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like the next one
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class NotTextError(ValueError):
    """The bytes, or the characters, are no text; the message says why."""


def decode_text(data: bytes) -> str:
    """Decode a text.

    Raises:
        NotTextError: its encoding cannot be determined, or it is no text.
    """
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        return checked_text(data[len(mark) :].decode(encoding))
    except UnicodeDecodeError as error:
        found = data[len(mark) + error.start : len(mark) + error.end][:4]
        raise NotTextError(
            f"byte {len(mark) + error.start} is not {encoding.upper()}: {found!r}; expected UTF-8, or a byte order mark"
        ) from None


def checked_text(text: str) -> str:
    """Return the text as it is.

    Raises:
        NotTextError: it has zero characters, or lone surrogates, which UTF-8 cannot write.
    """
    if (at := text.find("\0")) >= 0:
        raise NotTextError(f"character {at} is zero")
    if (match := SURROGATES.search(text)) is not None:
        raise NotTextError(f"character {match.start()} is a lone surrogate, which UTF-8 cannot write")
    return text
