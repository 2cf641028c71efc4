"""Draw the pictures that are measured: those of a folder that are not there yet."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.model.picture_files import png_bytes
from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.base.errors import RequestError

AT_ONCE = 64  # pictures that go through the pipeline together, always the same ones: others would round otherwise


def draw_missing(
    pipe: MicroDiTPipeline,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    options: Mapping[str, Any],
    part: tuple[int, int] = (0, 1),
) -> None:
    """Draw a picture of each prompt into a folder, as `000000.png` and so on; those that are there stay.

    Picture i has seed + i. Of 64 pictures that are drawn together all are drawn again if one is missing, so that a run
    that was stopped, and one of several processes, draws the very same ones.

    Args:
        part: number of this process, and of how many: each draws every n-th batch.

    Raises:
        RequestError: the folder holds pictures of other prompts or settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**options, **pipe.settings, "dtype": str(pipe.dtype).removeprefix("torch.")}
    texts = [{"prompt": prompt, "seed": seed + i, **settings} for i, prompt in enumerate(prompts)]
    paths = [folder / f"{i:06d}.png" for i in range(len(prompts))]
    if len(there := {path.name for path in folder.glob("*.png")} - {path.name for path in paths}):
        raise RequestError(f"{folder}: it holds other pictures ({min(there)}); give another --out")
    for i, path in enumerate(paths):
        if path.exists() and (made := _made_by(path)) != texts[i]:
            changed = next((key for key in texts[i] if made.get(key) != texts[i][key]), "parameters")
            raise RequestError(
                f"{path}: it was drawn with {changed} = {made.get(changed)!r}, not {texts[i][changed]!r}; give another "
                "--out, or remove the folder"
            )
    for start in range(part[0] * AT_ONCE, len(prompts), part[1] * AT_ONCE):
        some = range(start, min(start + AT_ONCE, len(prompts)))
        if all(paths[i].exists() for i in some):
            continue

        def write(number: int, picture: Image.Image, some: Sequence[int] = some) -> None:
            path = paths[some[number]]
            if not path.exists():
                partial = path.with_suffix(f".{os.getpid()}.partial")
                partial.write_bytes(png_bytes(picture, texts[some[number]]))
                partial.replace(path)

        pipe([prompts[i] for i in some], seed=[seed + i for i in some], on_image=write, **options)


def _made_by(path: Path) -> dict[str, Any]:
    """Read the settings that a PNG says it was drawn with; empty if it says none."""
    try:
        with Image.open(path) as image:
            made = json.loads(str(image.info.get("parameters", "{}")))
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}
