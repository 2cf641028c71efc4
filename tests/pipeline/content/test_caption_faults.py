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
        if (got := judged(text, answer["language"])) != wanted:
            wrong.append((answer["want"], got, text))
    good = [answer for answer in answers if answer["want"] == "caption"]
    bad = len(answers) - len(good)
    lost = [answer for answer in wrong if answer[0] == "caption"]
    missed = [answer for answer in wrong if answer[0] != "caption"]
    refused = [answer for answer in lost if answer[1] in REASONS]
    languages = {answer["language"] for answer in answers}
    print(
        f"{len(good)} good answers of {len(languages)} languages: {len(refused) / len(good):.2%} refused, "
        f"{len(lost) - len(refused)} changed; {bad} bad ones: {len(missed)} kept or misnamed"
    )
    assert len(good) >= 400 and bad >= 200 and len(languages) >= 15
    assert len(lost) < 0.01 * len(good), lost
    assert not missed


CAPTIONS = [
    CAPTION,
    "A cat's bed stands beside two chairs.",
    "Ein Hund schläft auf dem Sofa.",
    "一只猫坐在红色沙发上。",
]
AROUND = [
    "{}", "<think>It is a dog.</think>\n{}", "<reasoning>a dog</reasoning>{}", "[THINK]a dog[/THINK]\n\n{}",
    "<|channel|>analysis<|message|>A dog.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "<|begin_of_box|>{}<|end_of_box|>", "Sure! Here is a caption: {}", "**Caption:** {}", "Image description: {}",
    "## Description\n\n{}", "Great! Here's a caption for the image:\n\n{}", "{}\n\nLet me know if I can help!",
    "图片描述：{}", "{}\n\n(Word count: 12)",
]  # fmt: skip
WITHIN = [
    "{}",
    '"{}"',
    "“{}”",
    "「{}」",
    "**{}**",
    "*{}*",
    "- {}",
    "```\n{}\n```",
    "<caption>{}</caption>",
    "<p>{}</p>",
]


@given(st.sampled_from(CAPTIONS), st.sampled_from(AROUND), st.sampled_from(WITHIN))
def test_a_caption_comes_out_of_what_stands_around_it(caption: str, around: str, within: str) -> None:
    assert clean_answer(around.format(within.format(caption))) == caption


@given(
    st.sampled_from(CAPTIONS[:2]),
    st.integers(0, 40),
    st.sampled_from(
        ["<|im_end|>", "</s>", "[/INST]", "<image>", "<|endoftext|>", "<eos>", "<loc_12>", "[EOS]", "<0x0A>"]
    ),
)
def test_a_token_of_a_template_anywhere_is_found(caption: str, at: int, token: str) -> None:
    assert judged(caption[:at] + token + caption[at:], "en") == "leaked_tokens"


@pytest.mark.parametrize(
    "text",
    ["- brown dog\n- green sofa", "1. brown dog\n2. green sofa", "* **brown dog**\n* **green sofa**",
     "Tags:\n\n- brown dog\n- green sofa", "**Tags:**\n• brown dog,\n• green sofa"],
)  # fmt: skip
def test_listed_words_get_commas(text: str) -> None:
    assert clean_answer(text) == "brown dog, green sofa"


@pytest.mark.parametrize("text", ["A dog sleeps on the", "A dog and a", "A dog sleeps on a sofa,", "A red sofa and"])
def test_a_sentence_that_breaks_off_is_no_caption(text: str) -> None:
    assert judged(text, "en") == "cut_off"


OPEN = ["<think>", "<thinking>", "◁think▷", "<reasoning>", "<analysis>", "[THINK]", "<seed:think>"]


@given(st.sampled_from(OPEN), st.text(max_size=200))
def test_thinking_that_does_not_end_is_never_a_caption(opening: str, text: str) -> None:
    assert judged(f"{opening}{text.replace('/', '')}", "en") in REASONS


@given(st.text(max_size=300))
def test_a_cleaned_answer_has_no_control_characters_and_stays_as_it_is(text: str) -> None:
    cleaned = clean_answer(text)
    assert "\0" not in cleaned and "\x07" not in cleaned and "\ufeff" not in cleaned
    assert len(cleaned) <= len(text)


@pytest.mark.parametrize(
    "part",
    [
        "Here ",
        "sure! ",
        "<think>",
        "</think>",
        "{",
        "``` ",
        " ",
        "<|",
        "!",
        "**",
        "'",
        "[Caption: ",
        "<|begin_of_box|>",
        "\n- ",
        "let me know if ",
        "caption ",
        "[[",
    ],
)
def test_long_answers_take_no_long_time(part: str) -> None:
    text, began = part * 100_000, time.monotonic()
    clean_answer(text)
    fault(text[:50_000], True, "long", "en")
    assert time.monotonic() - began < 10
