import gc
import threading

import numpy as np
import pytest
import torch

from microdit.pipeline.base.buffers import MOST_FREE, Buffers

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there torch keeps pinned memory by itself")
HALF = np.dtype(np.float16)


@without_gpu
def test_memory_comes_back_when_nothing_shares_it() -> None:
    buffers = Buffers()
    first = buffers((4, 8), HALF)
    assert first.dtype == torch.float16 and first.shape == (4, 8)
    place, view = first.data_ptr(), first[1:].numpy()
    del first
    assert buffers((4, 8), HALF).data_ptr() != place  # a view is still there
    del view
    places = {buffers((4, 8), HALF).data_ptr() for _ in range(5)}
    assert place in places and len(places) <= 2


@without_gpu
def test_what_is_in_use_is_given_to_nobody_else() -> None:
    buffers = Buffers()
    held = [buffers((n, 3), HALF).fill_(n) for n in (5, 5, 7, 5)]
    assert [tensor.unique().tolist() for tensor in held] == [[5], [5], [7], [5]]


@without_gpu
def test_it_gives_memory_of_a_like_size_again_and_no_other() -> None:
    buffers = Buffers()
    place = buffers((1000,), HALF).data_ptr()
    gc.collect()
    assert buffers((600,), HALF).data_ptr() == place
    assert buffers((10,), HALF).data_ptr() != place
    del place
    for _ in range(2):
        many = [buffers((1000,), HALF) for _ in range(3 * MOST_FREE)]
        many.clear()
    assert len(buffers._free) <= MOST_FREE


@without_gpu
def test_threads_share_it() -> None:
    buffers, wrong = Buffers(), []

    def work(number: int) -> None:
        for _ in range(300):
            tensor = buffers((64,), HALF).fill_(number)
            if tensor.ne(number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
