"""Evaluate the demo's run: draw pictures from captions alone, and compare them with the real ones as pixels."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from microdit.model.checkpoint import CheckpointError
from microdit.model.loading import find_checkpoint
from microdit.model.network import MicroDiT
from microdit.model.picture_files import grid
from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.bucket_checkpoint import on_this_machine
from microdit.pipeline.config.images import PILLOW_MAX_PIXELS
from microdit.pipeline.content.crop import square
from microdit.pipeline.content.images import BadImage, decode
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.corpus.shard_cache import ShardId
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.run_samples import RunSamples
from microdit.pipeline.selection.sample_index import SampleIndex, read_captions
from microdit.pipeline.stages.rows import image_bytes
from microdit.trainer.data.randomness import weights_seed
from microdit.trainer.data.samples import open_samples
from microdit.trainer.recipe import Recipe

SEED = 1  # of the noise, and with the recipe's seed of the captions drawn


def evaluate(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    corpus: str | None = None,
    count: int = 64,
    num_inference_steps: int = 18,
    guidance_scale: float | None = None,
) -> dict[str, Any]:
    """Make pictures of captions, trained on and held out, and find the real image that each is nearest to.

    The captions are `count` drawn by the recipe's seed, the real images those of the corpus, resized and cropped as the
    autoencoder saw them; nearest is by the mean squared error of pixels. Writes `evaluation.json` and `grid.png` (real
    beside generated) into `out`, by default the run's folder, and returns what is in the former:

        count                       captions of each kind (fewer, if there are fewer)
        images                      real images in all
        nearest_in_count            trained on: how many are nearest to their own image, among the images of the count
        nearest_in_all              the same among all images
        held_out_nearest_in_count   held out of training: as the first, among those held out (null if there are none)
        psnr, held_out_psnr         decibels, mean over the pictures, each against its own image
        untrained                   the same figures of the network before its first step

    Raises:
        RequestError: the corpus no longer gives the samples that the run was trained on.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder, recipe, samples = _open_run(checkpoint, corpus)
    index = samples.legs[-1]
    pipe = MicroDiTPipeline.from_pretrained(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    kinds = {"trained": index, "held_out": samples.held}
    drawn = {kind: some.take(some.lowest(count, recipe.seed + 1)) for kind, some in kinds.items() if len(some)}
    side = samples.corpus.column(recipe.stages[-1].latents).made_by["resolution"]
    real = {kind: read_images(samples.corpus, some, side) for kind, some in drawn.items()}
    everything = read_images(samples.corpus, index, side) | read_images(samples.corpus, samples.held, side)
    captions = {kind: read_captions(samples.corpus, recipe.main_text, some) for kind, some in drawn.items()}

    torch.manual_seed(weights_seed(recipe.seed))
    untrained = MicroDiT(**pipe.transformer.config).eval().to(pipe.device)
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    results: list[dict[str, Any]] = []
    for net in (untrained, pipe.transformer):
        pipe.transformer = net
        pictures = {kind: _generate(pipe, texts, options) for kind, texts in captions.items()}
        results.append(compare(pictures, real, everything))
    figures = {
        "checkpoint": folder.name,
        "count": len(drawn["trained"]),
        "held_out_count": len(drawn.get("held_out", ())),
        "images": len(everything),
        **results[1],
        "untrained": results[0],
        "captions": "captions/" + recipe.main_text.partition("@")[2],
        "num_inference_steps": num_inference_steps,
        "guidance_scale": pipe.guidance_scale if guidance_scale is None else guidance_scale,
    }
    run = folder.parent.parent if folder.parent.name == "checkpoints" else recipe.out
    _write(run if out is None else Path(out), figures, real["trained"], pictures["trained"], captions["trained"])
    return figures


def _open_run(checkpoint: str | Path, corpus: str | None) -> tuple[Path, Recipe, RunSamples]:
    """Find the checkpoint's folder, its recipe and the samples that it was trained on."""
    folder = find_checkpoint(on_this_machine(checkpoint))
    try:
        state = json.loads((folder / "state.json").read_text())
        recipe = Recipe.model_validate(state["recipe"] | ({"corpus": corpus} if corpus else {}))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: state.json is no trainer's ({error})") from error
    samples = open_samples(recipe)
    if state["data"][-1]["digest"] != samples.legs[-1].digest:
        raise RequestError(
            f"{folder} was trained on other samples than corpus {recipe.corpus} gives now: evaluate it on that corpus, "
            "with the selection named by its hash"
        )
    return folder, recipe, samples


def _generate(pipe: MicroDiTPipeline, captions: list[str], options: Mapping[str, Any]) -> np.ndarray:
    """Make one picture of each caption, uint8 (n, H, W, 3)."""
    return np.stack([np.asarray(picture) for picture in pipe(captions, seed=SEED, **options).images])


def _write(
    folder: Path,
    figures: Mapping[str, Any],
    real: Mapping[str, np.ndarray],
    pictures: np.ndarray,
    captions: list[str],
) -> None:
    """Write evaluation.json, and grid.png with real and generated pictures side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")
    cells = [[Image.fromarray(a), Image.fromarray(b)] for a, b in zip(real.values(), pictures, strict=True)]
    grid(cells, captions).save(folder / "grid.png")


def compare(
    pictures: Mapping[str, np.ndarray],
    real: Mapping[str, Mapping[str, np.ndarray]],
    everything: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Compute the figures of `evaluate` from pictures (n, H, W, 3) and real images by name, in the same order."""
    own = {kind: distances(pictures[kind], list(images.values())) for kind, images in real.items()}
    names = list(everything)
    in_all = distances(pictures["trained"], list(everything.values())).argmin(axis=1)
    return {
        "nearest_in_count": nearest_to_own(own["trained"]),
        "nearest_in_all": sum(names[i] == name for i, name in zip(in_all, real["trained"], strict=True)),
        "held_out_nearest_in_count": nearest_to_own(own["held_out"]) if "held_out" in own else None,
        "psnr": mean_psnr(own["trained"]),
        "held_out_psnr": mean_psnr(own["held_out"]) if "held_out" in own else None,
    }


def distances(pictures: np.ndarray, images: list[np.ndarray]) -> np.ndarray:
    """Compute the mean squared error of every picture to every image, (n, m) float64; both uint8 (H, W, 3)."""
    a = pictures.reshape(len(pictures), -1).astype(np.float64)
    b = np.array(images, dtype=np.float64).reshape(len(images), -1)
    squares = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)  # of integers: exact
    return squares / a.shape[1]


def nearest_to_own(errors: np.ndarray) -> int:
    """Count the rows of a square matrix that are smallest on the diagonal."""
    return int((errors.argmin(axis=1) == np.arange(len(errors))).sum())


def mean_psnr(errors: np.ndarray) -> float:
    """Average over the diagonal 10 log10(255^2 / error); an error counts as a hundredth at least."""
    own = np.maximum(np.diagonal(errors), 0.01)
    return round(float(np.mean(10 * np.log10(255**2 / own))), 2)


def read_images(corpus: Corpus, index: SampleIndex, side: int) -> dict[str, np.ndarray]:
    """Read the images of samples, uint8 (side, side, 3), by sample name in the index' order.

    Raises:
        RequestError: a sample has no picture.
    """

    def read(shard: ShardId, rows: list[int]) -> Iterator[tuple[str, np.ndarray]]:
        wanted = set(rows)
        for line in read_rows(corpus, commits[shard]):
            if line.row in wanted:
                name = f"{shard[0]}/{shard[1]}/{line.row}"
                try:
                    data = image_bytes(line.members)
                except BadImage as error:
                    raise RequestError(f"sample {name} cannot be compared with: {error}") from error
                yield name, square(decode(data, PILLOW_MAX_PIXELS, shrink_to=side).pixels, side)

    commits = newest_commits(corpus, ["images"])["images"]
    rows = index.by_shard()
    with ThreadPoolExecutor(2) as pool:
        return dict(pair for pairs in pool.map(lambda item: list(read(*item)), rows.items()) for pair in pairs)
