"""Bytes of each column: learned from a past build, from shapes, or assumed; each figure says which."""

import math
from collections.abc import Callable, Mapping

from microdit.model.pretrained.packaged import EFFICIENTNET, FEATURES
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.scores import EmbeddingScores
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.quantised import groups_of
from microdit.pipeline.estimate import rates
from microdit.pipeline.estimate.past_build import PastBuild, ShardSize
from microdit.pipeline.estimate.result import EstimatedColumn
from microdit.pipeline.estimate.source_sizes import SourceSize

TOKENS_A_WORD = 1.4
TAR_SAMPLE = 512 + 256  # bytes of a member beside its data: the header, and half a block of padding
NPY_HEADER, ZIP = 128, 202
EMBEDDING = 1_024
ROW, TABLE_ROW, SHARD = 60.0, 150.0, 8_000.0  # bytes of a sidecar's row, of a table's, and of a shard besides
IMAGE_JSON, JPEG_PIXEL, ASPECT = 1_024.0, 0.6, 4 / 3  # bytes; bytes a pixel at quality 95; sides of an image


class ColumnSizes:
    """Sizes of the columns of a config.

    Args:
        otherwise: columns of which the past build tells nothing, because it made them otherwise.
        assume: receives lines for people.
    """

    def __init__(
        self,
        config: BuildConfig,
        sources: Mapping[str, SourceSize],
        past: PastBuild | None,
        otherwise: Mapping[str, str],
        assume: Callable[[str], None],
    ):
        self.config, self.sources, self.past = config, sources, past
        self.otherwise, self.assume = otherwise, assume
        self.shards = {name: source.shards(config.shard_samples) for name, source in sources.items()}

    def columns(self) -> dict[str, EstimatedColumn]:
        """Estimate every column, over all sources."""
        estimated: dict[str, EstimatedColumn] = {}
        good: dict[tuple[str, str], float] = {}
        for column in [IMAGES, *sorted(self.config.columns, key=lambda name: "@" in name)]:
            out = size = 0
            origins: dict[str, str] = {}
            for name, source in self.sources.items():
                shard_size, origins[name] = self._size(column, name, source, good)
                good[column, name] = shard_size.out
                out += round(source.inputs * shard_size.out)
                size += round(shard_size.bytes(source.inputs, self.shards[name]))
            inputs = sum(source.inputs for source in self.sources.values())
            estimated[column] = EstimatedColumn(inputs, out, size, by_origin(origins))
        return {name: estimated[name] for name in [IMAGES, *self.config.columns]}

    def _size(
        self, column: str, name: str, source: SourceSize, good: Mapping[tuple[str, str], float]
    ) -> tuple[ShardSize, str]:
        """Return the size of a column's shards of one source, and its origin.

        good: the share of samples that are good, by column and source, of the columns before.
        """
        if self.past is not None and column not in self.otherwise and (learned := self.past.size(column, name)):
            return learned, f"earlier build, {learned.shards:,} shards"
        options = self.config.columns.get(column)
        above = f"captions/{column.partition('@')[2]}" if isinstance(options, TextColumn) else IMAGES
        out = good.get((above, name), 1 - source.failed)
        if column == IMAGES:
            if source.failed:
                self.assume(f"{source.failed:.0%} of {name}'s inputs have no caption or are unwanted, as is written")
            sample, origin = self._image(name, source)
            return ShardSize(0, out, sample + 2 * TAR_SAMPLE + IMAGE_JSON, 3 * TABLE_ROW, SHARD), origin
        if isinstance(options, LatentsColumn):
            channels, down = self._autoencoder(column, options)
            sample = channels * (options.resolution / down) ** 2 * (4 if options.posterior == "moments" else 2)
            return ShardSize(0, out, _blocks(sample + NPY_HEADER), ROW, SHARD), "shapes"
        if isinstance(options, TextColumn):
            tokens, width, origin = self.tokens(column, name, options)
            return ShardSize(0, out, _blocks(_text_bytes(tokens, width, options)), ROW, SHARD), origin
        if isinstance(options, EmbeddingScores):
            known = options.model == EFFICIENTNET
            if not known:
                self.assume(f"{column}: {EMBEDDING:,} features, as a large model has")
            sample = _blocks(2 * (FEATURES if known else EMBEDDING) + NPY_HEADER)
            return ShardSize(0, out, sample, ROW, SHARD), "shapes" if known else "assumed"
        self.assume(f"{TABLE_ROW:.0f} bytes a row of captions and scores that no earlier build has")
        return ShardSize(0, out, 0.0, TABLE_ROW, SHARD), "assumed"

    def _image(self, name: str, source: SourceSize) -> tuple[float, str]:
        """Return bytes of an image as it is stored, and their origin."""
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
        """Mean number of tokens of a caption (or the most), the width of a token, and the origin of both."""
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
        if self.past is not None and captions not in self.otherwise:
            words = self.past.words(captions, name)
        if words is None:
            self.assume(f"{column}: every caption has the {encoder.tokens} tokens that {options.encoder} keeps at most")
            return encoder.tokens, encoder.width, f"shapes, at most ({encoder.tokens} tokens)"
        self.assume(f"{TOKENS_A_WORD} tokens a word, and one at the end, where an earlier build has the captions alone")
        tokens = min(words * TOKENS_A_WORD + 1, encoder.tokens)
        return tokens, encoder.width, f"shapes, {tokens:.0f} tokens for the earlier build's {words:.0f} words"


def by_origin(origins: Mapping[str, str]) -> str:
    """Join the origins of all sources: one alone if it is the same for all."""
    sources: dict[str, list[str]] = {}
    for name, origin in origins.items():
        sources.setdefault(origin, []).append(name)
    if len(sources) < 2:
        return "".join(sources)
    return "; ".join(f"{', '.join(names)}: {origin}" for origin, names in sources.items())


def _text_bytes(tokens: float, width: int, options: TextColumn) -> float:
    """Return bytes of a caption's embedding: float16, or the arrays of a quantised one and the zip around them."""
    if options.storage == "float16":
        return tokens * width * 2 + NPY_HEADER
    bits = {"int8": 8, "int4": 4}[options.storage]
    return tokens * (width * bits / 8 + 2 * groups_of(width, options.storage)) + 2 * NPY_HEADER + ZIP


def _blocks(size: float) -> float:
    """Return bytes of a tar's member: its header, and its data in whole blocks."""
    return 512 + math.ceil(size / 512) * 512
