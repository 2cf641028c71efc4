"""Training captions that are prompts, training images of the reference."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from microdit.pipeline.cli.app import app
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.evaluation.contamination import NEAR, PromptIndex, contaminated_captions, words_of
from tests.pipeline.evaluation.test_evaluate import folder
from tests.pipeline.helpers.picture_corpus import corpus_of, photo
from tests.pipeline.helpers.small_corpus import fill, make_corpus

PROMPTS = ["a photo of a bench", "a photo of two clocks", "a photo of a purple wine glass and a black apple"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A photo of a bench.", ("a photo of a bench", True)),
        ("the BENCH", ("a photo of a bench", True)),
        ("a black apple, and a purple wine-glass", (PROMPTS[2], True)),
        ("a black apple and a purple wine glass outdoors", (PROMPTS[2], False)),
        ("a bench in the park", None),
        ("a photo of", None),
        ("", None),
        ("two", None),
    ],
)
def test_captions_are_compared_by_their_words(caption: str, expected: tuple[str, bool] | None) -> None:
    assert PromptIndex(PROMPTS).find(caption) == expected


WORDS = ["a", "red", "green", "big", "dog", "cat", "bench", "photo", "of", "on"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
def test_what_is_found_is_what_comparing_with_all_finds(prompts: list[str], caption: str) -> None:
    words = words_of(caption)
    shares = [len(words & words_of(each)) / len(words | words_of(each) or {0}) for each in prompts]
    found = PromptIndex(prompts).find(caption)
    if any(words == words_of(each) for each in prompts):
        assert found is not None and found[1]
    elif max(shares) >= NEAR:
        assert found is not None and not found[1] and shares[prompts.index(found[0])] == max(shares)
    else:
        assert found is None


def test_captions_of_a_corpus_are_counted_and_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus, columns=("captions/source",))
    found = contaminated_captions(corpus, ["a photo of picture 3 — é", "something else"])
    assert (found["captions"], found["equal"], found["near"], found["prompts"]) == (6, 2, 0, 1)
    assert found["examples"] == [
        {"sample": "demo/demo-000000-00/3", "caption": "picture 3 — é", "prompt": "a photo of picture 3 — é"}
    ]


def test_the_command_counts_images_of_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    reference = corpus_of(tmp_path / "reference", [photo(seed) for seed in range(4)])
    training = corpus_of(tmp_path / "training", [photo(seed) for seed in (2, 3, 10, 11, 12)])
    some = folder(tmp_path / "some", range(4))
    arguments = [some, "--reference", reference.url, "--metrics", "fid-lite", "--size", 48, "--out", tmp_path / "out"]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = CliRunner(env=environment).invoke(
        app, ["evaluate", *map(str, arguments), "--training", Corpus.open(training.url).url]
    )
    assert result.exit_code == 0, result.output
    assert "training: 2 of 5 images are near one of the reference, 2 equal to one" in result.stdout
    shared = json.loads((tmp_path / "out" / "evaluation.json").read_text())["contamination"]
    assert shared["images"] == {"images": 5, "near": 2, "equal": 2, "distance": 6}
