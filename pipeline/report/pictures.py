"""A sample of the corpus to look at: images with every caption, beside what the autoencoders give back."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from microdit.model.device import best_device
from microdit.pipeline.config.images import PILLOW_MAX_PIXELS
from microdit.pipeline.content.crop import square
from microdit.pipeline.content.images import BadImage, decode
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, Declaration
from microdit.pipeline.selection.view import query
from microdit.pipeline.tables.sample_table import TableField

PICTURES = 15
SEED = "report"  # another word, another sample
BESIDE = 10  # pictures whose captions stand side by side, if there are several captions columns
THUMBNAIL = 120  # pixels of the long side
SIDE = 256  # larger pictures are scaled down to this many pixels
BATCH_LATENTS = 4096  # places (h x w) of the latents that are decoded at a time: 16 images of 128 px, 1 of 512 px
MAX_CAPTION = 420  # characters shown of a caption


def pictures(
    corpus: Corpus,
    columns: Mapping[str, Declaration],
    commits: Mapping[str, Sequence[Commit]],
    fields: Sequence[TableField],
    complete: Iterable[str],
) -> dict[str, Any]:
    """Samples with `id`, `captions`, `views` (the image, then one of each latents column), and the mean PSNR by column;
    some of them once more, small, to see their captions side by side.

    Args:
        complete: SQL conditions of a sample that has every column; such samples are drawn first.
    """
    reader = Reader(corpus, commits)
    captions = {
        f.column: f.name for f in fields if f.scalar == "caption" and commits[f.column] and f.column != "images"
    }
    latents = [name for name in columns if name.startswith("latents/") and commits[name]]
    wanted = ", ".join(["id", "source", "shard", "row", *(f'"{name}"' for name in captions.values())])
    whole = " AND ".join(["true", *complete])
    drawn = query(
        corpus,
        f"SELECT {wanted} FROM samples WHERE status = 'ok' AND format IS NOT NULL "
        f"ORDER BY ({whole}) DESC, md5(id || '{SEED}') LIMIT {PICTURES}",
    ).to_pylist()
    samples, problems = [], []
    for row in drawn:
        data = reader.member("images", row["source"], row["shard"], row["row"])
        if data is None:  # committed while this page was made
            continue
        image = Image.fromarray(decode(data, PILLOW_MAX_PIXELS).pixels)
        shown = image.copy()
        shown.thumbnail((SIDE, SIDE))
        words = {column: str(row[name] or "") for column, name in captions.items()}
        text = next((w for w in words.values() if w), "no caption")
        samples.append(
            {
                "id": row["id"],
                "where": (row["source"], row["shard"], row["row"]),
                "image": image,
                "alt": _cut(text, 120),
                "captions": [
                    {"column": c, "text": _cut(w, MAX_CAPTION), "words": len(w.split())} for c, w in words.items()
                ],
                "views": [_view(shown, "stored", f"{image.width} × {image.height} px", _cut(text, 120))],
            }
        )
    found: dict[str, float] = {}
    for column in latents:
        try:
            found[column] = _add_decoded(reader, columns[column], samples)
        except Exception as error:  # a model may fail to load in a hundred ways; the page is worth having without it
            problems.append(f"{column} cannot be decoded here: {_cut(str(error) or type(error).__name__, 300)}")
    beside = []
    for sample in samples[:BESIDE] if len(captions) > 1 else []:
        small = sample["image"].copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        beside.append({"view": _view(small, "", "", ""), "alt": sample["alt"], "captions": sample["captions"]})
    return {
        "samples": samples,
        "beside": beside,
        "psnr": {c: v for c, v in found.items() if math.isfinite(v)},
        "problems": problems,
    }


def _add_decoded(reader: "Reader", declaration: Declaration, samples: Sequence[dict[str, Any]]) -> float:
    """Add a view of what a latents column holds to every sample that has it; returns the mean PSNR in dB."""
    there = [(s, latent) for s in samples if (latent := reader.latent(declaration.name, *s["where"])) is not None]
    if not there:
        return math.nan
    import torch  # slow to import, and not needed by a corpus without latents

    model = declaration.made_by.get("model", {})
    autoencoder = _autoencoder(str(declaration.made_by["autoencoder"]), model.get("revision"))
    if any(autoencoder.fingerprint.get(name) != value for name, value in model.items()):
        raise ValueError(f"the autoencoder {autoencoder.name!r} that is here is not the one that made them")
    decoded: list[np.ndarray] = []
    while len(decoded) < len(there):
        some = [latent for _, latent in there[len(decoded) :]]
        some = some[: max(1, BATCH_LATENTS // some[0][0].size)]
        stacked = torch.from_numpy(np.stack(some))
        if declaration.made_by.get("posterior") == "moments":
            stacked = stacked[:, : autoencoder.channels]  # the means
        decoded += list(autoencoder.decode(stacked).numpy())
    found = []
    for (sample, _), pixels in zip(there, decoded, strict=True):
        found.append(psnr(square(np.asarray(sample["image"]), pixels.shape[0]), pixels))
        back = Image.fromarray(pixels)
        detail = f"{back.width} px, {found[-1]:.1f} dB"
        back.thumbnail((SIDE, SIDE))
        alt = f"decoded from {declaration.name}: {sample['alt']}"
        sample["views"].append(_view(back, declaration.name.partition("/")[2], detail, alt))
    return float(np.mean(found)) if found else math.nan


@lru_cache(maxsize=1)
def _autoencoder(name: str, revision: str | None) -> Any:
    from microdit.model.pretrained.autoencoder import load_autoencoder

    return load_autoencoder(name, revision=revision, device=best_device())


def thumbnail(reader: "Reader", place: Mapping[str, Any]) -> dict[str, Any] | None:
    """A small picture of a sample (`id`, `source`, `shard`, `row`); None if it cannot be read (`verify` says why)."""
    data = reader.member("images", place["source"], place["shard"], place["row"])
    try:
        image = None if data is None else Image.fromarray(decode(data, PILLOW_MAX_PIXELS).pixels)
    except BadImage:
        image = None
    if image is None:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    size = {"width": image.width, "height": image.height}
    return {"id": place["id"], "uri": data_uri(image), "says": "", "keep": False} | size


def psnr(wanted: np.ndarray, found: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, 10 log10(255^2 / mean squared error), in dB; at most 99."""
    error = float(np.mean((wanted.astype(np.float64) - found.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))


def data_uri(image: Image.Image) -> str:
    """A picture for the page itself: PNG where that is small (drawings), JPEG otherwise."""
    buffer, kind = io.BytesIO(), "png"
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > 4096 + image.width * image.height // 2:
        buffer, kind = io.BytesIO(), "jpeg"
        image.save(buffer, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Reader:
    """Single samples out of committed tars; sidecars that were read are kept."""

    def __init__(self, corpus: Corpus, commits: Mapping[str, Sequence[Commit]]):
        self.corpus = corpus
        self.commits = {(c.column, c.source, c.shard): c for found in commits.values() for c in found}
        self.sidecars: dict[str, pa.Table] = {}

    def member(self, column: str, source: str, shard: str, row: int) -> bytes | None:
        """The first member of a sample; None if the column does not have it."""
        commit = self.commits.get((column, source, shard))
        if commit is None:
            return None
        if commit.name not in self.sidecars:
            self.sidecars[commit.name] = self.corpus.sidecar(commit).select(["status", "offset", "size"])
        line = self.sidecars[commit.name].slice(row, 1).to_pylist()[0]
        if line["status"] != "ok":
            return None
        return self.corpus.store.get_range(commit.object.name, line["offset"], line["size"])

    def latent(self, column: str, source: str, shard: str, row: int) -> np.ndarray | None:
        data = self.member(column, source, shard, row)
        return None if data is None else array_from_bytes(data)


def _view(image: Image.Image, label: str, detail: str, alt: str) -> dict[str, Any]:
    size = {"width": image.width, "height": image.height}
    return {"uri": data_uri(image), "label": label, "detail": detail, "alt": alt} | size


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
