"""What is no caption is found, and what is one is let through."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.content.caption_answers import clean_answer
from microdit.pipeline.content.caption_faults import LONGEST_PHRASE, REPEATS, fault, known_languages, repeated

ANSWERS = Path(__file__).parents[2] / "data/cases/captions/answers.jsonl"
REASONS = {
    "empty",
    "not_text",
    "no_image",
    "refusal",
    "leaked_tokens",
    "boilerplate",
    "loop",
    "wrong_language",
    "cut_off",
}
CAPTION = "A man in a blue jacket rides his bicycle along a river at dusk, and two dogs follow him."
WORDS = st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8), min_size=1, max_size=60)


@pytest.mark.parametrize(
    "text",
    [
        CAPTION,
        "croissant",
        "tabby cat",
        'A sign that says "I\'m sorry, we are closed."',
        "I ♥ NY, printed on a white shirt.",
        "A very, very, very large dog.",
        "dog, grass, ball, blue sky, tree, park, summer",
        "The words 'Bonjour tout le monde' in white letters on a wall.",
        "Unfortunately for the runner, the shoe is untied.",
    ],
)
def test_captions(text: str) -> None:
    assert fault(text, True, "long", "en") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("...", "empty"),
        ("a \ud800 dog", "not_text"),
        ("I'm sorry, but I can't assist with that request.", "refusal"),
        ("I’m unable to view images.", "refusal"),
        ("I am not able to identify people in images.", "refusal"),
        ("Sorry, I cannot help with this.", "refusal"),
        ("I apologize, but there is no image.", "refusal"),
        ("As an AI language model, I have no eyes.", "refusal"),
        ("dog, dog, dog, dog, dog", "loop"),
        ("A red car and " * 9, "loop"),
        ("The image shows a street. It is " + "very " * 30, "loop"),
        ("一只猫坐在沙发上", "wrong_language"),
        ("Das Bild zeigt eine Katze, die auf einem Sofa sitzt.", "wrong_language"),
        ("Une photo d'un chat assis sur un canapé rouge", "wrong_language"),
        ("Кошка сидит на диване", "wrong_language"),
    ],
)
def test_what_is_none(text: str, reason: str) -> None:
    found = fault(text, True, "long", "en")
    assert found is not None and found[0] == reason


def test_the_wanted_language_is_no_fault() -> None:
    assert fault("Das Bild zeigt eine Katze, die auf einem Sofa sitzt.", True, "long", "de") is None
    assert fault("一只猫坐在沙发上", True, "short", "zh") is None
    assert fault(CAPTION, True, "long", "de") is not None
    assert {"en", "de", "zh", "ja", "fr"} <= known_languages()


def test_cut_off() -> None:
    half = CAPTION[:-12]
    assert fault(half, True, "long", "en") is None
    assert (fault(half, False, "long", "en") or ("",))[0] == "cut_off"
    assert fault(CAPTION, False, "long", "en") is None  # just enough room for the sentence
    assert (fault("dog, tree, sk", False, "tags", "en") or ("",))[0] == "cut_off"
    assert (fault("dog, tree, St.", False, "tags", "en") or ("",))[0] == "cut_off"


@given(WORDS, st.data())
def test_any_phrase_that_goes_round_is_found(words: list[str], data: st.DataObject) -> None:
    phrase = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=LONGEST_PHRASE))
    before, after = data.draw(WORDS), data.draw(WORDS)
    assert repeated([*before, *phrase * REPEATS, *after])


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200, unique=True))
def test_words_that_come_once_are_no_loop(numbers: list[int]) -> None:
    assert repeated([str(number) for number in numbers]) == ""


@given(st.text(max_size=2000), st.booleans(), st.sampled_from(["alt", "short", "long", "tags"]))
def test_any_text_has_an_answer(text: str, finished: bool, kind: str) -> None:
    found = fault(text, finished, kind, "en")
    if found is None:
        assert text.split() and text.encode()
    else:
        assert found[0] in REASONS and found[1]


def judged(text: str, language: str) -> str:
    """The reason of an answer, or its caption."""
    cleaned = clean_answer(text)
    found = fault(cleaned, True, "short", language)
    return " ".join(cleaned.split()) if found is None else found[0]


def test_answers_of_models_in_many_languages() -> None:
    """Under 1% of the good captions are refused or changed; what is none is named."""
    answers = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    wrong = []
    for answer in answers:
        text = answer["text"]
        wanted = answer.get("caption", " ".join(text.split())) if answer["want"] == "caption" else answer["want"]
        if judged(text, answer["language"]) != wanted:
            wrong.append(answer)
    good = [answer for answer in answers if answer["want"] == "caption"]
    assert len(good) > 150 and len(answers) - len(good) > 60
    assert sum(answer["want"] == "caption" for answer in wrong) < 0.01 * len(good), wrong
    assert not [answer for answer in wrong if answer["want"] != "caption"]


@given(st.sampled_from(["<think>", "<thinking>", "◁think▷"]), st.text(max_size=200))
def test_thinking_that_does_not_end_is_never_a_caption(opening: str, text: str) -> None:
    assert judged(f"{opening}{text.replace('/', '')}", "en") in REASONS


@given(st.text(max_size=300))
def test_a_cleaned_answer_has_no_control_characters_and_stays_as_it_is(text: str) -> None:
    cleaned = clean_answer(text)
    assert "\0" not in cleaned and "\x07" not in cleaned and "\ufeff" not in cleaned
    assert len(cleaned) <= len(text)


@pytest.mark.parametrize(
    "text", [part * 100_000 for part in ("Here ", "sure! ", "<think>", "</think>", "{", "``` ", " ", "<|")]
)
def test_long_answers_take_no_long_time(text: str) -> None:
    began = time.monotonic()
    clean_answer(text)
    fault(text[:50_000], True, "long", "en")
    assert time.monotonic() - began < 10
