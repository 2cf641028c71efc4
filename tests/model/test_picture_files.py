"""Pictures as files: names, what is written into them, and that nothing is overwritten."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from microdit.model.picture_files import generate, grid
from microdit.model.text_to_image import MicroDiTPipeline
from tests.model.tiny import write_run

PROMPTS = ["red apple", "a very long caption about a lighthouse in the fog that goes on and on", "犬 ☕"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> MicroDiTPipeline:
    pipe = MicroDiTPipeline.from_pretrained(write_run(tmp_path_factory.mktemp("trained") / "run"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parameters(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["parameters"])


def test_pictures_say_what_made_them_and_can_be_made_again(pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    out = tmp_path / "new" / "pictures"
    options: dict[str, Any] = {
        "num_inference_steps": 3, "seed": 7, "negative_prompt": "dog", "sampler": "unipc",
        "guidance_interval": (0.1, 20.0), "width": 48,
    }  # fmt: skip
    paths = generate(pipe, PROMPTS, out, num_images_per_prompt=2, batch_size=4, **options)
    long = "a-very-long-caption-about-a-lighthouse-in-the-fog-that-goes-on-and-on"[:60]
    names = [f"{i:05d}-{words}.png" for i, words in enumerate(["red-apple"] * 2 + [long] * 2 + ["picture"] * 2)]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png"]
    for i, path in enumerate(paths):
        with Image.open(path) as picture:
            assert picture.size == (48, 32) and picture.info["prompt"] == PROMPTS[i // 2]
        assert parameters(path) == {
            "prompt": PROMPTS[i // 2], "negative_prompt": "dog", "seed": 7 + i, "num_inference_steps": 3,
            "guidance_scale": 2.0, "guidance_interval": [0.1, 20.0], "sampler": "unipc", "width": 48, "height": 32,
            "autoencoder": "demo", "text_encoder": "minilm", "checkpoint": pipe.settings["checkpoint"],
            "dtype": "float32",
        }  # fmt: skip
    assert pipe.settings["checkpoint"].endswith("step-00000010/ema.safetensors")
    # alone, by what the picture says: the same up to the rounding of another batch shape
    told = parameters(paths[3])
    call = {key: told[key] for key in told.keys() - pipe.settings.keys() - {"dtype"}}
    again = np.asarray(pipe(**call).images[0]).astype(int)
    assert np.abs(again - np.asarray(Image.open(paths[3]))).max() <= 2
    assert parameters(out / "grid.png")["seed"] == 7


def test_nothing_is_overwritten(pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"somebody's")
    (tmp_path / "00004-old.png").write_bytes(b"somebody's too")
    (tmp_path / "notes-7.png").write_bytes(b"-")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    first = generate(pipe, ["dog", "cat"], tmp_path, num_inference_steps=1)
    second = generate(pipe, ["dog", "cat"], tmp_path, num_inference_steps=1, seed=5)
    assert [path.name for path in first + second] == [
        "00005-dog.png", "00006-cat.png", "00007-dog.png", "00008-cat.png",
    ]  # fmt: skip
    assert {path: path.read_bytes() for path in before} == before
    assert parameters(tmp_path / "grid-1.png")["seed"] == 0 and parameters(tmp_path / "grid-2.png")["seed"] == 5
    assert len(list(tmp_path.iterdir())) == 9


def test_one_picture_needs_no_sheet(pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    assert generate(pipe, ["dog"], tmp_path, num_inference_steps=1) == [tmp_path / "00000-dog.png"]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_drawn_is_kept_when_the_rest_fails(pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    calls = []

    def stop(*_: Any) -> None:
        calls.append(None)
        if len(calls) > 2:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, ["dog"] * 4, tmp_path, num_inference_steps=1, batch_size=1)
    finally:
        hook.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000-dog.png", "00001-dog.png"]


@pytest.mark.parametrize(("cells", "each", "columns"), [(1, 1, None), (7, 2, None), (64, 2, None), (6, 1, 3)])
def test_grid_holds_all_pictures(cells: int, each: int, columns: int | None) -> None:
    colours = [(10 + 3 * i, 200 - 3 * i, 50) for i in range(cells)]
    pictures = [[Image.new("RGB", (64, 64), colour)] * each for colour in colours]
    sheet = grid(pictures, [f"caption {i} that is far too long for its place" for i in range(cells)], columns)
    found = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert set(colours) <= found
    if cells == 64:
        assert 0.7 < sheet.width / sheet.height < 1.4


@pytest.mark.parametrize("size", [(192, 96), (96, 192), (2048, 1024)])
def test_grid_keeps_the_aspect_ratio(size: tuple[int, int]) -> None:
    sheet = grid([[Image.new("RGB", size, "red")]], [""])
    left, top, right, bottom = Image.fromarray((np.asarray(sheet)[..., 1] == 0).astype(np.uint8)).getbbox()
    assert (right - left) / (bottom - top) == size[0] / size[1] and right - left <= 512
