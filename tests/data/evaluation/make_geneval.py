"""Make `geneval.jsonl`: detections made by hand and at random, and what GenEval's own code says of them.

Run by hand:

git clone https://github.com/djghosh13/geneval
python tests/data/evaluation/make_geneval.py geneval/evaluation/evaluate_images.py
"""

import ast
import json
import random
import sys
from itertools import count
from pathlib import Path

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
WANTED = {"evaluate", "evaluate_image", "relative_position", "compute_iou"}


def originals(path: str, detected: dict) -> dict:
    """GenEval's own functions, with a detector and a classifier of colours that say what is in `detected`."""
    tree = ast.parse(Path(path).read_text())
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in WANTED]

    class Transposed:
        exif_transpose = staticmethod(lambda image: image)

    class Opened:
        open = staticmethod(lambda path: None)

    names = {
        "np": np,
        "json": json,
        "Image": Opened,
        "ImageOps": Transposed,
        "COLORS": COLORS,
        "THRESHOLD": 0.3,
        "COUNTING_THRESHOLD": 0.9,
        "MAX_OBJECTS": 16,
        "NMS_THRESHOLD": 1.0,
        "POSITION_THRESHOLD": 0.1,
        "object_detector": None,
        "inference_detector": lambda *_: detected["boxes"],
        "color_classification": lambda _, found, name: [detected["colors"][tuple(box.tolist())] for box, _ in found],
    }
    exec(compile(ast.Module(body, []), path, "exec"), names)
    return names


def judged(path: str, case: dict) -> bool:
    """What GenEval's own code says."""
    classes = sorted(
        {each["class"] for each in case["detections"]} | {each["class"] for each in case["prompt"]["include"]}
    )
    boxes = [
        np.array([[*d["box"], d["score"]] for d in case["detections"] if d["class"] == name], np.float32).reshape(-1, 5)
        for name in classes
    ]
    colors = {
        tuple(np.array([*d["box"], d["score"]], np.float32).tolist()): d["color"]
        for d in case["detections"]
        if "color" in d
    }
    detected = {"boxes": boxes, "colors": colors}
    names = originals(path, detected)
    names["classnames"] = classes
    return bool(names["evaluate_image"]("picture.png", case["prompt"])["correct"])


def seen(name: str, score: float, box: tuple, color: str | None = None) -> dict:
    return {"class": name, "score": score, "box": [*box], **({"color": color} if color else {})}


def by_hand() -> list[dict]:
    """Cases at the borders of each rule."""
    number = count()

    def prompt(tag: str, include: list, exclude: list | None = None) -> dict:
        text = f"prompt by hand {next(number)}"
        return {"tag": tag, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": text}

    dog, cat, two = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}, {"class": "dog", "count": 2}
    box, far = (10, 10, 60, 60), (200, 10, 250, 60)
    below_float = float(np.nextafter(np.float32(0.3), np.float32(0)))
    above_float = float(np.nextafter(np.float32(0.3), np.float32(1)))
    cases = []

    def case(wanted: dict, *detections: dict) -> None:
        cases.append({"prompt": wanted, "detections": [*detections]})

    for score in (below_float, 0.3, float(np.float32(0.3)), above_float, 0.31, 0.9):
        case(prompt("single_object", [dog]), seen("dog", score, box))
    case(prompt("single_object", [dog]))
    case(prompt("single_object", [dog]), seen("cat", 0.9, box))
    case(prompt("two_object", [dog, cat]), seen("cat", 0.5, box), seen("dog", 0.5, far))
    case(prompt("two_object", [dog, cat]), seen("cat", 0.5, box))
    for scores in ((0.95, 0.95), (0.95, 0.9), (0.95, 0.89), (0.95, 0.95, 0.95), (0.95, 0.95, 0.5)):
        wanted = prompt("counting", [two], [{"class": "dog", "count": 3}])
        case(wanted, *(seen("dog", score, (i, 0, i + 5, 5)) for i, score in enumerate(scores)))
    for most in (15, 16, 17, 18):  # 16 objects of a class are kept
        wanted = prompt("counting", [{"class": "dog", "count": 16}], [{"class": "dog", "count": 17}])
        case(wanted, *(seen("dog", 0.95, (i, 0, i + 5, 5)) for i in range(most)))
    red = {"class": "dog", "count": 1, "color": "red"}
    case(prompt("colors", [red]), seen("dog", 0.8, box, "red"))
    case(prompt("colors", [red]), seen("dog", 0.8, box, "blue"))
    case(prompt("colors", [red]), seen("dog", 0.8, box, "blue"), seen("dog", 0.7, far, "red"))  # the first alone
    case(prompt("colors", [red]), seen("dog", 0.7, box, "red"), seen("dog", 0.7, far, "blue"))  # of equal scores
    case(prompt("colors", [red]), seen("dog", 0.7, box, "blue"), seen("dog", 0.7, far, "red"))
    both = [{**red}, {"class": "cat", "count": 1, "color": "blue"}]
    case(prompt("color_attr", both), seen("dog", 0.8, box, "red"), seen("cat", 0.8, far, "blue"))
    case(prompt("color_attr", both), seen("dog", 0.8, box, "blue"), seen("cat", 0.8, far, "red"))
    for relation in RELATIONS:
        for moved in ((-100, 0), (100, 0), (0, -100), (0, 100), (-100, -100), (0, 0), (-6, 0), (-4.9, 0), (-5.2, 3)):
            there = (100 + moved[0], 100 + moved[1], 125 + moved[0], 125 + moved[1])
            wanted = prompt("position", [dog, {**cat, "position": [relation, 0]}])
            case(wanted, seen("dog", 0.8, (100, 100, 125, 125)), seen("cat", 0.8, there))
    case(prompt("position", [dog, {**cat, "position": ["left of", 0]}]), seen("cat", 0.8, box))  # no target
    return cases


def at_random(seed: int, number: int) -> dict:
    """A case whose prompt and detections are drawn from few classes and colours, so that many are correct."""
    draw = random.Random(seed)
    names = ["dog", "cat", "computer mouse"]

    def entry(i: int) -> dict:
        wanted = {"class": draw.choice(names), "count": draw.choice([1, 1, 1, 2])}
        if draw.random() < 0.4:
            wanted["color"] = draw.choice(COLORS[:2])
        if i and draw.random() < 0.5:
            wanted["position"] = [draw.choice(RELATIONS), draw.randrange(i)]
        return wanted

    prompt = {"tag": draw.choice(TASKS), "include": [entry(i) for i in range(draw.choice([1, 2, 2, 3]))]}
    if draw.random() < 0.3:
        prompt["exclude"] = [{"class": draw.choice(names), "count": draw.choice([1, 2, 3])}]
    detections = []
    for _ in range(draw.randrange(12)):
        x, y = draw.randrange(200), draw.randrange(200)
        box = (x, y, x + draw.randrange(5, 60), y + draw.randrange(5, 60))
        detections.append(seen(draw.choice(names), draw.randrange(20, 100) / 100, box, draw.choice(COLORS[:2])))
    return {"prompt": {**prompt, "prompt": f"prompt at random {number}"}, "detections": detections}


if __name__ == "__main__":
    cases = [*by_hand(), *(at_random(7 + i, i) for i in range(150))]
    lines = [json.dumps({**case, "correct": judged(sys.argv[1], case)}) for case in cases]
    right = sum(json.loads(line)["correct"] for line in lines)
    print(f"{len(lines)} cases, {right} correct")
    Path(__file__).with_name("geneval.jsonl").write_text("\n".join(lines) + "\n")
