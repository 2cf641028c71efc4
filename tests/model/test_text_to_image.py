"""Prompts to pictures: what a call depends on and what not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.model.edm import EDM
from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.model.pretrained.text import load_text_encoder
from microdit.model.text_to_image import MicroDiTPipeline
from tests.model.tiny import PROMPTS, ROUNDING, SIZES, latents

ROOT = Path(__file__).parent.parent.parent


def test_a_call_is_text_encoder_sampler_and_autoencoder(pipe: MicroDiTPipeline) -> None:
    text, lengths = load_text_encoder("minilm").encode(["red apple"])
    noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(7))
    wanted = EDM().sample(
        pipe.transformer, noise[None], text[:, : lengths[0]], num_inference_steps=3, guidance_scale=2.0
    )
    assert torch.equal(latents(pipe, "red apple", seed=7), wanted)
    pixels = load_autoencoder("demo").decode(wanted)[0].numpy()
    options: Any = {"num_inference_steps": 3, "seed": 7}
    picture = pipe("red apple", **options).images[0]
    assert isinstance(picture, Image.Image) and np.array_equal(np.asarray(picture), pixels)
    array = pipe("red apple", output_type="np", **options).images
    assert array.dtype == np.float32 and np.array_equal(array, pixels[None].astype(np.float32) / 255)
    tensor = pipe("red apple", output_type="pt", **options).images
    assert tensor.shape == (1, 3, 32, 32) and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_the_split_into_batches_does_not_matter(pipe: MicroDiTPipeline) -> None:
    whole = latents(pipe, PROMPTS, num_images_per_prompt=2)
    assert whole.shape == (6, 4, 4, 4)
    for size in (1, 2, 4):
        assert (latents(pipe, PROMPTS, num_images_per_prompt=2, batch_size=size) - whole).abs().max() < ROUNDING
    shared = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    parts = [latents(pipe, PROMPTS, seed=None, generator=g, batch_size=n) for g, n in zip(shared, (2, 3), strict=True)]
    assert (parts[0] - parts[1]).abs().max() < ROUNDING


def test_each_picture_has_its_seed(pipe: MicroDiTPipeline) -> None:
    options: Any = {"batch_size": 1}  # so that equal is equal to the last bit
    several = latents(pipe, ["dog", "red apple"], num_images_per_prompt=2, seed=5, **options)
    alone = [latents(pipe, p, seed=s, **options)[0] for p, s in (("dog", 5), ("dog", 6), ("red apple", 7))]
    assert all(torch.equal(a, b) for a, b in zip(several, alone, strict=False))
    chosen = latents(pipe, ["dog", "dog", "red apple"], seed=[6, 5, 7], **options)
    assert torch.equal(chosen, torch.stack([alone[1], alone[0], alone[2]]))
    generators = [torch.Generator().manual_seed(seed) for seed in (6, 5, 7)]
    assert torch.equal(latents(pipe, ["dog", "dog", "red apple"], seed=None, generator=generators, **options), chosen)
    one = latents(pipe, ["dog", "dog"], seed=None, generator=torch.Generator().manual_seed(6), **options)
    assert torch.equal(one[0], alone[1]) and not torch.equal(one[0], one[1])
    assert torch.equal(one[:1], latents(pipe, seed=None, generator=torch.Generator().manual_seed(6), **options))


def test_seed_zero_is_a_seed(pipe: MicroDiTPipeline) -> None:
    torch.manual_seed(1)
    first = latents(pipe, seed=0)
    state = torch.get_rng_state()
    assert torch.equal(first, latents(pipe, seed=0)) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, latents(pipe, seed=[0]))
    assert torch.equal(first, latents(pipe, seed=None, generator=torch.Generator().manual_seed(0)))
    free = [latents(pipe, seed=None) for _ in range(2)]  # torch's global generator
    torch.manual_seed(1)
    assert torch.equal(free[0], latents(pipe, seed=None)) and not torch.equal(free[0], free[1])


def test_everything_told_matters(pipe: MicroDiTPipeline) -> None:
    assert torch.equal(latents(pipe), latents(pipe))
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "red apple"},
        {"seed": 1},
        {"guidance_scale": 4.0},
        {"guidance_scale": 1.0},
        {"sampler": "unipc"},
        {"sampler": "dpmpp_2m"},
        {"num_inference_steps": 4},
        {"guidance_interval": (0.0, 1.0)},
        {"negative_prompt": ""},
        {"negative_prompt": "red apple"},
    ]
    made = [latents(pipe, **change) for change in changes]
    assert all(not torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])


def test_negative_prompts(pipe: MicroDiTPipeline) -> None:
    def one(prompt: str, negative: str | None, **options: Any) -> torch.Tensor:
        return latents(pipe, prompt, negative, **options)[0]

    long = PROMPTS[1]
    pairs = [("dog", long), (long, "dog"), ("red apple", "")]  # shorter and longer than the prompt
    together = latents(pipe, [p for p, _ in pairs], [n for _, n in pairs], seed=[0, 0, 0])
    for found, (prompt, negative) in zip(together, pairs, strict=True):
        assert (found - one(prompt, negative)).abs().max() < ROUNDING
    shared = latents(pipe, ["dog", "red apple"], long, seed=[0, 0])
    assert (shared[0] - one("dog", long)).abs().max() < ROUNDING
    # steering away from the prompt itself is no steering, None is what it is without a negative prompt
    assert (one("dog", "dog") - one("dog", None, guidance_scale=1.0)).abs().max() < ROUNDING
    mixed = latents(pipe, ["dog", "red apple"], ["red apple", None], seed=[0, 0])
    assert (mixed[1] - one("red apple", None)).abs().max() < ROUNDING
    assert torch.equal(one("dog", "red apple", guidance_scale=1.0), one("dog", None, guidance_scale=1.0))


def test_guidance_interval(pipe: MicroDiTPipeline) -> None:
    assert torch.equal(latents(pipe, guidance_interval=(0.0, 80.0)), latents(pipe))
    unguided = latents(pipe, guidance_interval=(80.0, 90.0))
    assert torch.equal(unguided, latents(pipe, guidance_scale=1.0))


def test_height_and_width(pipe: MicroDiTPipeline) -> None:
    wide = pipe("dog", height=32, width=80, num_inference_steps=2, seed=0).images[0]
    assert wide.size == (80, 32)
    assert latents(pipe, height=48).shape == (1, 4, 6, 4)
    for name in ("height", "width"):
        for side in (40, 0):
            with pytest.raises(ValueError, match=rf"{name}={side}: expected a multiple of 16 pixels"):
                latents(pipe, **{name: side})


def test_a_gpu_with_little_memory_takes_fewer_at_once(pipe: MicroDiTPipeline, capsys: pytest.CaptureFixture) -> None:
    wanted, sizes = latents(pipe, ["dog"] * 7, batch_size=7), []

    def full(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 6 and len(sizes) == 3:  # in the second step
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = pipe.transformer.register_forward_pre_hook(full)
    pipe.set_progress_bar_config(mininterval=0)
    try:
        found = latents(pipe, ["dog"] * 7, batch_size=7)
        assert (found - wanted).abs().max() < ROUNDING
        assert sizes == [14] * 3 + [6] * 10 + [2] * 5  # prompts and negative ones, 5 calls for 3 steps
        assert "21/21" in capsys.readouterr().err
    finally:
        hook.remove()
        pipe.set_progress_bar_config(disable=True)


def test_pictures_one_by_one(pipe: MicroDiTPipeline) -> None:
    found: list[tuple[int, Any]] = []
    output = pipe(
        PROMPTS, num_inference_steps=2, seed=0, batch_size=2, on_image=lambda number, one: found.append((number, one))
    )
    assert output.images == [] and [number for number, _ in found] == [0, 1, 2]
    wanted = pipe(PROMPTS, num_inference_steps=2, seed=0, batch_size=2).images
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for (_, a), b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, r"prompt=\[\]: expected a string, or several"),
        ({"prompt": [3]}, r"prompt=\[3\]: expected a string"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt has 3 texts for 1 prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected at least 1"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0: expected 0 or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: expected 0 or more"),
        ({"guidance_interval": (2.0, 1.0)}, r"guidance_interval=\(2.0, 1.0\): expected noise levels \(low, high\)"),
        ({"sampler": "euler"}, "sampler='euler': expected one of heun, dpmpp_2m, unipc"),
        ({"output_type": "jpg"}, "output_type='jpg': expected one of pil, np, pt, latent"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"seed": -1}, r"seed=-1: expected 0 to 2\^64 - 1"),
        ({"generator": torch.Generator()}, "seed and generator were both given"),
        ({"seed": None, "generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
    ],
)
def test_what_cannot_be_is_named(pipe: MicroDiTPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latents(pipe, **options)


def test_dtype_and_device(run: Path) -> None:
    pipe = MicroDiTPipeline.from_pretrained(run, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.dtype, pipe.device) == (torch.bfloat16, torch.device("cpu"))
    half = latents(pipe)
    assert half.dtype == torch.float32
    assert pipe.to(torch.float32) is pipe and pipe.dtype == torch.float32
    assert not torch.equal(latents(pipe), half)
    assert pipe.to("meta").device.type == "meta"
    modules = (pipe.transformer, pipe.vae._module, pipe.text_encoder._module)
    assert {p.device.type for module in modules for p in module.parameters()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(run: Path, pipe: MicroDiTPipeline) -> None:
    gpu = MicroDiTPipeline.from_pretrained(run).to("cuda")
    gpu.set_progress_bar_config(disable=True)
    assert (latents(gpu, PROMPTS) - latents(pipe, PROMPTS)).abs().max() < 0.1
    drawn = latents(gpu, seed=None, generator=torch.Generator("cuda").manual_seed(0))
    assert drawn.device.type == "cpu" and drawn.isfinite().all()
    assert gpu("dog", num_inference_steps=2, seed=0).images[0].size == (32, 32)


def test_runs_without_ray_obstore_and_duckdb() -> None:
    """Every module of model/, and a picture from a prompt, with nothing of the pipeline importable."""
    program = f"""
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "obstore", "duckdb", "pyarrow", "pydantic", "typer", "pipeline", "trainer"):
            raise ModuleNotFoundError(f"blocked: {{name}}")
sys.meta_path.insert(0, Block())
from microdit import model
for module in pkgutil.walk_packages(model.__path__, "microdit.model."):
    importlib.import_module(module.name)
from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.model.network import MicroDiT
from microdit.model.text_to_image import MicroDiTPipeline
from microdit.model.pretrained.text import load_text_encoder
pipe = MicroDiTPipeline(MicroDiT(**{SIZES!r}), load_autoencoder("demo"), load_text_encoder("minilm"))
print(pipe("red apple", num_inference_steps=2, seed=0).images[0].size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "(32, 32)"), done.stderr
