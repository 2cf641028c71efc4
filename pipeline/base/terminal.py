"""Show text of others on a terminal: captions, failures, a server's words."""

import re

# C0 but for tab and line feed, DEL and C1, and what changes the direction of writing
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Escape the control characters of a text, as in `\x1b`, so that a terminal shows them and obeys none."""
    return _CONTROLS.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
