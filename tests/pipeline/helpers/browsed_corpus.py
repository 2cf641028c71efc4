"""A corpus to look through: pictures of many shapes with captions and scores, some failed, one with hostile words."""

import io
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from tests.pipeline.helpers.report_corpus import HOSTILE
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS

SHARD_ROWS = 100
SOURCES = ("birds", "cities")
FAILS, HOSTILE_ROW = 29, 7  # every 29th picture is not there
WORDS = ("a red kite over the sea", "a quiet street in the evening", "two boats in a harbour", "an old tree in the fog")


def failed(number: int) -> bool:
    return number % FAILS == FAILS - 1


def caption(number: int) -> str:
    return HOSTILE if number == HOSTILE_ROW else f"{WORDS[number % len(WORDS)]}, number {number}"


def sharpness(number: int) -> float:
    return 50 + 40 * math.sin(number)


def drawing(number: int) -> Image.Image:
    """Draw a landscape: a sky, a sun and hills, each picture with its own colours and shape."""
    width, height = 72 + 8 * (number % 7), 56 + 8 * (number % 5)
    image = Image.new("RGB", (width, height), f"hsl({number * 37 % 360}, 45%, 82%)")
    draw = ImageDraw.Draw(image)
    x, side = number * 13 % width, 12 + number % 9
    draw.ellipse((x, 8, x + side, 8 + side), fill=f"hsl({number * 91 % 360}, 80%, 62%)")
    for hill in range(3):
        top, middle = height * (0.45 + 0.17 * hill), width * ((number * (hill + 3) % 10) / 10)
        shape = [(0, height), (0, top + 8), (middle, top - 10), (width, top + 8), (width, height)]
        draw.polygon(shape, fill=f"hsl({(number * 53 + 24 * hill) % 360}, 38%, {52 - 12 * hill}%)")
    return image


def make_browsed(folder: Path, rows: int) -> Corpus:
    """Write the corpus; the first half of the rows is of one source, the second of the other."""
    corpus = Corpus.create(folder / "corpus", "birds & cities", SHARD_ROWS)
    corpus.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    for name in ("source", "long"):
        corpus.declare_column(f"captions/{name}", {"stage": "captions"}, {"caption": "string", "tokens": "int32"})
    corpus.declare_column("scores/basic", {"stage": "scores"}, {"sharpness": "float32"})
    half = -(-rows // 2)
    for source, numbers in zip(SOURCES, (range(half), range(half, rows)), strict=True):
        corpus.declare_source(source, {"adapter": "made"})
        unit, names = unit_name(source, 0), []
        for first in range(numbers.start, numbers.stop, SHARD_ROWS):
            names.append(shard_name(unit, len(names)))
            ref = ShardRef(source=source, unit=unit, shard=names[-1])
            _write(corpus, ref, range(first, min(first + SHARD_ROWS, numbers.stop)))
        commit_unit(corpus, source, unit, len(numbers), names)
    return corpus


def _write(corpus: Corpus, ref: ShardRef, numbers: range) -> None:
    with begin_attempt(corpus, "images", ref) as attempt:
        for row, number in enumerate(numbers):
            if failed(number):
                attempt.fail(row, f"k{number}", "http_404", f"HTTP 404 for http://127.0.0.1/{HOSTILE}")
                continue
            image, buffer = drawing(number), io.BytesIO()
            image.save(buffer, "jpeg", quality=80)
            about = {"caption": caption(number), "license": "CC0" if number % 3 else "CC BY 4.0", "fields": ""}
            about |= {"origin": f"https://example.org/{number}.jpg"}
            sizes = {"width": image.width, "height": image.height}
            sizes |= {f"original_{name}": value for name, value in sizes.items()}
            members = {"jpg": buffer.getvalue(), "json": json.dumps(about).encode()}
            attempt.add(row, f"k{number}", members, **about, **sizes, format="jpeg", bytes=buffer.tell())
        images = attempt.commit()
    for column in ("captions/source", "captions/long", "scores/basic"):
        with begin_attempt(corpus, column, ref, [images]) as attempt:
            for row, number in enumerate(numbers):
                if failed(number):
                    attempt.fail(row, f"k{number}", "upstream", "images: http_404")
                elif column == "scores/basic":
                    attempt.add(row, f"k{number}", sharpness=sharpness(number))
                else:
                    words = caption(number) + (". The light is soft." if column == "captions/long" else "")
                    attempt.add(row, f"k{number}", caption=words, tokens=len(words.split()))
            attempt.commit()
