"""Patterns that stand for many files: braces, wildcards, and the natural order of names."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from microdit.pipeline.base.errors import RequestError

MOST_FILES = 1_000_000  # that braces may stand for
WILD = re.compile(r"[*?\[{]")


def expand_braces(pattern: str, what: str) -> list[str]:
    """Expand the braces of a pattern, `{0000..0099}` and `{a,b}`, in order; numbers keep their zeros.

    Raises:
        RequestError: a range that runs backwards, or too many files; `what` is the field of the config.
    """
    pieces: list[Sequence[str]] = []
    count = 1
    for text in re.split(r"(\{[^{}]*\})", pattern):
        if numbers := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text):
            low, high = int(numbers[1]), int(numbers[2])
            if not 0 <= high - low < MOST_FILES:
                raise RequestError(
                    f"{what} = {pattern!r}: {text} is no range; expected {{first..last}}, at most {MOST_FILES} numbers"
                )
            width = len(numbers[1]) if numbers[1].startswith("0") else 0
            pieces.append([f"{number:0{width}d}" for number in range(low, high + 1)])
        elif text.startswith("{") and "," in text:
            pieces.append(text[1:-1].split(","))
        else:
            pieces.append([text])
        count *= len(pieces[-1])
        if count > MOST_FILES:
            raise RequestError(f"{what} = {pattern!r}: it stands for more than the {MOST_FILES} files that are taken")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def split_root(pattern: str) -> tuple[str, str]:
    """Split a pattern into the folder above the first wildcard or brace and the rest; a plain path before its name."""
    parts = pattern.split("/")
    first = next((index for index, part in enumerate(parts) if WILD.search(part)), len(parts) - 1)
    return "/".join(parts[:first]), "/".join(parts[first:])


def matcher(pattern: str) -> re.Pattern[str]:
    """Compile wildcards: `*`, `?` and `[...]` match within one folder, `**/` any folders, a final `**` all below."""
    regex, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            regex, at = regex + "(?:[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            regex, at = regex + ".*", at + 2
        elif pattern[at] == "*":
            regex, at = regex + "[^/]*", at + 1
        elif pattern[at] == "?":
            regex, at = regex + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            regex, at = regex + f"[{'^' + inside[1:] if inside[0] == '!' else inside}]", end + 1
        else:
            regex, at = regex + re.escape(pattern[at]), at + 1
    return re.compile(regex)


def natural(name: str) -> tuple[list[Any], str]:
    """Make a sorting key that compares numbers as numbers: part-2 comes before part-10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def choose(patterns: Sequence[str], names: Sequence[str]) -> tuple[list[str], str | None]:
    """Select the names that match any of the patterns, each once; return them and the first pattern without a match."""
    known, chosen = set(names), dict[str, None]()
    for pattern in patterns:
        if pattern in known:
            chosen[pattern] = None
            continue
        if not WILD.search(pattern):
            return list(chosen), pattern
        try:
            fits = matcher(pattern)
        except re.error:  # [z-a]
            return list(chosen), pattern
        matches = [name for name in names if fits.fullmatch(name)]
        if not matches:
            return list(chosen), pattern
        chosen.update(dict.fromkeys(matches))
    return list(chosen), None
