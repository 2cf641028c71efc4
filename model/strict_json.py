"""Read JSON out of files that strangers made: bounded in size and depth."""

import json
from pathlib import Path
from typing import Any

LARGEST = 64 << 20  # bytes; the largest tokenizer has 40 MB


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is none, or it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Parse a file.

    Raises:
        ValueError: it is no JSON, nested too deeply, or larger than `LARGEST`.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    return parse_json(data.decode("utf-8"))
