"""Sizes of sources, and `--samples`."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.estimate.source_sizes import SourceSize, parse_samples


@given(st.integers(1, 3000), st.integers(1, 700), st.integers(1, 300))
def test_shards_are_those_of_the_cut(inputs: int, unit_inputs: int, shard_samples: int) -> None:
    units = [min(unit_inputs, inputs - start) for start in range(0, inputs, unit_inputs)]
    found = SourceSize(len(units), inputs, "", unit_inputs=unit_inputs).shards(shard_samples)
    assert found == sum(math.ceil(unit / shard_samples) for unit in units)


@settings(max_examples=200)
@given(st.lists(st.one_of(st.text(max_size=8), st.from_regex(r"([a-c]=)?\d{1,3}", fullmatch=True)), max_size=3))
def test_samples_are_numbers_or_refused(texts: list[str]) -> None:
    try:
        found = parse_samples(texts)
    except RequestError as error:
        assert "--samples" in str(error)
    else:
        assert len(found) == len(texts) and min(found.values(), default=1) > 0
