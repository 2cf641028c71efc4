"""Draw samples of the corpus: images with every caption, beside what the autoencoders give back."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from microdit.pipeline.content.crop import square
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit, Declaration
from microdit.pipeline.report.sample_view import SampleView
from microdit.pipeline.report.stored import THUMBNAIL, Reader, SampleRef, data_uri
from microdit.pipeline.stages.decoding import decode_latents
from microdit.pipeline.tables.sample_table import TableField

PICTURES = 15
SEED = "report"  # another word, another sample
BESIDE = 10  # pictures whose captions stand side by side, if there are several captions columns
SIDE = 256  # larger pictures are scaled down to this many pixels
MAX_CAPTION = 420  # characters shown of a caption


@dataclass(frozen=True)
class View:
    """One picture of a sample: the stored image, or a decoded latent."""

    uri: str
    width: int
    height: int
    label: str
    detail: str
    alt: str


@dataclass(frozen=True)
class CaptionText:
    """The caption of a sample in one column, cut to what is shown, and how many words it has whole."""

    column: str
    text: str
    words: int


@dataclass(frozen=True)
class SampleCard:
    """A sample with its captions and views: the image, then one of each latents column."""

    ref: SampleRef
    image: Image.Image
    """As it is stored."""
    alt: str
    captions: list[CaptionText]
    views: list[View]


@dataclass(frozen=True)
class CaptionsBeside:
    """A small picture with every caption."""

    view: View
    alt: str
    captions: list[CaptionText]


@dataclass(frozen=True)
class Pictures:
    """Samples to look at, and what could not be decoded."""

    samples: list[SampleCard]
    beside: list[CaptionsBeside]
    """Some of the samples once more, if there are several captions columns."""
    psnr: dict[str, float]
    """By latents column, dB on average over the samples."""
    problems: list[str]


def pictures(
    view: SampleView,
    columns: Mapping[str, Declaration],
    commits: Mapping[str, Sequence[Commit]],
    fields: Sequence[TableField],
    complete: Iterable[str],
) -> Pictures:
    """Draw samples, and decode their latents beside them.

    Args:
        commits: by column the newest ones.
        complete: SQL conditions of a sample that has every column; such samples are drawn first.
    """
    reader = view.reader
    captions = [f.column for f in fields if f.scalar == "caption" and commits[f.column] and f.column != IMAGES]
    samples = _draw_samples(view, captions, complete)
    psnrs: dict[str, float] = {}
    problems = []
    for column in [name for name in columns if name.startswith("latents/") and commits[name]]:
        try:
            psnrs[column] = _add_decoded(reader, columns[column], samples)
        except Exception as error:  # a model may fail to load in a hundred ways; the page is worth having without it
            problems.append(f"{column} cannot be decoded here: {_cut(str(error) or type(error).__name__, 300)}")
    beside = [_captions_beside(sample) for sample in samples[:BESIDE]] if len(captions) > 1 else []
    return Pictures(samples, beside, {c: value for c, value in psnrs.items() if math.isfinite(value)}, problems)


def _draw_samples(view: SampleView, captions: Iterable[str], complete: Iterable[str]) -> list[SampleCard]:
    """Read `PICTURES` samples, always the same ones, those that have every column first.

    Args:
        captions: columns of them, which are read of these samples alone.
    """
    whole = " AND ".join(["status = 'ok'", *complete])
    drawn = view.rows(
        f"SELECT id, source, shard, row FROM samples WHERE status = 'ok' AND format IS NOT NULL "
        f"ORDER BY ({whole}) DESC, md5(id || '{SEED}') LIMIT {PICTURES}"
    )
    cards = []
    for row in drawn:
        ref = SampleRef(row["id"], row["source"], row["shard"], row["row"])
        image = view.reader.image(ref)
        if image is not None:
            cards.append(_card(ref, image, {column: view.reader.caption(column, ref) for column in captions}))
    return cards


def _card(ref: SampleRef, image: Image.Image, captions: Mapping[str, str]) -> SampleCard:
    alt = _cut(next((text for text in captions.values() if text), "no caption"), 120)
    return SampleCard(
        ref=ref,
        image=image,
        alt=alt,
        captions=[CaptionText(column, _cut(t, MAX_CAPTION), len(t.split())) for column, t in captions.items()],
        views=[_view(_smaller(image, SIDE), "stored", f"{image.width} × {image.height} px", alt)],
    )


def _captions_beside(card: SampleCard) -> CaptionsBeside:
    return CaptionsBeside(_view(_smaller(card.image, THUMBNAIL), "", "", ""), card.alt, card.captions)


def _add_decoded(reader: Reader, declaration: Declaration, samples: Sequence[SampleCard]) -> float:
    """Add a view of what a latents column holds to every sample that has it; returns the mean PSNR in dB."""
    with_latent = [(s, latent) for s in samples if (latent := reader.latent(declaration.name, s.ref)) is not None]
    if not with_latent:
        return math.nan
    values = []
    decoded = decode_latents(declaration, [latent for _, latent in with_latent])
    for (sample, _), pixels in zip(with_latent, decoded, strict=True):
        values.append(psnr(square(np.asarray(sample.image), pixels.shape[0]), pixels))
        back = Image.fromarray(pixels)
        detail = f"{back.width} px, {values[-1]:.1f} dB"
        alt = f"decoded from {declaration.name}: {sample.alt}"
        sample.views.append(_view(_smaller(back, SIDE), declaration.name.partition("/")[2], detail, alt))
    return float(np.mean(values))


def psnr(wanted: np.ndarray, actual: np.ndarray) -> float:
    """Compute the PSNR of two uint8 images in dB: 10 log10(255^2 / mean squared error), at most 99."""
    error = float(np.mean((wanted.astype(np.float64) - actual.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))


def _view(image: Image.Image, label: str, detail: str, alt: str) -> View:
    return View(data_uri(image), image.width, image.height, label, detail, alt)


def _smaller(image: Image.Image, side: int) -> Image.Image:
    """Copy a picture, scaled down to at most `side` pixels."""
    copy = image.copy()
    copy.thumbnail((side, side))
    return copy


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
