"""Find the objects of pictures, and their colours, for GenEval's rules: into a file of JSON lines, one a picture.

A run that was stopped goes on with the pictures that the file lacks.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from microdit.model.pretrained.feature_towers import FeatureTower, load_feature_tower
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.mask2former import DetectedObject, ObjectDetector, load_detector
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.features import CLIP_MEAN, CLIP_STD, cropped, normalised
from microdit.pipeline.evaluation.geneval import COLORS, THRESHOLD, GenEvalPrompt
from microdit.pipeline.evaluation.picture_sets import PictureSet

DETECTOR, COLOR_MODEL = "mask2former", "clip-l14-colors"  # names of their weights in `--model`
COLOR_REPOSITORY = "openai/clip-vit-large-patch14"
GREY = (153, 153, 153)  # what is laid around an object before its colour is judged
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# the 80 classes of COCO in its order, with GenEval's names of three: computer mouse, tv remote, computer keyboard
CLASSES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter "
    "bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee "
    "skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass "
    "cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch "
    "potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote computer_keyboard cell_phone microwave "
    "oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
NAMES = tuple(name.replace("_", " ") for name in CLASSES.split())


class ColorJudge:
    """Judges the colour of an object by CLIP: the nearest of ten, each by the mean of three texts."""

    def __init__(self, tower: FeatureTower):
        self._tower, self._texts = tower, dict[str, np.ndarray]()

    def __call__(self, pixels: np.ndarray, objects: Sequence[DetectedObject]) -> list[str]:
        """Judge the objects of one class of a picture, uint8 (H, W, 3)."""
        if not objects:
            return []
        crops = [self._crop(pixels, each) for each in objects]
        device = next(self._tower.parameters()).device
        with torch.inference_mode():
            seen = self._tower(torch.from_numpy(np.stack(crops)).to(device)).float().cpu().numpy()
        return [COLORS[i] for i in (_unit(seen) @ self._colors(NAMES[objects[0].label]).T).argmax(1)]

    def _crop(self, pixels: np.ndarray, each: DetectedObject) -> np.ndarray:
        """Lay an object on grey, and crop its box."""
        around = Image.new("RGB", (pixels.shape[1], pixels.shape[0]), GREY)
        image = Image.composite(Image.fromarray(pixels), around, Image.fromarray(each.mask))
        return normalised(cropped(image.crop(each.box), self._tower.side), CLIP_MEAN, CLIP_STD)

    def _colors(self, name: str) -> np.ndarray:
        """Return the unit features of the ten colours of a class, (10, width)."""
        if name not in self._texts:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            features = _unit(self._tower.read(texts)).reshape(len(COLORS), len(TEMPLATES), -1)
            self._texts[name] = _unit(features.mean(1))
        return self._texts[name]


def _unit(features: np.ndarray) -> np.ndarray:
    unit: np.ndarray = features / np.linalg.norm(features, axis=-1, keepdims=True)
    return unit


def detect_pictures(
    pictures: PictureSet,
    prompts: Sequence[GenEvalPrompt],
    out: Path,
    models: Mapping[str, str],
    device: str | torch.device,
) -> Path:
    """Write `detections.jsonl` into a folder: the objects of each picture whose score exceeds 0.3.

    Colours are judged of the objects of classes of which the picture's prompt asks for one. A picture's prompt is its
    caption.

    Raises:
        RequestError: the weights cannot be had, or a picture's caption is no prompt.
    """
    known = {prompt.prompt: prompt for prompt in prompts}
    for each in pictures.captioned():
        if each.caption not in known:
            raise RequestError(f"picture {each.name}: its caption {each.caption!r} is none of the {len(known)} prompts")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "detections.jsonl"
    done, loaded = _kept(path), None
    with path.open("a") as file:
        for each in pictures.stream():
            if (each.name, each.sha256) in done:
                continue
            detector, judge = loaded = loaded or _models(models, device)
            found = _found(pictures.decoded(each), known[each.caption], detector, judge)
            line = {"picture": each.name, "sha256": each.sha256, "prompt": each.caption, "detections": found}
            file.write(json.dumps(line) + "\n")
            file.flush()
    return path


def _kept(path: Path) -> set[tuple[str, str]]:
    """Read names and hashes of the pictures that are done; a last line that was cut off is removed."""
    done: set[tuple[str, str]] = set()
    whole = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            known = json.loads(line)
            done.add((known["picture"], known["sha256"]))
        except (ValueError, KeyError, TypeError):
            break
        whole.append(line)
    if path.exists():
        path.write_text("".join(whole))
    return done


def _models(models: Mapping[str, str], device: str | torch.device) -> tuple[ObjectDetector, ColorJudge]:
    if DETECTOR not in models:
        raise RequestError(
            "metric 'geneval': its detector is no part of any package: download mmdet's mask2former_swin-s-p4-w7-224_"
            "lsj_8x2_50e_coco_20220504_001756-743b7d99.pth and give its path as --model mask2former=PATH, or give a "
            "file of detections"
        )
    try:
        tower = load_feature_tower(models.get(COLOR_MODEL, COLOR_REPOSITORY), captions=True, device=device)
        return load_detector(models[DETECTOR], device), ColorJudge(tower)
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"metric 'geneval': {error}") from error


def _found(
    pixels: np.ndarray, prompt: GenEvalPrompt, detector: ObjectDetector, judge: ColorJudge
) -> list[dict[str, Any]]:
    """Detect the objects of a picture, and judge the colours of those of which the prompt asks for one."""
    objects = [each for each in detector.detect(pixels) if np.float32(each.score) > np.float32(THRESHOLD)]
    colored = {wanted.name for wanted in prompt.include if wanted.color is not None}
    colors: dict[int, str] = {}
    for name in sorted(colored):
        some = [each for each in objects if NAMES[each.label] == name]
        colors |= {id(each): color for each, color in zip(some, judge(pixels, some), strict=True)}
    return [
        {"class": NAMES[each.label], "score": each.score, "box": each.box}
        | ({"color": colors[id(each)]} if id(each) in colors else {})
        for each in objects
    ]
