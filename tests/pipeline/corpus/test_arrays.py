"""Arrays there and back; damaged and hostile ones are one error."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

from microdit.pipeline.corpus.arrays import array_bytes, array_from_bytes

ROUND_TRIP = settings(max_examples=60, deadline=None, print_blob=True)


@ROUND_TRIP
@given(st.data())
def test_an_array_gives_back_itself(data: st.DataObject) -> None:
    shape = data.draw(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    array = data.draw(arrays(data.draw(scalar_dtypes()), shape))
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    back = array_from_bytes(array_bytes(array))
    assert back.dtype == array.dtype and back.shape == array.shape and back.flags.writeable
    assert back.tobytes() == array.tobytes()


@settings(max_examples=400, deadline=None, print_blob=True)
@given(st.data())
def test_damaged_arrays_give_an_array_or_one_error(data: st.DataObject) -> None:
    whole = array_bytes(np.arange(12, dtype=np.float16).reshape(3, 4))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        array = array_from_bytes(bytes(damaged[: data.draw(st.integers(0, len(whole)))]))
    except ValueError:
        return
    assert array.nbytes <= len(whole)


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x04K\x01.",  # a pickle
        _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", b"1234"),
        _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\x04K\x01."),
        _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", b"1234"),
        _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }", b"1234"),
        _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"12345678"),
        b"\x93NUMPY\x09\x00" + b"\0" * 100,
    ],
)
def test_hostile_arrays_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        array_from_bytes(data)


def test_threads_read_arrays_at_the_same_time() -> None:
    """Python 3.11's own parser, which numpy reads headers with, fails now and then when threads take turns in it."""
    files = [array_bytes(np.zeros((n % 97 + 1, n // 97 + 1), np.float16)) for n in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        shapes = [array.shape for array in pool.map(array_from_bytes, files)]
    assert shapes == [(n % 97 + 1, n // 97 + 1) for n in range(2000)]
