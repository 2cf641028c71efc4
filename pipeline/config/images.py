"""Options of the `images` block: which pictures ingest takes, and how it stores them."""

from typing import Literal

from pydantic import Field, model_validator

from microdit.pipeline.config.block import Options

PILLOW_MAX_PIXELS = 178_956_970  # above this Pillow itself refuses


class ImageOptions(Options):
    """Images that ingest accepts, and how it stores them; part of a source's fingerprint."""

    min_side: int = Field(default=256, ge=1)
    """An image whose short side has fewer pixels fails with `too_small`."""
    max_side: int | None = Field(default=512, ge=8)
    """A longer short side is reduced to this (bicubic, antialiased); null keeps every size."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=PILLOW_MAX_PIXELS)
    """Width times height, read before anything is decoded; more fails with `bomb`."""
    format: Literal["jpg", "png", "webp"] = "jpg"
    """The format of the stored images. An image that comes in it is kept byte by byte if nothing must be changed."""
    quality: int = Field(default=95, ge=1, le=100)
    """Quality of JPEG (4:4:4) and WebP, where an image is encoded again."""

    reduce: Literal["sharp", "fast"] = "sharp"
    """Reduction of JPEGs to `max_side`: from at least twice that size, or from a quarter more, which takes less time
    and blurs fine text."""

    @model_validator(mode="after")
    def _check_sides(self) -> "ImageOptions":
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError(f"max_side ({self.max_side}) must be at least min_side ({self.min_side})")
        return self
