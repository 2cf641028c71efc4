"""Corpora of several sources whose images have given facts and scores, to choose from."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.selection.selections import load_selection, select
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS

ROWS = 4

OK = "SELECT source, shard, row FROM samples WHERE status = 'ok'"

SCORES = {
    "scores/basic": {"sharpness": "float32", "phash": "string", "pixels_sha256": "string"},
    "scores/nsfw": {"nsfw": "float32"},
    "scores/text": {"area": "float32"},
}

BAD = {  # what is wrong with a row
    0: {"phash": 5},  # nothing
    1: {"width": 200},
    2: {"nsfw": 0.21},
    3: {"area": 0.11},
    4: {"sharpness": 19.0},
    5: {"width": 2000},
    6: {"phash": 5},  # as that of row 0
    7: {"phash": 77},  # of the evaluation set
    8: {"nsfw": None},  # not scored
}


def sample(number: int) -> dict:
    """The facts of an image, and its scores."""
    wide = np.random.default_rng(number).integers(0, 2**63)
    good = {"width": 400, "height": 300, "nsfw": 0.1, "area": 0.05, "sharpness": 80.0, "phash": int(wide)}
    return good | BAD.get(number, {})


def make(
    folder: Path, sources: Sequence[tuple[str, int]], columns: Sequence[str] = tuple(SCORES), order: int = 0
) -> Corpus:
    """A corpus of tables alone: `rows` images of each source, written shard by shard in some order."""
    corpus = Corpus.create(folder, "choosing", shard_samples=ROWS)
    corpus.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    for column in columns:
        corpus.declare_column(column, {"stage": column}, SCORES[column])
    shards = []
    for source, rows in sources:
        corpus.declare_source(source, {"adapter": "made"})
        unit = unit_name(source, 0)
        for first in range(0, rows, ROWS):
            ref = ShardRef(source=source, unit=unit, shard=shard_name(unit, first // ROWS))
            shards.append((ref, range(first, min(first + ROWS, rows))))
    random.Random(order).shuffle(shards)
    for ref, numbers in shards:
        with begin_attempt(corpus, "images", ref) as attempt:
            for row, number in enumerate(numbers):
                found = sample(number)
                about = {"width": found["width"], "height": found["height"], "fields": fields(ref.source, number)}
                about |= {f"original_{name}": about[name] for name in ("width", "height")}
                texts = {"caption": f"number {number}", "origin": "", "license": "", "sha256": "0" * 64}
                attempt.add(row, f"k{number}", {"jpg": b"-", "json": b"{}"}, **about, **texts, format="jpeg", bytes=1)
            images = attempt.commit()
        for column in columns:
            with begin_attempt(corpus, column, ref, [images]) as attempt:
                for row, number in enumerate(numbers):
                    found = sample(number)
                    found["phash"], found["pixels_sha256"] = f"{found['phash']:016x}", f"{number:064x}"
                    scores = {name: found[name] for name in SCORES[column]}
                    if None in scores.values():
                        attempt.fail(row, f"k{number}", "damaged")
                    else:
                        attempt.add(row, f"k{number}", **scores)
                attempt.commit()
    return corpus


def fields(source: str, number: int) -> str:
    return json.dumps({"image_nsfw": number / 10, "prompt_nsfw": 0.1}) if source == "diffusiondb" else ""


def chosen(corpus: Corpus, name: str, **arguments) -> dict[str, list[int]]:
    """The rows of each source in a new selection, counted through its shards."""
    select(corpus, name, **arguments)
    found: dict[str, list[int]] = {}
    for line in load_selection(corpus, name).to_pylist():
        found.setdefault(line["source"], []).append(int(line["shard"][-2:]) * ROWS + line["row"])
    return found
