"""Draw the 300 real pictures of `whole.json`: OpenMoji drawings on white, 128 x 128 pixels, from the package.

    python tests/data/evaluation/make_pictures.py FOLDER

`FOLDER/first` and `FOLDER/second` get 150 each. Then, in the environment that make_references.py describes:

    tools/bin/python tests/data/evaluation/make_references.py --whole FOLDER
"""

import sys
from pathlib import Path

from microdit.pipeline.sources.openmoji.drawings import rasterise, svg_files

COUNT, SIDE = 300, 128


def make_pictures(folder: Path) -> list[Path]:
    """Draw the pictures into two folders, and return these: every other one goes to the second."""
    files = list(svg_files().items())
    for number in range(COUNT):
        code, svg = files[number * len(files) // COUNT]
        path = folder / ("first", "second")[number % 2] / f"{number:03}-{code}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rasterise(svg.read_text(), SIDE).save(path)
    return [folder / "first", folder / "second"]


if __name__ == "__main__":
    make_pictures(Path(sys.argv[1]))
