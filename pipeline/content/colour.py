"""Make pictures opaque and sRGB: apply colour profiles, lay what is transparent on white."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

BROKEN = (ImageCms.PyCMSError, OSError, ValueError)  # what comes of a profile that cannot be used
MAX_PROFILE = 4 << 20  # bytes; profiles of printing presses have one or two MB
MAX_FILLING = 4096  # bytes behind the end that a profile tells of
SAME = 3  # levels that a profile may differ from sRGB by, at most, and on average a third of that
BAND = 4_000_000  # pixels that are worked on at a time: a large picture is not copied whole for each step


def flattened(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Return a Pillow image as opaque sRGB, in the mode RGB or L, and what became of its profile.

    Profiles are applied relative colorimetric. One that is broken or of another colour space is ignored.
    """
    transform, note = _transform(image.mode, profile)
    if transform is None and image.mode in ("RGB", "L") and "transparency" not in image.info:
        return image, note
    rows = max(1, BAND // image.width)
    flat: Image.Image | None = None
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        band = _flat_band(image if rows >= image.height else image.crop(box), transform)
        if rows >= image.height:
            return band, note
        flat = flat or Image.new(band.mode, image.size)
        flat.paste(band, (0, top))
    assert flat is not None  # an image has rows
    return flat, note


def _flat_band(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    """Convert to sRGB, and lay on white."""
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
    if transform is not None:
        image = _applied(image, transform)
    elif image.mode not in ("L", "RGBA"):
        image = image.convert("RGB")
    if clear is None:
        return image
    image = image.convert("RGBA")
    image.putalpha(clear)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _all_but(image: Image.Image, colour: int | tuple[int, ...]) -> Image.Image:
    """Make the alpha channel of an image in which one colour is transparent."""
    same = np.asarray(image) == np.asarray(colour)
    if image.mode == "RGB":
        same = same.all(axis=2)
    return Image.fromarray(np.where(same, 0, 255).astype(np.uint8))


def _transform(mode: str, profile: bytes | None) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """Return how an image of a mode gets from its profile to sRGB, and what becomes of the profile."""
    if not profile:
        return None, ""
    stated = int.from_bytes(profile[:4], "big")
    fits = stated <= len(profile) <= min(stated + MAX_FILLING, MAX_PROFILE)
    space = profile_space(profile) if fits else ""
    gray = mode in ("1", "L", "LA") or mode.startswith("I")
    if space == "sRGB" and mode != "CMYK":
        return None, ""
    if space == "GRAY" and gray:
        return _to_srgb(profile, "L"), "converted"
    if space == "RGB " and mode != "CMYK":
        return _to_srgb(profile, "RGB"), "converted"
    if space == "CMYK" and mode == "CMYK":
        return _to_srgb(profile, "CMYK"), "converted"
    return None, "ignored"


@lru_cache(maxsize=8)
def profile_space(profile: bytes) -> str:
    """Return the colour space that a profile is of, `sRGB` if it is sRGB or as good as that, empty if it is broken."""
    try:
        space = str(ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space)
        if space not in ("RGB ", "GRAY"):
            return space if space == "CMYK" and _to_srgb(profile, space) else ""
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        if space == "GRAY":
            grid = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
        image = Image.fromarray(grid).convert("L" if space == "GRAY" else "RGB")
        there = np.asarray(_applied(image, _to_srgb(profile, image.mode))).astype(int)
    except BROKEN:
        return ""
    far = np.abs(there - grid)
    return "sRGB" if far.max() <= SAME and far.mean() <= SAME / 3 else space


def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    wanted = str(transform.input_mode)
    converted = ImageCms.applyTransform(image if image.mode == wanted else image.convert(wanted), transform)
    assert converted is not None  # only `inPlace` gives None
    return converted
