"""Which maker makes a picture, in which unit, and from which seed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from microdit.pipeline.config.synthesis import MakerOptions, SynthesizeSource
from microdit.pipeline.sources.adapters.synthesize import Synthesize
from microdit.pipeline.sources.synthesis.seeds import SEED_BITS, Shares, picture_seed
from tests.pipeline.helpers.drawn_corpus import PROMPTS, config_of, source_of


@given(st.integers(0, 2**40), st.integers(0, 10**9), st.integers(0, 999))
@settings(print_blob=True)
def test_seeds_are_fixed_small_and_differ_by_all_that_they_depend_on(base: int, row: int, variant: int) -> None:
    seeds = [
        picture_seed(base, "drawn", row, variant, "klein"),
        picture_seed(base + 1, "drawn", row, variant, "klein"),
        picture_seed(base, "other", row, variant, "klein"),
        picture_seed(base, "drawn", row + 1, variant, "klein"),
        picture_seed(base, "drawn", row, variant + 1, "klein"),
        picture_seed(base, "drawn", row, variant, "turbo"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**SEED_BITS for seed in seeds)
    assert float(seeds[0]) == seeds[0]


def test_a_seed_does_not_change_with_versions() -> None:
    assert picture_seed(0, "drawn", 7, 1, "klein") == 0x15B34961DA60B3  # kept corpora depend on it
    assert [Shares(0, "drawn", [1, 2]).maker(row, 0) for row in range(8)] == [1, 0, 1, 1, 0, 1, 0, 0]


@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=5), st.integers(0, 2**32))
@settings(print_blob=True, max_examples=25)
def test_makers_have_their_shares(weights: list[float], base: int) -> None:
    shares, count = Shares(base, "drawn", weights), 4000
    made = [shares.maker(row, 0) for row in range(count)]
    for number, weight in enumerate(weights):
        assert abs(made.count(number) / count - weight / sum(weights)) < 0.05


@given(
    st.lists(st.floats(0.1, 5), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**32)
)
@settings(print_blob=True, max_examples=25)
def test_the_units_have_every_picture_once(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], each: int, per_unit: int, base: int
) -> None:
    makers = [{"model": f"m{number}", "weight": weight} for number, weight in enumerate(weights)]
    url = tmp_path_factory.getbasetemp() / "units" / "corpus"
    url.parent.mkdir(exist_ok=True)
    source = source_of(config_of(url, makers, images_per_prompt=each, prompts_per_unit=per_unit, seed=base))
    keys = []
    for unit in source.units():
        pictures = source._pictures(*source._run(unit))
        assert {source._shares.maker(p.prompt.row, p.variant) for p in pictures} <= {source.model_of(unit)}
        assert [p.ordinal for p in pictures] == list(range(len(pictures)))
        keys += [(p.prompt.row, p.variant) for p in pictures]
    assert sorted(keys) == [(row, variant) for row in range(8) for variant in range(each)]


def test_makers_need_names_of_their_own() -> None:
    assert MakerOptions(model="black-forest-labs/FLUX.2-klein-4B").label == "flux.2-klein-4b"
    given = {"adapter": "synthesize", "prompts": PROMPTS, "makers": [{"model": "a/b"}, {"model": "c/b"}]}
    with pytest.raises(ValidationError, match=r"makers\.0 has this name, too"):
        SynthesizeSource.model_validate(given)
    assert Synthesize.device == "gpu"
