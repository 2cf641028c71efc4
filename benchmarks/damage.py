"""Damaged images and archives through ingest's decoder: each is taken or has a reason; none crashes it or hangs it.

    python benchmarks/damage.py [--count 10000] [--seed N] [--json]

Pictures of every format and kind that is taken (and animations, which are not) are drawn, encoded and damaged: bits
turned over, cut off, spliced, runs of zeros or noise, headers that lie; some are left whole. Each goes through
`pipeline.content.images.prepare`, and what comes of it is decoded again and compared with what comes of the file before
it was damaged: `accepted_wrong` counts those of which more than a tenth of the pixels are wrong. For every ten images
the scan of a photograph is damaged, and compared likewise: `scans` (benchmarks/damage_scans.py). Of every 50 images one
archive is made (tar, tgz, zip; some members with another extension than their own), which is damaged likewise and read
by `pipeline.files.archives`. All images and archives in a child process: when that dies or takes more than the bound
for one item, a crash or a hang is counted, and the next item gets another process. An item is made of the seed and its
number: `damaged_image(seed, number)`.
"""

import random
import resource
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.damage_inputs import OPTIONS, PER_ARCHIVE, Item, damaged_archive, damaged_image
from benchmarks.damage_scans import measure_scans, wrong_share
from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.content.images import BadImage, decode, prepare
from microdit.pipeline.files.archives import members
from microdit.pipeline.sources.file_source import MAX_BYTES
from microdit.pipeline.sources.members import is_image
from microdit.pipeline.stages.isolated_decode import IsolatedDecoder

BOUND = 30.0  # seconds for one item
IMAGE_REASONS = {"not_an_image", "truncated", "damaged", "bomb", "too_small", "too_long", "animated"}
MEMBER_REASONS = {"too_large", "not_a_file", "encrypted", "unsupported", "damaged_member", "bomb", "damaged_archive"}


# -- in the child ----------------------------------------------------------------------------------------------------
def examine_image(sent: bytes) -> dict[str, Any]:
    """Examine one image: `outcome` is `ok`, a reason, or `escaped` if something else than a reason comes.

    `wrong`: the share of its pixels that are not those of the whole file, which is `sent` with it (`packed`).
    """
    warnings.simplefilter("ignore")
    length = int.from_bytes(sent[:4], "big")
    whole, data = sent[4 : 4 + length], sent[4 + length :]
    began = time.perf_counter()
    outcome, detail = _prepared(data)
    found = {"outcome": outcome, "detail": detail, "seconds": time.perf_counter() - began, "memory": _memory()}
    if outcome == "ok" and data != whole and _prepared(whole)[0] == "ok":
        found["wrong"] = wrong_share(_stored(data), _stored(whole))
    return found


def _stored(data: bytes) -> np.ndarray:
    return decode(prepare(data, OPTIONS).data, OPTIONS.max_pixels).pixels


def packed(item: Item) -> bytes:
    """Make an image as it is sent to the child."""
    return len(item.whole).to_bytes(4, "big") + item.whole + item.data


def examine_archive(data: bytes) -> dict[str, Any]:
    """Examine an archive in the same way, with the outcomes of its members."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    found: Counter[str] = Counter()
    outcome, detail = "ok", ""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "archive")).write_bytes(data)
        try:
            for member in members(path, is_image, MAX_BYTES):
                if outcome != "ok":
                    raise AssertionError("a member behind the one that tells that the archive ends")
                if member.reason == "damaged_archive":
                    outcome, detail = member.reason, member.detail
                elif member.reason is not None:
                    known = member.reason in MEMBER_REASONS and member.data is None
                    found[member.reason if known else "escaped"] += 1
                else:
                    found[_prepared(member.data or b"")[0]] += 1
        except Exception as error:  # that is what is looked for
            outcome, detail = "escaped", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    return {"outcome": outcome, "detail": detail, "seconds": seconds, "members": dict(found), "memory": _memory()}


def _prepared(data: bytes) -> tuple[str, str]:
    try:
        made = prepare(data, OPTIONS)
    except BadImage as error:
        fine = error.reason in IMAGE_REASONS and str(error)
        return (error.reason, str(error)) if fine else ("escaped", f"reason {error.reason!r}: {error}")
    except Exception as error:  # that is what is looked for
        return "escaped", f"{type(error).__name__}: {error}"
    try:
        kept = decode(made.data, OPTIONS.max_pixels)
    except BadImage as error:
        return "escaped", f"what is stored cannot be decoded: {error.reason}: {error}"
    if kept.format != "jpeg" or (kept.width, kept.height) != (made.width, made.height):
        return "escaped", f"what is stored is a {kept.format} of {kept.width}x{kept.height}, not as it says"
    return "ok", ""


def _memory() -> int:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# -- the whole run ---------------------------------------------------------------------------------------------------
@dataclass
class Totals:
    """Outcomes of one sort of item."""

    outcomes: Counter[str] = field(default_factory=Counter)
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    by_damage: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0})
    memory: int = 0
    compared: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    """By kind: accepted, with more than a tenth of the pixels wrong."""

    def add(self, item: Item, number: int, found: dict[str, Any]) -> None:
        outcome = found["outcome"]
        self.outcomes[outcome] += 1
        self.by_kind.setdefault(item.kind, Counter())[outcome] += 1
        for damage in set(item.damage.split("+")):
            self.by_damage.setdefault(damage, Counter())[outcome] += 1
        self.compared += "wrong" in found
        if found.get("wrong", 0.0) > 0.1:
            self.wrong[item.kind] += 1
        self.seconds += found["seconds"]
        self.memory = max(self.memory, found["memory"])
        if found["seconds"] > self.slowest["seconds"]:
            about = {"item": number, "kind": item.kind, "damage": item.damage, "outcome": outcome}
            self.slowest = {"seconds": round(found["seconds"], 3), **about}


def measure(count: int, seed: int, bound: float = BOUND) -> dict[str, Any]:
    began = time.perf_counter()
    images, archives, inside = Totals(), Totals(), Counter[str]()
    bad: list[dict[str, Any]] = []
    with IsolatedDecoder(examine_image, bound) as image_child, IsolatedDecoder(examine_archive, bound) as archive_child:
        for number in range(count):
            item = damaged_image(seed, number)
            found = _examined(image_child, packed(item), bound)
            images.add(item, number, found)
            if found["outcome"] in ("crash", "stall", "escaped") or (
                item.damage == "whole" and found["outcome"] != item.expected
            ):
                bad.append({"image": number, "kind": item.kind, "damage": item.damage, **found})
        for number in range(-(-count // PER_ARCHIVE)):
            size = min(PER_ARCHIVE, count)
            item = damaged_archive(seed, number, size)
            found = _examined(archive_child, item.data, bound)
            archives.add(item, number, found)
            held = found.get("members", {})
            inside.update(held)
            short = item.damage == "whole" and (found["outcome"], sum(held.values())) != ("ok", item.inside)
            if found["outcome"] in ("crash", "stall", "escaped") or held.get("escaped") or short:
                bad.append({"archive": number, "kind": item.kind, "damage": item.damage, **found})
    totals = (images, archives)
    return {
        "seed": seed,
        "images": count,
        "archives": archives.outcomes.total(),
        "members": inside.total(),
        "crashes": sum(total.outcomes["crash"] for total in totals),
        "hangs": sum(total.outcomes["stall"] for total in totals),
        "escaped": sum(total.outcomes["escaped"] for total in totals) + inside["escaped"],
        "bad": len(bad),
        "adds_up": images.outcomes.total() == count
        and all(sum(kind.total() for kind in t.by_kind.values()) == t.outcomes.total() for t in totals),
        "accepted_damaged": images.compared,
        "accepted_wrong": images.wrong.total(),
        "accepted_wrong_by_kind": dict(images.wrong.most_common()),
        "scans": measure_scans(count // 10, seed),
        "slowest_image": images.slowest,
        "slowest_archive": archives.slowest,
        "images_per_second": round(count / images.seconds, 1) if images.seconds else 0.0,
        "peak_memory_mb": max(images.memory, archives.memory),
        "seconds": round(time.perf_counter() - began, 1),
        "image_outcomes": dict(images.outcomes.most_common()),
        "archive_outcomes": dict(archives.outcomes.most_common()),
        "member_outcomes": dict(inside.most_common()),
        "by_kind": {kind: dict(found) for kind, found in sorted((images.by_kind | archives.by_kind).items())},
        "by_damage": {way: dict(found) for way, found in sorted(images.by_damage.items())},
        "bad_items": bad[:20],
    }


def _examined(child: IsolatedDecoder[dict[str, Any]], data: bytes, bound: float) -> dict[str, Any]:
    try:
        return child(data)
    except BadImage as error:
        return {
            "outcome": error.reason,
            "detail": str(error),
            "seconds": bound if error.reason == "stall" else 0.0,
            "memory": 0,
        }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="images; an archive more for every 50")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time; it is printed")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    found = measure(options.count, seed)
    print_figures(found, options.json)
    if found["bad"] or not found["adds_up"] or found["scans"]["padded_refused"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
