"""How many shards and bytes a build would come to: learned, from shapes, or assumed; each number says which."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from microdit.model.pretrained.packaged import EFFICIENTNET, FEATURES
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.scores import EmbeddingScores
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.quantised import groups_of
from microdit.pipeline.estimate import rates
from microdit.pipeline.estimate.past_build import Earlier, Size
from microdit.pipeline.estimate.source_sizes import Expected

TOKENS_A_WORD = 1.4
TAR_SAMPLE = 512 + 256  # bytes of a member beside its data: the header, and half a block of padding
NPY_HEADER, ZIP = 128, 202
EMBEDDING = 1_024
ROW, TABLE_ROW, SHARD = 60.0, 150.0, 8_000.0  # bytes of a sidecar's row, of a table's, and of a shard besides
IMAGE_JSON, JPEG_PIXEL, ASPECT = 1_024.0, 0.6, 4 / 3  # bytes; bytes a pixel at quality 95; sides of an image


class Sizes:
    """Of the sources that are expected.

    Args:
        otherwise: columns of which the earlier build tells nothing, because it made them otherwise.
        assume: takes a line for people.
    """

    def __init__(
        self,
        config: BuildConfig,
        sources: Mapping[str, Expected],
        earlier: Earlier | None,
        otherwise: Mapping[str, str],
        assume: Callable[[str], None],
    ):
        self.config, self.sources, self.earlier = config, sources, earlier
        self.otherwise, self.assume = otherwise, assume
        self.shards = {name: source.shards(config.shard_samples) for name, source in sources.items()}

    def columns(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        good: dict[tuple[str, str], float] = {}
        for column in [IMAGES, *sorted(self.config.columns, key=lambda name: "@" in name)]:
            entry: dict[str, Any] = {"in": 0, "out": 0, "bytes": 0}
            origins: dict[str, str] = {}
            for name, source in self.sources.items():
                size, origin = self._size(column, name, source, good)
                good[column, name] = size.out
                entry["in"] += source.inputs
                entry["out"] += round(source.inputs * size.out)
                entry["bytes"] += round(size.bytes(source.inputs, self.shards[name]))
                origins[name] = origin
            entry["failed"] = entry["in"] - entry["out"]
            found[column] = entry | {"origin": by_origin(origins)}
        return {name: found[name] for name in [IMAGES, *self.config.columns]}

    def _size(self, column: str, name: str, source: Expected, good: Mapping[Any, float]) -> tuple[Size, str]:
        if self.earlier is not None and column not in self.otherwise and (found := self.earlier.size(column, name)):
            return found, f"earlier build, {found.shards:,} shards"
        options = self.config.columns.get(column)
        above = f"captions/{column.partition('@')[2]}" if isinstance(options, TextColumn) else IMAGES
        out = good.get((above, name), 1 - source.failed)
        if column == IMAGES:
            if source.failed:
                self.assume(f"{source.failed:.0%} of {name}'s inputs have no caption or are unwanted, as is written")
            sample, origin = self._image(name, source)
            return Size(0, out, sample + 2 * TAR_SAMPLE + IMAGE_JSON, 3 * TABLE_ROW, SHARD), origin
        if isinstance(options, LatentsColumn):
            channels, down = self._autoencoder(column, options)
            sample = channels * (options.resolution / down) ** 2 * (4 if options.posterior == "moments" else 2)
            return Size(0, out, _blocks(sample + NPY_HEADER), ROW, SHARD), "shapes"
        if isinstance(options, TextColumn):
            tokens, width, origin = self.tokens(column, name, options)
            return Size(0, out, _blocks(_text_bytes(tokens, width, options)), ROW, SHARD), origin
        if isinstance(options, EmbeddingScores):
            known = options.model == EFFICIENTNET
            if not known:
                self.assume(f"{column}: {EMBEDDING:,} features, as a large model has")
            sample = _blocks(2 * (FEATURES if known else EMBEDDING) + NPY_HEADER)
            return Size(0, out, sample, ROW, SHARD), "shapes" if known else "assumed"
        self.assume(f"{TABLE_ROW:.0f} bytes a row of captions and scores that no earlier build has")
        return Size(0, out, 0.0, TABLE_ROW, SHARD), "assumed"

    def _image(self, name: str, source: Expected) -> tuple[float, str]:
        """Bytes of one as it is stored."""
        side = self.config.images.max_side
        each = source.fetched / source.inputs if source.fetched is not None else None
        if side is None:
            if each is None:
                raise RequestError(f"images.max_side = null: how large {name}'s images are is not known; build some")
            return each, "as it is fetched"
        pixels = JPEG_PIXEL * side * side * ASPECT
        if each is not None and each <= pixels:
            return each, "as it is fetched"
        self.assume(f"{JPEG_PIXEL} bytes a pixel of an image that is stored again, {side} x {side * ASPECT:.0f} pixels")
        return pixels, "assumed"

    def _autoencoder(self, column: str, options: LatentsColumn) -> tuple[int, int]:
        if options.autoencoder not in rates.AUTOENCODERS:
            raise RequestError(
                f"columns.{column}.autoencoder = {options.autoencoder!r}: the shape of its latents is not known here; "
                "name a small build that has the column with --from CORPUS"
            )
        return rates.AUTOENCODERS[options.autoencoder]

    def tokens(self, column: str, name: str, options: TextColumn) -> tuple[float, int, str]:
        """Tokens of a caption in the mean, or at most; the width of one."""
        encoder = rates.ENCODERS.get(options.encoder)
        if encoder is None:
            raise RequestError(
                f"columns.{column}.encoder = {options.encoder!r}: the shape of its embeddings is not known here; "
                "name a small build that has the column with --from CORPUS"
            )
        if encoder.always and not options.trim:
            return encoder.tokens, encoder.width, "shapes"
        captions = f"captions/{column.partition('@')[2]}"
        words = None
        if self.earlier is not None and captions not in self.otherwise:
            words = self.earlier.words(captions, name)
        if words is None:
            self.assume(f"{column}: every caption has the {encoder.tokens} tokens that {options.encoder} keeps at most")
            return encoder.tokens, encoder.width, f"shapes, at most ({encoder.tokens} tokens)"
        self.assume(f"{TOKENS_A_WORD} tokens a word, and one at the end, where an earlier build has the captions alone")
        tokens = min(words * TOKENS_A_WORD + 1, encoder.tokens)
        return tokens, encoder.width, f"shapes, {tokens:.0f} tokens for the earlier build's {words:.0f} words"


def by_origin(origins: Mapping[str, str]) -> str:
    """Where numbers come from, by source: said once if it is the same for all."""
    sources: dict[str, list[str]] = {}
    for name, origin in origins.items():
        sources.setdefault(origin, []).append(name)
    if len(sources) < 2:
        return "".join(sources)
    return "; ".join(f"{', '.join(names)}: {origin}" for origin, names in sources.items())


def _text_bytes(tokens: float, width: int, options: TextColumn) -> float:
    """Of the member of a caption: fp16, or the arrays of a quantised one and the zip around them."""
    if options.storage == "float16":
        return tokens * width * 2 + NPY_HEADER
    bits = {"int8": 8, "int4": 4}[options.storage]
    return tokens * (width * bits / 8 + 2 * groups_of(width, options.storage)) + 2 * NPY_HEADER + ZIP


def _blocks(size: float) -> float:
    """Bytes of a member of a tar: its header, and its data in whole blocks."""
    return 512 + math.ceil(size / 512) * 512
