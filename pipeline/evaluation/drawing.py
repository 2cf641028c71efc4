"""Draw the pictures that are measured: those of a folder that are not there yet."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.model.picture_files import png_bytes
from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.base.errors import RequestError

AT_ONCE = 256  # pictures whose prompts are handed to the pipeline together


def draw_missing(
    pipe: MicroDiTPipeline, prompts: Sequence[str], folder: Path, *, seed: int = 0, options: Mapping[str, Any]
) -> None:
    """Draw a picture of each prompt into a folder, as `000000.png` and so on; those that are there stay.

    Picture i has seed + i, whatever is drawn with it, so that a run that was stopped goes on.

    Raises:
        RequestError: the folder holds pictures of other prompts or settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**options, **pipe.settings, "dtype": str(pipe.dtype).removeprefix("torch.")}
    texts = [{"prompt": prompt, "seed": seed + i, **settings} for i, prompt in enumerate(prompts)]
    paths = [folder / f"{i:06d}.png" for i in range(len(prompts))]
    if len(there := {path.name for path in folder.glob("*.png")} - {path.name for path in paths}):
        raise RequestError(f"{folder}: it holds other pictures ({min(there)}); give another --out")
    missing = []
    for i, path in enumerate(paths):
        if not path.exists():
            missing.append(i)
        elif (made := _made_by(path)) != texts[i]:
            changed = next((key for key in texts[i] if made.get(key) != texts[i][key]), "parameters")
            raise RequestError(
                f"{path}: it was drawn with {changed} = {made.get(changed)!r}, not {texts[i][changed]!r}; give another "
                "--out, or remove the folder"
            )
    for start in range(0, len(missing), AT_ONCE):
        some = missing[start : start + AT_ONCE]

        def write(number: int, picture: Image.Image, some: Sequence[int] = some) -> None:
            path = paths[some[number]]
            partial = path.with_suffix(".partial")
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
