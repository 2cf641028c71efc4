"""Hashes as texts, read as numbers."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.curation.hashes import numbers

VALUE = st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(values=st.lists(st.tuples(VALUE, VALUE), max_size=20), cut=st.integers(0, 20))
def test_texts_of_hex_digits_are_read_wherever_they_lie(values: list[tuple[int, int]], cut: int) -> None:
    texts = pa.array([f"{one:016x}{other:016x}" for one, other in values], pa.string())
    chunks = pa.chunked_array([texts[:cut], texts[cut:]], pa.string())
    assert numbers(chunks, 2).tolist() == [list(pair) for pair in values]


@pytest.mark.parametrize(
    "bad", ["0123456789ABCDEF", "0123456789abcde", "0123456789abcdeg", "0123456789abcde:", "", None]
)
def test_what_is_no_hash_is_named(bad: str | None) -> None:
    texts = pa.chunked_array([["f" * 16], ["0" * 16, bad]], pa.string())
    with pytest.raises(RequestError, match=rf"hash {bad!r}: expected 16 hex digits"):
        numbers(texts, 1)
    assert np.array_equal(numbers(texts[:2], 1), np.array([[2**64 - 1], [0]], np.uint64))
