import numpy as np
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.data.batch import pad_text


def test_padding() -> None:
    texts = [np.ones((n, 3), np.float16) for n in (2, 5, 1)]
    padded, mask = pad_text(texts, [4, 8, 16])
    assert padded.shape == (3, 8, 3) and mask.sum(axis=1).tolist() == [2, 5, 1]
    assert padded.sum() == 3 * 8
    with pytest.raises(RequestError, match="17 tokens, the last length is 16; add 17"):
        pad_text([np.ones((17, 3), np.float16)], [4, 8, 16])
