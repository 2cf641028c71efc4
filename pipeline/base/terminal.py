"""Show text of others on a terminal: captions, failures, a server's words."""

import json
import re
from typing import Any

# C0 but for tab and line feed, DEL and C1, what changes the direction of writing, and what UTF-8 cannot write
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escape the control characters of a text, as in `\x1b`, so that a terminal shows them and obeys none."""
    return _CONTROLS.sub(lambda found: _escaped(ord(found[0])), text)


def printable_json(value: Any, **how: Any) -> str:
    """Write a value as JSON, in which control characters are escapes of JSON: what is read back is the same."""
    text = json.dumps(value, ensure_ascii=False, **how)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
