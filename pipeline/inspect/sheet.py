"""Read a few samples of a data set as a build reads them, and show them on a page."""

import base64
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import yaml
from PIL import Image

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.inspect.found import Found
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.sources.source import Input

SHOWN, SIDE, MAX_PIXELS = 12, 320, 64 << 20
EXAMPLE = 100  # characters


@dataclass(frozen=True)
class Shown:
    """A sample of the sheet: its picture as base64 of a small JPEG, or the reason why there is none."""

    origin: str
    caption: str
    picture: str
    reason: str
    detail: str


def config_text(place: str, found: Found) -> str:
    """Write the config that builds the data set."""
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in place.rstrip("/").rpartition("/")[2]).strip("-")
    block = {option: value for option, value in found.block.items() if value != {}}
    tree = {
        "name": name or "mine",
        "corpus": f"runs/{name or 'mine'}/corpus",
        "sources": {"data": block},
        "columns": {"captions/source": {}},
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)


def read_few(config: str, scratch: Path) -> list[Shown]:
    """Read the first samples of a config's source, as a build does."""
    with TemporaryDirectory() as folder:
        tree = yaml.safe_load(config)
        tree |= {"corpus": folder, "resources": {"scratch": str(scratch)}}
        tree["sources"]["data"]["limit"] = SHOWN
        loaded = BuildConfig.model_validate(tree)
        (source,) = sources_of(loaded)
        corpus = Corpus.create(folder, loaded.name, loaded.shard_samples)
        shown: list[Shown] = []
        with source.running(corpus, lambda line: None):
            for unit in source.units():
                with closing(source.read(unit, lambda ordinal: True)) as inputs:
                    for item in islice(inputs, SHOWN - len(shown)):
                        shown.append(shown_input(item))
                if len(shown) >= SHOWN:
                    break
    return shown


def shown_input(item: Input) -> Shown:
    """Reduce the picture of an input for the sheet."""
    picture, fault = _small(item.data)
    return Shown(
        item.origin, item.caption, picture, item.reason or ("unreadable" if fault else ""), item.detail or fault
    )


def _small(data: bytes | None) -> tuple[str, str]:
    """Reduce a picture; return it as base64, or what is wrong with it."""
    if data is None:
        return "", ""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                return "", f"{image.width}x{image.height} pixels are too many to be shown"
            image.draft("RGB", (SIDE, SIDE))
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "", str(error)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode(), ""


def example_of(values: Sequence[Any]) -> str:
    """Show the first value of a column, shortened."""
    if not values:
        return "null"
    value = values[0]
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    text = " ".join(str(value).split())
    return text if len(text) <= EXAMPLE else f"{text[: EXAMPLE - 3]}..."


def lines_of(found: Found) -> list[str]:
    """Say in a few lines what was found."""
    size = "" if found.bytes is None else f", {found.bytes:,} bytes"
    count = "" if found.estimate is None else f", about {found.estimate:,} samples"
    return [f"{found.layout}: {found.files:,} files{size}{count}", *found.notes]


def page(place: str, found: Found, samples: Sequence[Shown], config: str) -> str:
    """Make the page; whatever comes from the data set is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    columns = [(name, example_of(values)) for name, values in found.columns.items()]
    return environment.get_template("page.html.j2").render(
        place=place, lines=lines_of(found), columns=columns, samples=samples, config=config
    )
