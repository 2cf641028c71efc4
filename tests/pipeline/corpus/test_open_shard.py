import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from microdit.pipeline.corpus.open_shard import is_finite
from microdit.pipeline.corpus.quantised import Quantised

NUMBERS = st.floats(width=16) | st.sampled_from([np.nan, np.inf, -np.inf, 65504.0, -65504.0, -0.0, 6e-8])


@given(
    array=arrays(np.float16, array_shapes(max_dims=3, min_side=0), elements=NUMBERS),
    dtype=st.sampled_from([np.float16, np.float32, ">f2"]),
)
def test_finite_is_what_numpy_says(array: np.ndarray, dtype: type) -> None:
    assert is_finite(array.astype(dtype)) == np.isfinite(array).all()
    assert is_finite(array.astype(dtype).T) == np.isfinite(array).all()


@given(arrays(np.float16, (3, 2), elements=NUMBERS))
def test_quantised_text_is_finite_where_its_scales_are(scale: np.ndarray) -> None:
    assert is_finite(Quantised(np.zeros((3, 8), np.int8), scale)) == np.isfinite(scale).all()
