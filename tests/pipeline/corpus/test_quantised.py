"""Embeddings in fewer bits, there and back, and what is lost."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from microdit.pipeline.corpus.arrays import array_bytes, array_from_bytes, arrays_bytes
from microdit.pipeline.corpus.quantised import FORMS, Loss, Storage, compared, dequantise, groups_of, quantise

PAGE = Path(__file__).parents[3] / "docs/reference/corpus.md"
STORAGES: list[Storage] = ["int8", "int4"]


def stored(embedding: np.ndarray, storage: Storage) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in quantise(torch.from_numpy(embedding), storage).items()}


def numbers(tokens: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, width), np.float32)


@pytest.mark.parametrize("storage", STORAGES)
@given(
    embedding=st.tuples(st.integers(0, 5), st.integers(1, 80)).flatmap(
        lambda shape: arrays.arrays(
            np.float32, (shape[0], 2 * shape[1]), elements=st.floats(-60_000, 60_000, width=32, allow_subnormal=False)
        )
    )
)
@settings(max_examples=200, deadline=None)
def test_no_channel_is_further_off_than_half_a_step(storage: Storage, embedding: np.ndarray):
    data = arrays_bytes(stored(embedding, storage))
    again = array_from_bytes(data)
    assert again.dtype == np.float16
    assert again.shape == embedding.shape
    groups = groups_of(embedding.shape[1], storage)
    size = -(-embedding.shape[1] // groups)
    for at in range(0, embedding.shape[1], size):
        part, found = embedding[:, at : at + size], again[:, at : at + size].astype(np.float64)
        largest = np.abs(part).max(1, keepdims=True, initial=0).astype(np.float64)
        step = largest / FORMS[storage].largest * (1 + 2**-9) + 2**-23
        # half a step, and what float16 rounds of the result
        assert (np.abs(found - part) <= step / 2 + np.abs(part) * 2**-10 + 2**-24).all()


@pytest.mark.parametrize("width", [384, 1024, 4096, 6, 130])
def test_the_reader_on_the_page_reads_the_same(width: int):
    section = PAGE.read_text().split("## 7. Reading without this project")[1].split("\n## ")[0]
    _, program = re.findall(r"```python\n(.*?)```", section, re.S)
    names: dict[str, Any] = {}
    exec(program, names)
    embedding = numbers(7, width)
    for storage in STORAGES:
        data = arrays_bytes(stored(embedding, storage))
        found = names["field"]("k.npz", data)
        assert found.dtype == np.float16
        assert np.array_equal(array_from_bytes(data), found)
    assert np.array_equal(names["field"]("k.npy", array_bytes(embedding)), embedding)


@pytest.mark.parametrize("storage", STORAGES)
def test_equal_embeddings_give_equal_bytes(storage: Storage):
    assert arrays_bytes(stored(numbers(3, 64), storage)) == arrays_bytes(stored(numbers(3, 64), storage))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_what_float16_does_not_hold_is_seen_in_the_scale(storage: Storage, value: float):
    embedding = numbers(2, 64)
    embedding[1, 5] = value
    assert np.isfinite(stored(embedding, storage)["scale"]).all(axis=1).tolist() == [True, False]


def test_an_odd_width_takes_no_four_bits():
    with pytest.raises(ValueError, match="even number of channels, not 7"):
        quantise(torch.zeros(1, 7), "int4")


# Against padded float16, a caption of 40 tokens, with the tar's header and filling: the aims of the format.
@pytest.mark.parametrize(
    ("storage", "width", "padded", "least"), [("int8", 1024, 77, 3.5), ("int8", 4096, 120, 5.8), ("int4", 4096, 120, 9)]
)
def test_bytes_of_a_caption(storage: Storage, width: int, padded: int, least: float):
    size = len(arrays_bytes(stored(numbers(40, width), storage)))
    in_tar = 512 + -(-size // 512) * 512
    assert padded * width * 2 / in_tar >= least


@pytest.mark.parametrize(("storage", "bound"), [("int8", 0.03), ("int4", 0.2)])
def test_outlier_channels_spoil_their_own_group_alone(storage: Storage, bound: float):
    """T5's few channels that are many times as large as the others."""
    embedding = numbers(40, 4096)
    embedding[:, [17, 900, 3333]] *= 40
    loss = Loss.none()
    assert loss.compare(embedding, dequantise(stored(embedding, storage))) < bound
    one_group = np.abs(embedding).max(1, keepdims=True) / FORMS[storage].largest
    plain = Loss.none().compare(embedding, np.round(embedding / one_group) * one_group)
    assert plain > 2 * loss.figures()["error_mean"]


def test_loss_is_that_of_the_tokens():
    loss = Loss.none()
    exact = np.array([[3.0, 4.0], [1.0, 0.0]])
    assert loss.compare(exact, np.array([[3.0, 4.0], [0.0, 1.0]])) == pytest.approx((2 / 26) ** 0.5)
    figures = loss.figures()
    assert figures == pytest.approx(
        {"compared": 1, "cosine_mean": 0.5, "cosine_worst": 0.0, "error_mean": 2**0.5 / 2, "error_worst": 2**0.5}
    )
    assert Loss.none().figures() == {}


def test_one_in_a_hundred_is_compared():
    assert compared([]) == set()
    assert compared([9, 3, 7]) == {1}
    hashes = np.random.default_rng(1).permutation(250).tolist()
    assert {hashes[i] for i in compared(hashes)} == {0, 1, 2}


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"q": np.zeros((2, 4), np.int8)},
        {"q": np.zeros((2, 4), np.int16), "scale": np.ones((2, 1), np.float16)},
        {"q": np.zeros((2, 4), np.int8), "scale": np.ones((3, 1), np.float16)},
        {"q": np.zeros((2, 4), np.int8), "scale": np.ones((2, 5), np.float16)},
        {"q4": np.zeros(4, np.uint8), "scale": np.ones((4, 1), np.float16)},
        {"q": np.zeros((2, 4), np.int8), "scale": np.ones((2, 0), np.float16)},
    ],
)
def test_arrays_that_are_no_embedding(found: dict[str, Any]):
    with pytest.raises(ValueError, match=r"npz: expected q .* found "):
        array_from_bytes(arrays_bytes(found) if found else b"PK\3\4")


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_are_a_value_error_or_an_array(data: st.DataObject):
    whole = bytearray(arrays_bytes(stored(numbers(3, 8), data.draw(st.sampled_from(STORAGES)))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    try:
        assert array_from_bytes(bytes(whole[:cut])).nbytes < 10_000
    except ValueError as error:
        assert "np" in str(error)
