"""Batches that are halved, pictures that fail alone, and numbers that are no pictures."""

import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import prepare
from microdit.pipeline.sources.synthesis.drawing import Drawer, Drawn, NoPicture, Order, to_pixels
from microdit.pipeline.sources.synthesis.pictures import Repeats, check, encode_picture
from tests.pipeline.helpers.drawn_corpus import config_of, draw_all, source_of


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@given(st.integers(1, 20), st.integers(1, 16), st.integers(1, 16))
@settings(print_blob=True)
def test_a_batch_is_halved_until_it_fits_and_that_is_remembered(count: int, size: int, room: int) -> None:
    sizes: list[int] = []

    def call(batch: Sequence[Order]) -> list[Drawn]:
        sizes.append(len(batch))
        if len(batch) > room:
            raise torch.OutOfMemoryError(f"no room for {len(batch)}")
        return [picture(order.seed) for order in batch]

    drawer = Drawer("a model", call, size)
    orders = [Order("x", seed) for seed in range(count)]
    for _ in range(2):
        drawn = drawer.draw(orders)
        assert [one.tolist() for one in drawn if isinstance(one, np.ndarray)] == [
            picture(i).tolist() for i in range(count)
        ]
    assert sum(one > room for one in sizes) <= 5  # 16, 8, 4, 2 ...: not again in the second call


def test_only_the_picture_at_fault_fails_and_a_model_that_cannot_draw_ends_the_build() -> None:
    def call(batch: Sequence[Order]) -> list[Drawn]:
        if any(order.prompt == "bad" for order in batch):
            raise ValueError("this prompt is too much")
        return [picture(order.seed) for order in batch]

    drawer = Drawer("sources.x.makers.0 (m)", call, 4)
    drawn = drawer.draw([Order("good", 1), Order("bad", 2), Order("good", 3), Order("bad", 4), Order("bad", 5)])
    faults = [one.detail if isinstance(one, NoPicture) else "" for one in drawn]
    why = "ValueError: this prompt is too much"
    assert faults == ["", why, "", why, why]
    with pytest.raises(RequestError, match=r"sources\.x\.makers\.0 \(m\): it cannot draw .*too much"):
        Drawer("sources.x.makers.0 (m)", call, 4).draw([Order("bad", 1), Order("bad", 2)])


def test_pictures_of_all_kinds_become_pixels_as_diffusers_makes_them() -> None:
    from diffusers.image_processor import VaeImageProcessor

    values = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    arrays = VaeImageProcessor.pt_to_numpy(values)
    wanted = [np.asarray(one).tolist() for one in VaeImageProcessor.numpy_to_pil(arrays)]
    for images in (values, arrays, list(values), VaeImageProcessor.numpy_to_pil(arrays)):
        assert [one.tolist() for one in to_pixels(images) if isinstance(one, np.ndarray)] == wanted
    values[1, 0, 2, 2] = float("nan")
    assert [isinstance(one, NoPicture) and one.reason for one in to_pixels(values)] == [False, "not_finite", False]
    with pytest.raises(RequestError, match=r"\(2, 4, 4, 4\), which are no pictures"):
        to_pixels(torch.zeros(2, 4, 4, 4))


def test_one_colour_and_repeats_fail() -> None:
    repeats = Repeats()
    black = np.zeros((8, 8, 3), np.uint8)
    almost = black + np.arange(8, dtype=np.uint8)[:, None, None] // 4
    made = [
        check(pixels, row, seed, repeats)
        for pixels, row, seed in [
            (picture(1), 0, 11), (picture(1), 0, 12), (picture(2), 0, 13), (picture(1), 1, 14), (black, 1, 15),
            (almost, 1, 16), (NoPicture("nsfw", ""), 1, 17),
        ]
    ]  # fmt: skip
    reasons = [one.reason if isinstance(one, NoPicture) else "" for one in made]
    assert reasons == ["", "repeated", "", "", "one_colour", "one_colour", "nsfw"]
    assert isinstance(made[1], NoPicture) and "seed 11" in made[1].detail


@pytest.mark.parametrize("format_", ["jpg", "png", "webp"])
@pytest.mark.parametrize("max_side", [None, 24])
def test_ingest_keeps_the_bytes_of_a_drawn_picture(format_: str, max_side: int | None) -> None:
    options = ImageOptions.model_validate({"format": format_, "min_side": 8, "max_side": max_side, "quality": 88})
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    data = encode_picture(pixels, options)
    stored = prepare(data, options)
    assert stored.data == data
    assert (stored.width, stored.height) == ((48, 32) if max_side is None else (36, 24))


def test_no_memory_even_for_one_picture(tiny_sd: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "corpus", [{"model": str(tiny_sd), "size": 8192, "batch": 2}])
    source = source_of(config)
    source.load(0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), limits[1]))
    try:
        with pytest.raises(RequestError, match=r"makers\.0 \(tiny-sd\): the memory is too small for one"):
            draw_all(source)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
