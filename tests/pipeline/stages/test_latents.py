"""Latents of several autoencoders and resolutions: made together, one by one and again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.crop import square, squares
from microdit.pipeline.content.images import decode, encode
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.report.pictures import pictures
from microdit.pipeline.report.sample_view import open_samples
from microdit.pipeline.stages.rows import image_bytes
from microdit.pipeline.stages.stage import seed_of
from tests.pipeline.helpers.small_latents import (
    FAILED,
    KEYS,
    ROWS,
    arrays,
    columns,
    corpus,
    decoded,
    kl,
    one,
    reasons,
    rows_of,
    run,
    stage_of,
    start,
    two,
)

__all__ = ["corpus", "decoded", "one", "two"]


# -- one decode ------------------------------------------------------------------------------------------------------
def test_all_autoencoders_and_resolutions_share_a_decode_and_one_more_touches_nothing(
    corpus: Corpus, one: str, two: str, decoded: list[int | None]
) -> None:
    asked = columns(one64=(one, 64), one48=(one, 48), two64=(two, 64))
    stage = stage_of(corpus, asked)
    assert stage.models["latents/one64"] is stage.models["latents/one48"] is not stage.models["latents/two64"]
    made = run(stage, corpus)
    assert made.keys() == asked.keys()
    assert len(decoded) == ROWS - len(FAILED)
    before = {name: corpus.store.get(name) for name in corpus.store.names()}

    decoded.clear()
    later = stage_of(corpus, asked | columns(two48=(two, 48), mean=(one, 56, "mode")))
    added = run(later, corpus, ["latents/two48", "latents/mean"])
    assert added.keys() == {"latents/two48", "latents/mean"}
    assert len(decoded) == ROWS - len(FAILED)
    assert {name: corpus.store.get(name) for name in before} == before
    for column, commit in (made | added).items():
        options = (later._options)[column]
        found, model = arrays(corpus, commit), load_autoencoder(options.autoencoder)
        assert list(found) == [key for row, key in enumerate(KEYS) if row not in FAILED]
        for key in (KEYS[0], KEYS[29]):
            pixels = square(decode(image_bytes(rows_of(corpus)[key].members), 10**8).pixels, options.resolution)
            seeds = [seed_of(column, "demo", key)]
            wanted = model.encode(pixels[None].copy(), posterior=options.posterior, seeds=seeds)[0].numpy()
            assert np.abs(found[key] - wanted).max() <= 4e-3 * np.abs(wanted).max()
        lines = {line["key"]: line for line in corpus.sidecar(commit).to_pylist()}
        assert all(lines[key]["absmax"] == np.abs(latent).max() for key, latent in found.items())
        assert commit.timings["encode_seconds"] > 0
        assert {key for key, reason in reasons(corpus, commit).items() if reason} == {KEYS[row] for row in FAILED}


def test_a_column_does_not_depend_on_what_is_made_with_it(tmp_path: Path, one: str, two: str) -> None:
    """Nor on the threads: of these images the resolution of 16 is decoded at a fraction, that of 64 whole."""
    asked = columns(a=(one, 64), b=(one, 16), c=(two, 32, "mode"))
    corpus = start(tmp_path / "together")
    together = run(stage_of(corpus, asked), corpus)
    for column in asked:
        other = start(tmp_path / column.replace("/", "-"))
        alone = run(stage_of(other, {column: asked[column]}, decode_threads=5), other)
        assert alone[column].object.sha256 == together[column].object.sha256
        assert alone[column].fingerprint == together[column].fingerprint


def cut(data: bytes, sides: Iterable[int]) -> dict[int, np.ndarray]:
    out = {side: np.full((side, side, 3), 77, np.uint8) for side in sides}
    squares(data, out, 10**8)
    return out


def jpeg(width: int, height: int) -> bytes:
    noise = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encode(noise, ImageOptions(quality=70))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(8, 420),
    height=st.integers(8, 420),
    sides=st.sets(st.sampled_from([8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 256]), min_size=1, max_size=5),
)
def test_what_is_cut_for_a_side_is_the_same_whatever_the_other_sides(width: int, height: int, sides: set[int]) -> None:
    data = jpeg(width, height)
    together = cut(data, sides)
    for side in sides:
        alone = cut(data, [side])[side]
        assert alone.shape == (side, side, 3) and alone.dtype == np.uint8
        assert np.array_equal(together[side], alone)


def test_fractions_are_decoded_once_and_show_the_same_picture(decoded: list[int | None]) -> None:
    """A smooth picture of odd size, of which the fraction's last row and column are half beyond it."""
    y, x = np.mgrid[0:751, 0:1003]
    pixels = np.stack([127 + 120 * np.sin(x / 61), 127 + 120 * np.cos(y / 47), (x + y) % 256 // 2], 2).astype(np.uint8)
    data = encode(pixels, ImageOptions(quality=95))
    found = cut(data, [64, 60, 56, 512, 448])
    assert len(decoded) == 2  # whole, and a quarter for what is small
    for side, cropped in found.items():
        whole = square(pixels, side).astype(int)
        assert np.abs(cropped - whole)[2:-2, 2:-2].mean() < 2.5
        # moved by as little as a third of a pixel it would be further off
        assert abs((cropped.astype(int) - whole).mean()) < 0.5


# -- posteriors ------------------------------------------------------------------------------------------------------
def test_moments_give_the_mode_and_the_sample(corpus: Corpus, one: str) -> None:
    asked = columns(moments=(one, 64, "moments"), mode=(one, 64, "mode"), sample=(one, 64))
    found = {column: arrays(corpus, commit) for column, commit in run(stage_of(corpus, asked), corpus).items()}
    model = load_autoencoder(one)
    for key, both in found["latents/moments"].items():
        assert both.shape == (8, 8, 8) and both.dtype == np.float16
        mean, deviation = np.split(both.astype(np.float32), 2)
        assert np.array_equal(mean, found["latents/mode"][key])
        assert (deviation >= 0).all() and deviation.max() > 0.01
        noise = model.noise([seed_of("latents/sample", "demo", key)], 64, 64)[0].numpy()
        wanted = found["latents/sample"][key]
        assert np.abs(mean + deviation * noise - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_the_report_shows_the_means_of_moments(corpus: Corpus, one: str) -> None:
    made = run(stage_of(corpus, columns(moments=(one, 64, "moments"), mode=(one, 64, "mode"))), corpus)
    commits = {column: [commit] for column, commit in made.items()} | {"images": corpus.commits("images")}
    with open_samples(corpus, commits, []) as view:
        shown = pictures(view, {column: corpus.column(column) for column in made}, commits, [], ["status = 'ok'"])
    assert shown.problems == [] and len(shown.samples) > 5
    assert shown.psnr["latents/moments"] == shown.psnr["latents/mode"]
    for sample in shown.samples:
        first, second = (view.uri for view in sample.views[1:])
        assert first == second


def test_a_deterministic_autoencoder_has_no_moments(corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    ).save_pretrained(tmp_path / "dc")
    dc = str(tmp_path / "dc")
    with pytest.raises(RequestError, match=r"columns\.latents/x\.posterior = 'moments': .*deterministic.*'mode'"):
        stage_of(start(tmp_path / "other"), columns(x=(dc, 64, "moments")))
    made = run(stage_of(corpus, columns(sample=(dc, 64), mode=(dc, 64, "mode"))), corpus)
    assert made["latents/sample"].object.sha256 == made["latents/mode"].object.sha256


# -- numbers that are none -------------------------------------------------------------------------------------------
def test_images_whose_latents_are_no_numbers_fail_and_those_beside_them_do_not(
    corpus: Corpus, one: str, tmp_path: Path
) -> None:
    """An autoencoder whose means are beyond float16 for some of the images, and one that gives NaN for others."""
    plain = arrays(corpus, run(stage_of(corpus, columns(plain=(one, 64, "mode"))), corpus)["latents/plain"])
    largest = {key: float(np.abs(latent).max()) for key, latent in plain.items()}
    middle = float(np.median(list(largest.values())))
    large = kl(tmp_path / "large", 0, gain=65504 / middle)
    commit = run(stage_of(corpus, columns(large=(large, 64, "mode"))), corpus)["latents/large"]
    failed = {key for key, reason in reasons(corpus, commit).items() if reason == "not_finite"}
    assert {key for key, value in largest.items() if value > 1.02 * middle} <= failed
    assert not failed & {key for key, value in largest.items() if value < 0.98 * middle}
    assert 5 < len(failed) < ROWS - 5
    found = arrays(corpus, commit)
    assert found.keys() == plain.keys() - failed and all(np.isfinite(latent).all() for latent in found.values())
    assert commit.counts == {"in": ROWS, "out": len(found), "failed": len(failed) + len(FAILED)}

    stage = stage_of(corpus, columns(nan=(one, 64, "mode")))
    row, column = 9, "latents/nan"
    spoiled = cut(image_bytes(rows_of(corpus)[KEYS[row]].members), [64])[64]

    def spoil(module: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        wanted = torch.from_numpy(spoiled.copy()).permute(2, 0, 1).float() / 127.5 - 1
        pixels = arguments[0].clone()
        for i, image in enumerate(pixels):
            if (image.float() - wanted).abs().max() < 0.02:
                pixels[i, 0, 5, 5] = torch.nan
        return (pixels,)

    handle = stage.models[column]._module.encoder.register_forward_pre_hook(spoil)
    commit = run(stage, corpus)[column]
    handle.remove()
    assert {key for key, reason in reasons(corpus, commit).items() if reason == "not_finite"} == {KEYS[row]}
    found = arrays(corpus, commit)
    assert found.keys() == plain.keys() - {KEYS[row]}
    assert all(np.array_equal(found[key], plain[key]) for key in found)
