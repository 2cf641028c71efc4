"""Judge pictures by GenEval's rules (Ghosh et al., arXiv 2310.11513): what a detector found against what was asked for.

A prompt says what has to be there (`include`: a class, how many, and if wanted a colour, and where it lies to an entry
before it) and what may not (`exclude`: a class, and from how many on it is too many). What it needs of a picture are
the detected objects: class, score, box, and where a colour is asked for the colour of each.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from microdit.pipeline.base.errors import RequestError

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # scores must lie above
MOST_OBJECTS = 16  # of a class, the highest scores
POSITION_SHARE, POSITION_LEAST, DIRECTION = 0.1, 1e-3, 0.5
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RESAMPLES = 1000


class Strict(BaseModel):
    """A record of a file: immutable, with the types that it names."""

    model_config = ConfigDict(frozen=True, strict=True)


class Wanted(Strict):
    """An entry of `include` or `exclude`."""

    name: str = Field(alias="class")
    count: int = Field(ge=1)
    color: str | None = None
    position: tuple[Relation, int] | None = Field(default=None, strict=False)
    """Spatial relation of these objects to those of the entry with that number."""


class GenEvalPrompt(Strict):
    """A line of GenEval's `evaluation_metadata.jsonl`."""

    tag: Tag
    prompt: str
    include: tuple[Wanted, ...] = Field(default=(), strict=False)
    exclude: tuple[Wanted, ...] = Field(default=(), strict=False)


class Detection(Strict):
    """An object in a picture; the box is `x1, y1, x2, y2` in pixels."""

    name: str = Field(alias="class")
    score: float
    box: tuple[float, float, float, float] = Field(strict=False)
    color: str | None = None


def failure(prompt: GenEvalPrompt, detections: Iterable[Detection]) -> str | None:
    """Say why a picture does not show what its prompt asks for; None if it does.

    Raises:
        RequestError: a colour is asked for, and a detection has none.
    """
    objects = countable(detections, COUNTING_THRESHOLD if prompt.tag == "counting" else THRESHOLD)
    matched: list[Sequence[Detection] | None] = []  # by entry; None of one that is not met
    faults = []
    for wanted in prompt.include:
        found = objects.get(wanted.name, [])[: wanted.count]
        fault = _fault(wanted, found, matched)
        matched.append(None if fault else found)
        if fault:
            faults.append(fault)
    for unwanted in prompt.exclude:
        if (count := len(objects.get(unwanted.name, []))) >= unwanted.count:
            faults.append(f"expected {unwanted.name} < {unwanted.count}, found {count}")
    return "; ".join(faults) or None


def countable(detections: Iterable[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Group the detections above a threshold by class: at most 16 of each, the highest scores first.

    As in GenEval's own code scores are compared in float32, and of equal ones the last comes first.
    """
    objects: dict[str, list[Detection]] = {}
    last_first = [*detections][::-1]
    for detection in sorted(last_first, key=lambda each: -np.float32(each.score)):
        if np.float32(detection.score) > np.float32(threshold):
            some = objects.setdefault(detection.name, [])
            if len(some) < MOST_OBJECTS:
                some.append(detection)
    return objects


def _fault(wanted: Wanted, found: Sequence[Detection], matched: Sequence[Sequence[Detection] | None]) -> str | None:
    """Say what of an entry is not met by the objects that were found for it."""
    if len(found) < wanted.count:
        return f"expected {wanted.name} >= {wanted.count}, found {len(found)}"
    if wanted.color is not None:
        colors = [_color(each) for each in found]
        if (count := colors.count(wanted.color)) < wanted.count:
            return f"expected {wanted.color} {wanted.name} >= {wanted.count}, found {count} ({', '.join(colors)})"
    if wanted.position is not None:
        relation, number = wanted.position
        targets = matched[number]
        if targets is None:
            return f"no target for {wanted.name} to be {relation}"
        for each in found:
            for target in targets:
                relations = relative_position(each.box, target.box)
                if relation not in relations:
                    lies = " and ".join(sorted(relations)) or "at no side of the"
                    return f"expected {wanted.name} {relation} target, found {lies} target"
    return None


def _color(detection: Detection) -> str:
    if detection.color is None:
        raise RequestError(f"detection of {detection.name!r}: it has no color, which its prompt asks for")
    return detection.color


def relative_position(box: Sequence[float], target: Sequence[float]) -> set[Relation]:
    """Find where a box lies to another: by the offset of the centres, less a tenth of both boxes' sizes.

    What is left of the offset, by the length of the whole offset, must exceed a half in a direction; two can.
    """
    first, second = (np.asarray(each, np.float64).reshape(2, 2) for each in (box, target))
    offset = first.mean(0) - second.mean(0)
    slack = POSITION_SHARE * (np.abs(first[1] - first[0]) + np.abs(second[1] - second[0]))
    left_over = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if (np.abs(left_over) < POSITION_LEAST).all():
        return set()
    across, down = left_over / np.linalg.norm(offset)
    found: dict[Relation, bool] = {
        "left of": across < -DIRECTION,
        "right of": across > DIRECTION,
        "above": down < -DIRECTION,
        "below": down > DIRECTION,
    }
    return {relation for relation, holds in found.items() if holds}


def summary(prompts: Sequence[GenEvalPrompt], correct: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Add up what is correct by prompt and picture, to GenEval's figures.

    Returns `value`, the mean over the tasks of the share of correct pictures in each; `error`, its standard error over
    the prompts, by resampling those of each task; `tasks` by name; and the shares `images` and `prompts`, of which a
    picture is correct.

    Raises:
        RequestError: a task has no prompt, or a prompt no picture.
    """
    if empty := [prompt.prompt for prompt, some in zip(prompts, correct, strict=True) if not some]:
        raise RequestError(f"GenEval: there is no picture of {len(empty)} prompts, the first {empty[0]!r}")
    tasks: dict[str, list[Sequence[bool]]] = {}
    for prompt, some in zip(prompts, correct, strict=True):
        tasks.setdefault(prompt.tag, []).append(some)
    shares = {task: _share(some) for task, some in sorted(tasks.items())}
    random = np.random.default_rng(0)
    drawn = [
        np.mean([_share([some[i] for i in random.integers(0, len(some), len(some))]) for some in tasks.values()])
        for _ in range(RESAMPLES)
    ]
    return {
        "value": float(np.mean([*shares.values()])),
        "error": float(np.std(drawn, ddof=1)),
        "tasks": shares,
        "images": _share(correct),
        "prompts": float(np.mean([any(some) for some in correct])),
    }


def _share(some: Sequence[Sequence[bool]]) -> float:
    """Return the share of correct pictures among those of several prompts."""
    return sum(map(sum, some)) / sum(map(len, some))


def parse_prompts(lines: Iterable[Mapping[str, Any]]) -> list[GenEvalPrompt]:
    """Check GenEval's prompts.

    Raises:
        RequestError: a line is none, a prompt is there twice, or a position names an entry that is not before it.
    """
    prompts: list[GenEvalPrompt] = []
    known: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            prompt = GenEvalPrompt.model_validate(line)
        except ValueError as error:
            raise RequestError(f"GenEval's prompts, line {number}: {' '.join(str(error).split())[:300]}") from None
        if prompt.prompt in known:
            raise RequestError(f"GenEval's prompts, line {number}: {prompt.prompt!r} is there twice")
        known.add(prompt.prompt)
        for place, wanted in enumerate(prompt.include):
            if wanted.position is not None and not 0 <= wanted.position[1] < place:
                raise RequestError(
                    f"GenEval's prompts, line {number}: entry {place} is {wanted.position[0]} entry "
                    f"{wanted.position[1]}, which is not before it"
                )
        prompts.append(prompt)
    return prompts
