"""The columns of the official micro_diffusion code in MDS, and the columns of a corpus that they become.

caption           captions/<name>              str
caption_latents   text/<encoder>@<captions>    float16 (1, tokens, width), as bytes
latents_<R>       latents/<autoencoder>-<R>    float16 (C, R / 8, R / 8), as bytes: a posterior sample, scaled
jpg               images                       jpeg; without it a sample has no picture (corpus.md, section 3.1)
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.corpus.names import IMAGES, SOURCE
from microdit.pipeline.mds.format import DamagedSample, DamagedShard, ShardInfo, open_shard, read_index
from microdit.pipeline.stages.captions.given import GivenCaptions
from microdit.pipeline.stages.stage import ColumnSpec

CAPTION, TEXT, PICTURE = "caption", "caption_latents", "jpg"
LATENTS = re.compile(r"latents_([1-9][0-9]{0,3})")
ENCODINGS = {CAPTION: ("str",), PICTURE: ("jpeg", "png", "bytes")}  # of all others: bytes
DOWNSAMPLE = 8  # of every autoencoder that the official code knows
BY_CHANNELS = {4: "sdxl", 16: "ostris"}
CHANNELS = {"sdxl": 4, "sdxl-fp16-fix": 4, "ostris": 16}
PICTURES = ImageOptions(min_side=1, max_side=None)  # as they are: they were chosen and resized before


@dataclass(frozen=True)
class Naming:
    """Names and models of a conversion, which the MDS files do not say.

    source, captions: names of the source and of the captions column. autoencoder: None infers it from the channels.
    text_shape: tokens and width of a caption's embedding. as_built: declare the columns as `microdit build` does, so
    that it can add to them; that asks the hub (or its cache) for the models' configs.
    """

    source: str
    captions: str = "source"
    autoencoder: str | None = None
    text_encoder: str = "dfn-clip-h"
    text_shape: tuple[int, int] = (77, 1024)
    as_built: bool = False


@dataclass(frozen=True)
class Arrays:
    """A column of arrays: the MDS column that it comes from, the shape of a sample, and how it is declared."""

    field: str
    shape: tuple[int, ...]
    spec: ColumnSpec


@dataclass(frozen=True)
class Conversion:
    """An MDS folder, read as far as its index and the first shard, and the columns to make of it."""

    folder: Path
    naming: Naming
    shards: list[ShardInfo]
    pictures: bool
    captions: GivenCaptions
    arrays: dict[str, Arrays]
    left_out: list[str]
    """MDS columns that are not taken."""

    @property
    def columns(self) -> list[str]:
        """The columns of the corpus, each after those that it is computed from."""
        return [IMAGES, self.captions.name, *self.arrays]

    @property
    def specs(self) -> dict[str, ColumnSpec]:
        """Declare the columns other than `images`."""
        return self.captions.columns | {column: array.spec for column, array in self.arrays.items()}


# -- planning a conversion -------------------------------------------------------------------------------------------
def plan_conversion(folder: Path, naming: Naming) -> Conversion:
    """Plan the columns of an MDS folder from its index and its first shard.

    Raises:
        RequestError: its index or columns are other than expected, or a name or a shape does not fit.
    """
    if not SOURCE.fullmatch(naming.source):
        raise RequestError(f"--source {naming.source!r}: expected lower-case letters, digits, - and _, as in cc12m")
    # by name, so that merging the workers' indexes later changes nothing
    shards = sorted(read_index(folder), key=lambda shard: shard.raw_data.basename)
    first = next((shard for shard in shards if shard.samples), None)
    if first is None:
        raise RequestError(f"{folder}: there is no sample in its {len(shards)} shards")
    taken = [name for name in first.columns if name in (CAPTION, TEXT, PICTURE) or LATENTS.fullmatch(name)]
    _check_columns(folder, shards, taken)
    arrays: dict[str, Arrays] = {}
    sizes = _sizes(folder, shards, [name for name in taken if name not in (CAPTION, PICTURE)])
    captions = f"captions/{naming.captions}"
    if TEXT in taken:
        column = f"text/{last(naming.text_encoder)}@{naming.captions}"
        _check_text(sizes[TEXT], naming)
        arrays[column] = Arrays(TEXT, naming.text_shape, _text_spec(column, captions, naming))
    autoencoder = naming.autoencoder
    for name in sorted((name for name in taken if LATENTS.fullmatch(name)), key=lambda name: (len(name), name)):
        shape = _latent_shape(name, sizes[name], autoencoder)
        autoencoder = autoencoder or BY_CHANNELS[shape[0]]
        column = f"latents/{last(autoencoder)}-{shape[1] * DOWNSAMPLE}"
        arrays[column] = Arrays(name, shape, _latents_spec(column, autoencoder, shape, naming))
    if len({array.shape[0] for array in arrays.values() if array.field != TEXT}) > 1:
        shapes = {array.field: array.shape for array in arrays.values() if array.field != TEXT}
        raise RequestError(f"{folder}: the latents have other channels at other resolutions: {shapes}")
    left_out = sorted({name for shard in shards for name in shard.columns} - set(taken))
    return Conversion(
        folder, naming, shards, PICTURE in taken, GivenCaptions(captions, CaptionsColumn()), arrays, left_out
    )


def _check_columns(folder: Path, shards: Sequence[ShardInfo], taken: Sequence[str]) -> None:
    """Check that all shards have the same columns: captions and something with them, in encodings of plain bytes."""
    if CAPTION not in taken or len(taken) < 2:
        names = sorted({name for shard in shards for name in shard.columns})
        raise RequestError(
            f"{folder}: its columns are {names}; expected {CAPTION} and some of {TEXT}, latents_256, latents_512, "
            f"{PICTURE}, as the official precompute writes them"
        )
    for shard in shards:
        for name, encoding in shard.columns.items():
            if name in taken and encoding == "pkl":
                raise RequestError(
                    f"{folder}: column {name} of {shard.raw_data.basename} is pickled, and a pickle may run any code: "
                    "it is not read. Write it with the encoding bytes (or str, jpeg)"
                )
            if name in taken and encoding not in ENCODINGS.get(name, ("bytes",)):
                raise RequestError(
                    f"{folder}: column {name} of {shard.raw_data.basename} has the encoding {encoding!r}, expected "
                    + " or ".join(ENCODINGS.get(name, ("bytes",)))
                )
        known = {name for name in shard.columns if name in (CAPTION, TEXT, PICTURE) or LATENTS.fullmatch(name)}
        if shard.samples and known != set(taken):
            raise RequestError(
                f"{folder}: {shard.raw_data.basename} has the columns {sorted(known)}, the first one "
                f"{sorted(taken)}; convert such folders one by one, each as a source of its own"
            )


def _sizes(folder: Path, shards: Sequence[ShardInfo], names: Sequence[str]) -> dict[str, int]:
    """Find the commonest size in bytes of each column in the first shard that can be read."""
    if not names:
        return {}
    fault = ""
    for shard in shards:
        counted: dict[str, Counter[int]] = {name: Counter() for name in names}
        try:
            with open_shard(folder, shard) as file:
                for i in range(shard.samples):
                    try:
                        sizes = file.sizes(i)
                    except DamagedSample as error:
                        fault = fault or str(error)
                    else:
                        for name in names:
                            counted[name][sizes[name]] += 1
        except DamagedShard as error:
            fault = fault or str(error)
        else:
            if all(counted.values()):
                return {name: counts.most_common(1)[0][0] for name, counts in counted.items()}
    raise RequestError(f"{folder}: none of its {len(shards)} shards can be read; the first fault: {fault}")


def _check_text(size: int, naming: Naming) -> None:
    tokens, width = naming.text_shape
    if size != 2 * tokens * width:
        raise RequestError(
            f"--text-shape {tokens}x{width} is {2 * tokens * width:,} bytes of float16, but {TEXT} has {size:,}; give "
            "tokens and width of the encoder that made it: 77x1024 of dfn-clip-h, 120x4096 of t5-xxl"
        )


def _latent_shape(name: str, size: int, autoencoder: str | None) -> tuple[int, int, int]:
    """Infer (C, side, side) of a latents column from its resolution and its size in bytes."""
    match = LATENTS.fullmatch(name)
    assert match is not None
    side = int(match[1]) // DOWNSAMPLE
    channels, rest = divmod(size, 2 * side * side) if side else (0, 1)
    if rest or not channels or int(match[1]) % DOWNSAMPLE:
        raise RequestError(
            f"{name} has {size:,} bytes, which is no float16 (channels, {side}, {side}): expected what an autoencoder "
            f"makes that reduces sides by {DOWNSAMPLE}"
        )
    if channels != CHANNELS.get(autoencoder or BY_CHANNELS.get(channels, ""), channels if autoencoder else 0):
        known = ", ".join(f"{name} has {count}" for name, count in CHANNELS.items())
        raise RequestError(f"{name} has {channels} channels; name the --autoencoder that made it ({known})")
    return channels, side, side


def last(name: str) -> str:
    """Name a model in a column's name: `owner/name` and folders by their last part."""
    return name.rstrip("/").rpartition("/")[2]


def _latents_spec(column: str, autoencoder: str, shape: tuple[int, int, int], naming: Naming) -> ColumnSpec:
    options = LatentsColumn(autoencoder=autoencoder, resolution=shape[1] * DOWNSAMPLE)
    if naming.as_built:
        from microdit.pipeline.stages.latents import Latents

        return Latents({column: options}, PICTURES.max_pixels, Resources()).columns[column]
    # without `model`: nothing records which files made them, so there is nothing to compare
    return ColumnSpec(
        {"stage": "mds", "version": 1, "shape": list(shape), **options.model_dump()}, {"absmax": "float32"}, (IMAGES,)
    )


def _text_spec(column: str, captions: str, naming: Naming) -> ColumnSpec:
    options = TextColumn(encoder=naming.text_encoder)
    if naming.as_built:
        from microdit.pipeline.stages.text import Text

        return Text(column, options, Resources().text_batch).columns[column]
    made_by = {"stage": "mds", "version": 1, "shape": list(naming.text_shape), "captions": captions}
    made_by |= options.model_dump()
    return ColumnSpec(made_by, {"tokens": "int32"}, (captions,))


def float16_array(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Read a `bytes` column, which does not hold its shape, as float16.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    if (wanted := 2 * math.prod(shape)) != len(data):
        raise ValueError(f"{len(data)} bytes; float16 {shape} has {wanted}")
    return np.frombuffer(data, "<f2").reshape(shape)
