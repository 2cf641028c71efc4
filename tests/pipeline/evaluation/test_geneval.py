"""GenEval's rules, against what its own code says of the same detections (`tests/data/evaluation/make_geneval.py`)."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.geneval import Detection, failure, parse_prompts, relative_position, summary
from tests.pipeline.evaluation.references import DATA

CASES: list[dict[str, Any]] = [json.loads(line) for line in (DATA / "geneval.jsonl").read_text().splitlines()]
DOG = {"class": "dog", "count": 1}


def test_each_picture_is_judged_as_by_the_original() -> None:
    assert len(CASES) >= 200 and {case["prompt"]["tag"] for case in CASES} == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr",
    }  # fmt: skip
    prompts = parse_prompts(case["prompt"] for case in CASES)
    for prompt, case in zip(prompts, CASES, strict=True):
        fault = failure(prompt, map(Detection.model_validate, case["detections"]))
        assert (fault is None) == case["correct"], (case, fault)


def test_the_figures_are_means_over_tasks_and_pictures() -> None:
    lines = [
        {"tag": tag, "prompt": f"{tag} {i}", "include": [DOG]} for tag in ("single_object", "colors") for i in range(2)
    ]
    correct = [[True, True, True, False], [False] * 4, [True] * 4, [True] * 4]
    figures = summary(parse_prompts(lines), correct)
    assert figures["tasks"] == {"colors": 1.0, "single_object": 3 / 8}
    assert figures["value"] == pytest.approx((1 + 3 / 8) / 2)
    assert figures["images"] == 11 / 16 and figures["prompts"] == 3 / 4
    # the mean of two prompts with 3/4 and 0 has a standard error of (3/8) / sqrt(2), the mean of two tasks half of it
    assert figures["error"] == pytest.approx(3 / 8 / 2**0.5 / 2, rel=0.15)


@given(
    st.lists(st.integers(0, 300), min_size=4, max_size=4),
    st.lists(st.integers(0, 300), min_size=4, max_size=4),
)
def test_relations_are_opposite_when_seen_from_the_other(first: list[int], second: list[int]) -> None:
    a, b = ([*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])] for box in (first, second))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {opposite[each] for each in relative_position(a, b)} == relative_position(b, a)
    assert relative_position(a, a) == set()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"tag": "colors", "prompt": "a", "include": [{"class": "dog"}]}], r"line 1: .*count"),
        ([{"tag": "colours", "prompt": "a"}], r"line 1: .*tag"),
        ([{"tag": "colors", "prompt": "a", "include": [DOG]}] * 2, "line 2: 'a' is there twice"),
        (
            [{"tag": "position", "prompt": "a", "include": [{**DOG, "position": ["above", 0]}]}],
            "line 1: entry 0 is above entry 0, which is not before it",
        ),
    ],
)
def test_prompts_that_are_none_are_refused(lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_prompts(lines)


def test_a_color_that_is_asked_for_must_be_there() -> None:
    (prompt,) = parse_prompts([{"tag": "colors", "prompt": "a red dog", "include": [{**DOG, "color": "red"}]}])
    dog = Detection.model_validate({"class": "dog", "score": 0.8, "box": [0, 0, 5, 5]})
    with pytest.raises(RequestError, match="detection of 'dog': it has no color"):
        failure(prompt, [dog])
    assert np.isfinite(summary([prompt], [[True]])["value"])
