"""Pictures as files: a PNG for each, with its prompt and settings in text fields, and a sheet of them all."""

import json
import math
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from microdit.model.text_to_image import MicroDiTPipeline

LONGEST = 500  # characters of a caption that are looked at: more than a cell is wide
SHEET = 100  # pictures on a sheet at most
NUMBER = re.compile(r"(\d+)-.*\.png")


def generate(
    pipe: MicroDiTPipeline,
    prompts: Sequence[str],
    out: str | Path,
    *,
    seed: int = 0,
    num_images_per_prompt: int = 1,
    **options: Any,
) -> list[Path]:
    """Draw prompts into a folder: `00000-red-apple.png` and so on, each written when it is done; returns the paths.

    Numbers go on behind those in the folder, nothing in it is overwritten. Several pictures are also on `grid.png` (or
    `grid-1.png`, ...), the first 100 if they are more. The text field `prompt` of a PNG is its prompt, `parameters`
    all that made it as JSON; of a grid, those of its first picture. Picture i has seed + i. options: of the call of
    `MicroDiTPipeline`.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "num_inference_steps": 30,
        "guidance_scale": pipe.guidance_scale,
        "sampler": "heun",
        **{key: value for key, value in options.items() if value is not None and key != "batch_size"},
        **pipe.settings,
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    used = [int(match[1]) for path in folder.iterdir() if (match := NUMBER.fullmatch(path.name))]
    first, paths, shown = max(used, default=-1) + 1, [], []

    def write(number: int, picture: Image.Image) -> None:
        prompt = prompts[number // num_images_per_prompt]
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        text = {"prompt": prompt, "seed": seed + number, "width": picture.width, "height": picture.height, **settings}
        paths.append(_save(picture, folder, first + number, words or "picture", text))
        if number < SHEET:
            shown.append((picture, text))

    pipe(prompts, seed=seed, num_images_per_prompt=num_images_per_prompt, on_image=write, **options)
    if len(shown) > 1:
        columns = num_images_per_prompt if 1 < num_images_per_prompt < len(shown) else None
        sheet = grid([[picture] for picture, _ in shown], [text["prompt"] for _, text in shown], columns)
        number = 0
        while not _write_new(folder / f"grid{f'-{number}' if number else ''}.png", png_bytes(sheet, shown[0][1])):
            number += 1
    return paths


def _save(picture: Image.Image, folder: Path, number: int, words: str, text: dict[str, Any]) -> Path:
    """Write a picture to a new file, with the next number that is free."""
    png = png_bytes(picture, text)
    while not _write_new(path := folder / f"{number:05d}-{words}.png", png):
        number += 1
    return path


def png_bytes(picture: Image.Image, text: dict[str, Any]) -> bytes:
    """Encode a picture with its prompt and settings."""
    info, buffer = PngInfo(), BytesIO()
    info.add_itxt("prompt", text["prompt"])
    info.add_itxt("parameters", json.dumps(text, ensure_ascii=False))
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _write_new(path: Path, data: bytes) -> bool:
    """Write a new file. False if there is one of that name."""
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def grid(cells: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Lay out cells of pictures of one size, each over its caption; by default about as wide as it is high."""
    first = cells[0][0]
    wide = min(max(96, first.width), 512)
    high = max(1, round(wide * first.height / first.width))
    width, height, gap = wide * len(cells[0]), high + 18, 6
    columns = columns or max(1, round(math.sqrt(len(cells) * height / width)))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (pictures, caption) in enumerate(zip(cells, captions, strict=True)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + gap)
        for number, picture in enumerate(pictures):
            sheet.paste(picture.resize((wide, high), Image.Resampling.BICUBIC), (left + number * wide, top))
        text = " ".join(caption[:LONGEST].split())
        while text and draw.textlength(text, font) > width:
            text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
        draw.text((left, top + high + 2), text, "black", font)
    return sheet
