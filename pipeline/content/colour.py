"""Make pictures opaque and sRGB: apply colour profiles, lay what is transparent on white."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 4 << 20  # bytes; profiles of printing presses have one or two MB
MAX_FILLING = 4096  # bytes behind the end that a profile tells of
SPACES = {"RGB": ("RGB ",), "L": ("GRAY", "RGB "), "CMYK": ("CMYK",)}  # what a profile may be of, by the image's mode
SAME = 3  # levels that a profile may differ from sRGB by, at most, and on average a third of that


def flattened(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Return a Pillow image as opaque sRGB, in the mode RGB or L, and what became of its profile."""
    clear: Image.Image | None = None  # the alpha channel
    if image.mode in ("1", "L", "RGB") or image.mode.startswith("I"):
        colour = image.info.pop("transparency", None)
        if image.mode == "1":
            image = image.convert("L")
        clear = _all_but(image, colour) if colour is not None else None
        if image.mode.startswith("I"):  # 16 bits of gray
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        clear = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode != "CMYK":
        image = image.convert("RGB")
    image, note = to_srgb(image, profile)
    if clear is not None:
        image = image.convert("RGBA")
        image.putalpha(clear)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode in ("RGB", "L") else image.convert("RGB"), note


def _all_but(image: Image.Image, colour: int | tuple[int, ...]) -> Image.Image:
    """Make the alpha channel of an image in which one colour is transparent."""
    same = np.asarray(image) == np.asarray(colour)
    if image.mode == "RGB":
        same = same.all(axis=2)
    return Image.fromarray(np.where(same, 0, 255).astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Convert an image of the mode RGB, L or CMYK from its profile to sRGB: relative colorimetric.

    Returns:
        The image, which may be the one that came, changed, and what became of the profile, as `Decoded.profile` has it.
        A profile that is broken or of another colour space is ignored.
    """
    if not profile:
        return image, ""
    stated = int.from_bytes(profile[:4], "big")
    fits = stated <= len(profile) <= min(stated + MAX_FILLING, MAX_PROFILE)
    space = profile_space(profile) if fits else ""
    if space == "sRGB" and image.mode != "CMYK":
        return image, ""
    if space not in SPACES[image.mode]:
        return image, "ignored"
    if image.mode == "L" and space == "RGB ":
        image = image.convert("RGB")
    try:
        return _converted(image, profile), "converted"
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image, "ignored"


@lru_cache(maxsize=8)
def profile_space(profile: bytes) -> str:
    """Return the colour space that a profile is of, `sRGB` if it is sRGB or as good as that, empty if it is broken."""
    try:
        space = str(ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space)
        if space not in ("RGB ", "GRAY"):
            return space if space == "CMYK" else ""
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        if space == "GRAY":
            grid = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
        image = Image.fromarray(grid).convert("L" if space == "GRAY" else "RGB")
        there = np.asarray(_converted(image, profile)).astype(int)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return ""
    far = np.abs(there - grid)
    return "sRGB" if far.max() <= SAME and far.mean() <= SAME / 3 else space


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        image.mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only `inPlace` gives None
    return converted
