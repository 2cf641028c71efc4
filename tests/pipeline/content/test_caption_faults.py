"""What is no caption is found, and what is one is let through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.content.caption_faults import LONGEST_PHRASE, REPEATS, fault, known_languages, repeated

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
        assert found[0] in {"empty", "not_text", "refusal", "loop", "wrong_language", "cut_off"} and found[1]
