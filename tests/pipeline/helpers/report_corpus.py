"""Build the corpus and the run folder that the report page is tested on: something of everything."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.stages.identity import autoencoder_identity
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS

SHARDS, ROWS, SIDE = 2, 16, 96

SAFE = (
    "SELECT s.source, s.shard, s.row FROM samples s WHERE s.status = 'ok' AND (nsfw <= 0.5 AND duplicate_keep) LIMIT 9"
)

HOSTILE = "<script>window.hurt = true</script><img src=x onerror='window.hurt = true'> & \"so on\""
LONG = "averyverylongwordwithoutanyspaceinit" * 12

FAILURES = {
    1: ("http_404", f"HTTP 404 for http://127.0.0.1/{HOSTILE}"),
    5: ("timeout", "no byte within 2 s"),
    9: ("truncated", "image file is truncated"),
    17: ("http_404", "HTTP 404 again"),
    21: ("too_small", "10x10; the short side must have 32 pixels"),
}

BROKEN_LATENT = 12
SAME = [{2, 3, 4, 6, 7, 8, 13}, {20, 22}, {30, 31}]  # numbers with equal hashes
UNSCORED = {10, 11}
HASHES = np.random.default_rng(0).integers(0, 2**63, SHARDS * ROWS).tolist()
KEPT = SHARDS * ROWS - len(FAILURES)


def drawing(number: int) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE + 8 * (number % 3)), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((10 + number, 12, 70, 50 + number), fill=(8 * number, 90, 200 - 6 * number), outline="black", width=3)
    draw.rectangle((30, 40 + number, 80, 90), fill=(240, 7 * number, 60))
    return image


def caption(number: int) -> str:
    return {2: HOSTILE, 3: LONG, 4: ""}.get(number, f"a drawing with the number {number}" + " or so" * (number % 4))


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 4, 4, 4],
        norm_num_groups=2,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path) -> Corpus:
    """Two shards with five failed images, two captions columns, scores, latents that can be decoded or not, text."""
    corpus = Corpus.create(tmp_path_factory.mktemp("data") / "corpus", "tiny & <small>", ROWS)
    corpus.declare_source("made", {"adapter": "made", "attribution": "Drawn by a <test>, CC0"})
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, IMAGE_SCALARS)
    for name in ("source", "long"):
        corpus.declare_column(f"captions/{name}", {"stage": "captions"}, {"caption": "string", "tokens": "int32"})
    basic = {"sharpness": "float32", "phash": "string", "pixels_sha256": "string"}
    corpus.declare_column("scores/basic", {"stage": "scores/basic"}, basic)
    corpus.declare_column("scores/nsfw", {"stage": "scores/nsfw"}, {"nsfw": "float32"})
    latents = {"stage": "latents", "version": 1, "resolution": 64, "revision": None, "posterior": "sample"}
    model = autoencoder_identity("latents/tiny-64", str(autoencoder_folder), None)
    absmax = {"absmax": "float32"}
    corpus.declare_column("latents/tiny-64", latents | {"autoencoder": str(autoencoder_folder), "model": model}, absmax)
    other = latents | {"autoencoder": str(autoencoder_folder), "model": model | {"sha256": "0" * 64}}
    corpus.declare_column("latents/other-64", other, absmax)
    corpus.declare_column("latents/gone-64", latents | {"autoencoder": str(autoencoder_folder / "gone")}, absmax)
    corpus.declare_column("text/minilm@source", {"stage": "text", "encoder": "minilm"}, {"tokens": "int32"})
    corpus.declare_column("text/minilm@later", {"stage": "text", "encoder": "minilm"}, {"tokens": "int32"})
    unit = unit_name("made", 0)
    for number in range(SHARDS):
        write_shard(corpus, ShardRef(source="made", unit=unit, shard=shard_name(unit, number)), number * ROWS)
    commit_unit(corpus, "made", unit, SHARDS * ROWS, [shard_name(unit, number) for number in range(SHARDS)])
    return corpus


def write_shard(corpus: Corpus, ref: ShardRef, first: int) -> None:
    numbers = range(first, first + ROWS)
    with begin_attempt(corpus, "images", ref) as attempt:
        for row, number in enumerate(numbers):
            if number in FAILURES:
                attempt.fail(row, f"k{number}", *FAILURES[number])
                continue
            image, buffer = drawing(number), io.BytesIO()
            image.save(buffer, "jpeg", quality=92)
            sizes = {"width": image.width, "height": image.height}
            sizes |= {f"original_{name}": value for name, value in sizes.items()}
            about = {"caption": caption(number), "license": "CC0" if number % 2 else "", "origin": HOSTILE}
            members = {"jpg": buffer.getvalue(), "json": json.dumps(about).encode()}
            attempt.add(row, f"k{number}", members, **about, **sizes, format="jpeg", bytes=buffer.tell())
        images = attempt.commit()
    rng = np.random.default_rng(first)
    for column in [name for name in corpus.columns() if name not in ("images", "text/minilm@later")]:
        with begin_attempt(corpus, column, ref, [images]) as attempt:
            for row, number in enumerate(numbers):
                words = caption(number) + (" in many more words" if column == "captions/long" else "")
                latent = rng.standard_normal((4, 8, 8)).astype(np.float16)
                if number in FAILURES:
                    attempt.fail(row, f"k{number}", "upstream", "images")
                elif column.startswith("captions/"):
                    attempt.add(row, f"k{number}", caption=words, tokens=len(words.split()))
                elif column == "scores/nsfw":
                    if number in UNSCORED:
                        attempt.fail(row, f"k{number}", "damaged", "no score")
                    else:
                        attempt.add(row, f"k{number}", nsfw=number / 40)
                elif column.startswith("scores/"):
                    same = min(number, *next((group for group in SAME if number in group), [number]), 99)
                    hashes = {"phash": f"{HASHES[same]:016x}", "pixels_sha256": f"{number:064x}"}
                    attempt.add(row, f"k{number}", sharpness=math.sqrt(number), **hashes)
                elif column == "latents/tiny-64" and number == BROKEN_LATENT:
                    attempt.fail(row, f"k{number}", "not_finite", "7 values are no numbers")
                elif column.startswith("latents/"):
                    attempt.add(row, f"k{number}", {"npy": array_bytes(latent)}, absmax=float(abs(latent).max()))
                else:
                    embedding = rng.standard_normal((row + 2, 8)).astype(np.float16)
                    attempt.add(row, f"k{number}", {"npy": array_bytes(embedding)}, tokens=row + 2)
            attempt.commit()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as the trainer leaves it, with a log whose last line was cut by a kill."""
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {
            "step": step, "images": step * 64, "stage": 1 if step <= 40 else 2, "loss": 0.3 + 1 / step,
            "learning_rate": 1e-3, "grad_norm": 0.5, "images_per_second": 512.0, "skipped": 0, "seconds": step / 8,
        }
        for step in range(1, 121)
    ]  # fmt: skip
    lines[7]["loss"] = math.nan
    lines += [
        {"step": step, "images": step * 64, "validation": {"loss": 0.9 - step / 200, "ema_loss": ema}}
        for step, ema in ((0, None), (60, 0.512), (120, 0.4375))
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 121, "ima')
    state = {"recipe": {"stages": [{"latents": "latents/tiny-64", "mask_ratio": m} for m in (0.75, 0.0)]}}
    (folder / "checkpoints/step-00000120").mkdir(parents=True)
    (folder / "checkpoints/step-00000120/state.json").write_text(json.dumps(state))
    Image.effect_noise((400, 200), 90).save(folder / "grid.png")
    (folder / "samples").mkdir()
    for step in (0, 40, 80, 120):
        Image.effect_noise((40, 40 + step), 90).save(folder / f"samples/step-{step:08d}.png")
    (folder / "samples/step-00000120.png").write_bytes(b"half a pic")
    untrained = {"nearest_in_count": 1, "nearest_in_all": 0, "held_out_nearest_in_count": 2, "psnr": 6.31}
    figures = {"nearest_in_count": 58, "nearest_in_all": 41, "held_out_nearest_in_count": None, "psnr": 15.04}
    untrained["metrics"] = {"kid-lite": {"value": 3.512, "error": 0.21}}
    figures["metrics"] = {"kid-lite": {"value": 0.2049, "error": 0.0312}, "fid": {"value": None}}
    about = {"count": 64, "held_out_count": 0, "images": 1462, "num_inference_steps": 18, "guidance_scale": 2.0}
    (folder / "evaluation.json").write_text(json.dumps(about | figures | {"untrained": untrained}))
    return folder
