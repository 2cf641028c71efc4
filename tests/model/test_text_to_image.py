"""Prompts to pictures: what a call depends on and what not, saving and loading, the hub, the released names."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from microdit.model import loading
from microdit.model.checkpoint import CheckpointError, write_state_dict
from microdit.model.edm import EDM
from microdit.model.network import PRESETS
from microdit.model.pretrained.autoencoder import AUTOENCODERS, load_autoencoder
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.text import load_text_encoder
from microdit.model.pretrained.text_registry import TEXT_ENCODERS
from microdit.model.text_to_image import MicroDiTPipeline
from tests.model.pretrained.openclip_format import DATA, read_tower, write_model
from tests.model.pretrained.test_autoencoder import flux2, kl
from tests.model.pretrained.text_models import clip_files, gemma_files, t5_files
from tests.model.tiny import INFO, SIZES, network, write_run
from tests.servers.hub import Hub

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ["red apple", "a very long caption about a lighthouse in the fog that goes on", "dog"]
PRESET = {name: size for name, size in SIZES.items() if name not in ("input_size", "caption_channels")}


# of other batch shapes, whose matrix products round otherwise; another prompt or seed moves latents by 1 and more
ROUNDING = 5e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def pipe(run: Path) -> MicroDiTPipeline:
    pipe = MicroDiTPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: MicroDiTPipeline, prompt: Any = "dog", *arguments: Any, **options: Any) -> torch.Tensor:
    return pipe(prompt, *arguments, **({"num_inference_steps": 3, "seed": 0, "output_type": "latent"} | options)).images


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


# -- saving and loading ------------------------------------------------------------------------------------------------
def test_saved_and_loaded(run: Path, pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    for prompt in PROMPTS:
        assert torch.equal(latents(again, prompt, ""), latents(pipe, prompt, ""))
    picture = again("dog", num_inference_steps=2, seed=1).images[0]
    assert np.array_equal(np.asarray(picture), np.asarray(pipe("dog", num_inference_steps=2, seed=1).images[0]))
    assert again.guidance_scale == 2.0 and again.settings["autoencoder"] == "demo"
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "MicroDiTPipeline" and index["vae"] == ["diffusers", "AutoencoderKL"]
    AutoencoderKL.from_pretrained(tmp_path / "saved", subfolder="vae")  # diffusers reads its part
    assert not [path for path in (tmp_path / "saved").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    with pytest.raises(FileExistsError, match="saved is there already: give a new folder"):
        pipe.save_pretrained(tmp_path / "saved")


def test_saved_with_what_is_not_in_the_files(tmp_path: Path) -> None:
    """Latents of another size than the network was built for, sigma_data, and an option of the text encoder."""
    text = load_text_encoder("minilm", max_tokens=5, dtype=torch.bfloat16)
    edm = EDM(sigma_data=0.5)
    pipe = MicroDiTPipeline(network(3), load_autoencoder("demo"), text, edm=edm, sample_size=(4, 8), guidance_scale=3)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert (again.sample_size, again.edm, again.guidance_scale) == ((4, 8), edm, 3)
    assert again.text_encoder.max_tokens == 5
    assert torch.equal(latents(again, PROMPTS[1]), latents(pipe, PROMPTS[1]))


@pytest.mark.parametrize("files", [t5_files, gemma_files, clip_files])
def test_every_family_of_text_encoders_can_be_saved(files: Any, tmp_path: Path) -> None:
    for name, data in files(tmp_path / "made").items():
        (tmp_path / "made" / name).write_bytes(data)
    options: dict[str, Any] = {}
    if files is gemma_files:
        options = {"template": "user\n{caption} model\n", "hidden_layer": 1, "max_tokens": 9}
    text = load_text_encoder(tmp_path / "made", dtype=torch.float32, **options)
    pipe = MicroDiTPipeline(network(0, caption_channels=32), load_autoencoder("demo"), text)
    pipe.save_pretrained(tmp_path / "saved")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "saved").text_encoder
    captions = [*PROMPTS, "", "a café ☕ &amp; a DOG's boat", "<end_of_text> \n fog"]
    for one, other in zip(again.encode(captions), text.encode(captions), strict=True):
        assert torch.equal(one, other)
    assert again._module.dtype == torch.float32 and again.max_tokens == text.max_tokens


def test_an_autoencoder_with_a_batch_norm_keeps_its_digits(tmp_path: Path) -> None:
    flux2().save_pretrained(tmp_path / "made")
    codec = load_autoencoder(tmp_path / "made")
    net = network(0, in_channels=16)
    MicroDiTPipeline(net, codec, load_text_encoder("minilm")).save_pretrained(tmp_path / "saved")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "saved").vae
    assert again.fingerprint["dtype"] == "bfloat16"
    z = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = codec.decode(z)
    assert torch.equal(again.decode(z), pixels)
    assert torch.equal(again.encode(pixels, seeds=[0]), codec.encode(pixels, seeds=[0]))


def test_parts_that_do_not_fit_together(run: Path, tmp_path: Path) -> None:
    kl(latent_channels=16).save_pretrained(tmp_path / "kl16")
    with pytest.raises(
        ValueError, match=r"kl16' has latents of 16 channels, the network takes 4: name the autoencoder"
    ):
        MicroDiTPipeline.from_pretrained(run, autoencoder=str(tmp_path / "kl16"))
    for name, data in t5_files(tmp_path / "t5").items():
        (tmp_path / "t5" / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"t5' is 32 wide, the network takes 384: name the text encoder"):
        MicroDiTPipeline.from_pretrained(run, text_encoder=str(tmp_path / "t5"))


def test_a_pipeline_that_older_code_saved(pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    """Before the package was called microdit, the index named the module of the network otherwise."""
    pipe.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model_index.json"
    index = json.loads(path.read_text())
    assert index["transformer"] == ["microdit.model.network", "MicroDiT"]
    path.write_text(json.dumps(index | {"transformer": ["model.network", "MicroDiT"]}))
    assert torch.equal(latents(MicroDiTPipeline.from_pretrained(tmp_path / "saved")), latents(pipe))


def test_damaged_pipelines(pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    pipe.save_pretrained(saved)
    whole = json.loads((saved / "model_index.json").read_text())
    for index, message in (
        (whole | {"_class_name": "FluxPipeline"}, "it is a FluxPipeline, expected a MicroDiTPipeline"),
        (whole | {"sample_size": 4}, r"model_index\.json is damaged"),
        (whole | {"edm": {"sigma": 1}}, r"model_index\.json is damaged"),
        (whole | {"vae_options": {"name": "demo", "dtype": "load"}}, r"model_index\.json is damaged.*load"),
        ({k: v for k, v in whole.items() if k != "text_encoder_options"}, r"damaged.*text_encoder_options"),
        ([], r"model_index\.json is damaged \(it is no JSON object\)"),
    ):
        (saved / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=message):
            MicroDiTPipeline.from_pretrained(saved)
    (saved / "model_index.json").write_text(json.dumps(whole))
    (saved / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: no such file"):
        MicroDiTPipeline.from_pretrained(saved)


# -- runs and files of weights -----------------------------------------------------------------------------------------
def test_a_run_a_checkpoint_and_a_file(run: Path, tmp_path: Path) -> None:
    older, newer = (run / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    assert loading.checkpoint_folders(run) == [newer, older]
    assert loading.find_parts(run).weights == newer / "ema.safetensors"
    assert loading.find_parts(older).weights == older / "model.safetensors"
    beside = loading.find_parts(newer / "model.safetensors")  # generate.json is beside it
    assert (beside.guidance_scale, beside.sample_size, beside.text_encoder.name) == (2.0, (4, 4), "minilm")
    bare = tmp_path / "net.safetensors"
    bare.write_bytes((older / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="name the autoencoder and the text encoder"):
        loading.find_parts(bare, autoencoder="demo")
    by_file = MicroDiTPipeline.from_pretrained(bare, autoencoder="demo", text_encoder="minilm")
    by_folder = MicroDiTPipeline.from_pretrained(older)
    assert (by_file.guidance_scale, by_folder.guidance_scale) == (5.0, 2.0)
    assert torch.equal(latents(by_file, guidance_scale=3.0), latents(by_folder, guidance_scale=3.0))


def test_a_column_says_how_its_text_was_made(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "checkpoints" / "step-00000010" / "generate.json"
    model = load_text_encoder("minilm", max_tokens=7).fingerprint
    path.write_text(json.dumps(INFO | {"text": {"encoder": "minilm", "revision": None, "model": model}}))
    assert MicroDiTPipeline.from_pretrained(run).text_encoder.max_tokens == 7


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    info = run / "checkpoints" / "step-00000010" / "generate.json"
    info.write_text(json.dumps(INFO | {"latents": {"autoencoder": "demo", "model": {"folder": "demo", "sha256": "f"}}}))
    with pytest.raises(CheckpointError, match=r"was trained with another 'demo'.*sha256.*Name the one to take"):
        MicroDiTPipeline.from_pretrained(run)
    assert MicroDiTPipeline.from_pretrained(run, autoencoder="demo").settings["autoencoder"] == "demo"
    for text in ('{"latent_shape": [4, 4', '{"latent_shape": [4, 4]}', "{}", "7"):
        info.write_text(text)
        with pytest.raises(CheckpointError, match=r"generate\.json is damaged.*take an older checkpoint"):
            loading.find_parts(run)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no weights")
    for name in ("empty", "nothing", "notes.txt", "nothing.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name}: there is no checkpoint; expected .*dit_4_channel_22M"):
            loading.find_parts(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"revision='main' was given with .*run, which is on this machine"):
        loading.find_parts(run, revision="main")


# -- the hub -----------------------------------------------------------------------------------------------------------
def test_a_pipeline_on_the_hub(pipe: MicroDiTPipeline, tmp_path: Path, hub: Hub) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    extra = tmp_path / "saved" / "text_encoder" / "pytorch_model.bin"
    extra.write_bytes(b"a pickle that nobody asked for")
    first = hub.add("owner/small", tmp_path / "saved")
    hub.add("owner/small", {"model_index.json": b"{}"})
    again = MicroDiTPipeline.from_pretrained("owner/small", revision=first[:12])
    assert torch.equal(latents(again), latents(pipe))
    assert again.settings == {
        "checkpoint": "owner/small", "revision": first, "autoencoder": "demo", "text_encoder": "minilm"
    }  # fmt: skip
    assert not [path for path in hub.downloads() if path.endswith(".bin")]
    with pytest.raises(CheckpointError, match="expected a MicroDiTPipeline"):
        MicroDiTPipeline.from_pretrained("owner/small")


def test_weights_on_the_hub(run: Path, hub: Hub) -> None:
    weights = (run / "checkpoints" / "step-00000005" / "model.safetensors").read_bytes()
    commit = hub.add("owner/nets", {"deep/net.safetensors": weights, "deep/other.safetensors": b"-"})
    found = MicroDiTPipeline.from_pretrained(
        "owner/nets/deep/net.safetensors", autoencoder="demo", text_encoder="minilm"
    )
    assert found.settings["revision"] == commit and hub.downloads() == ["deep/net.safetensors"]
    with pytest.raises(CheckpointError, match="name the autoencoder and the text encoder"):
        loading.find_parts("owner/nets/deep/net.safetensors")
    with pytest.raises(CheckpointError, match=rf"owner/nets has no net\.safetensors at {commit}"):
        loading.find_parts("owner/nets/net.safetensors")
    with pytest.raises(CheckpointError, match=r"owner/nets has no model_index\.json"):
        loading.find_parts("owner/nets")
    with pytest.raises(
        ModelFilesError, match=r"no such file or folder here, and on the hub: .*no repository runs/large"
    ):
        loading.find_parts("runs/large")


def test_released_names(hub: Hub) -> None:
    weights = {f"ckpts/{name}": name.encode() for name in loading.RELEASED}
    commit = hub.add(loading.RELEASED_REPO, weights)
    for name, autoencoder in loading.RELEASED.items():
        for asked in (
            name, f"ckpts/{name}", f"VSehwag24/MicroDiT/ckpts/{name}",
            f"{hub.url}/VSehwag24/MicroDiT/blob/main/ckpts/{name}",
            f"{hub.url}/VSehwag24/MicroDiT/resolve/{commit}/ckpts/{name}?download=true",
        ):  # fmt: skip
            parts = loading.find_parts(asked)
            assert parts.weights.read_bytes() == name.encode()
            assert (parts.autoencoder.where, parts.text_encoder.where) == (autoencoder, "dfn-clip-h")
            assert parts.config == {"input_size": 64, "pos_interp_scale": 2.0}
            assert (parts.guidance_scale, parts.edm) == (5.0, EDM(sigma_data=0.9))
            assert parts.origin == {"checkpoint": f"VSehwag24/MicroDiT/ckpts/{name}", "revision": commit}
    with pytest.raises(CheckpointError, match="holds several checkpoints, name one: dit_4_channel_22M"):
        loading.find_parts("VSehwag24/MicroDiT")


@pytest.mark.parametrize(
    ("name", "codec", "channels"),
    [("dit_4_channel_37M_real_and_synthetic_data.pt", "sdxl", 4),
     ("dit_16_channel_37M_real_and_synthetic_data.pt", "ostris", 16)],
)  # fmt: skip
def test_a_released_checkpoint(
    name: str, codec: str, channels: int, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small network under the released name, and small ones of the same classes for its encoders."""
    spec, _ = read_tower(DATA / "openclip")
    write_model(tmp_path / "clip", spec)
    text = TEXT_ENCODERS["dfn-clip-h"]
    hub.add(str(text.where), tmp_path / "clip", commit=text.revision)
    entry = AUTOENCODERS[codec]
    kl(latent_channels=channels).save_pretrained(tmp_path / "made" / (entry.subfolder or ""))
    assert entry.revision
    hub.add(entry.where, tmp_path / "made", commit=entry.revision.ljust(40, "0"))
    # a released file tells its head size by the preset of its width and depth
    monkeypatch.setitem(PRESETS, "small", PRESET)
    sizes: dict[str, Any] = {"in_channels": channels, "caption_channels": 64, "input_size": 64, "pos_interp_scale": 2.0}
    net = network(1, **sizes)
    write_state_dict(tmp_path / "net.pt", net.state_dict())
    hub.add("VSehwag24/MicroDiT", {f"ckpts/{name}": (tmp_path / "net.pt").read_bytes()})

    pipe = MicroDiTPipeline.from_pretrained(f"VSehwag24/MicroDiT/ckpts/{name}")
    assert pipe.sample_size == (64, 64) and pipe.transformer.config == net.config
    assert torch.equal(pipe.transformer.pos_embed, net.pos_embed)
    found = latents(pipe, ["red apple", "a dog"], num_inference_steps=1, batch_size=1)
    assert found.shape == (2, channels, 64, 64) and pipe.guidance_scale == 5.0
    embeddings, _ = load_text_encoder("dfn-clip-h").encode(["red apple"])
    assert embeddings.shape == (1, 77, 64)
    noise = torch.randn(channels, 64, 64, generator=torch.Generator().manual_seed(0))
    wanted = EDM().sample(net, noise[None], embeddings, num_inference_steps=1)  # released: no mask, zeros, guidance 5
    assert torch.equal(found[:1], wanted)
    assert pipe("red apple", height=64, width=64, num_inference_steps=1, seed=0).images[0].size == (64, 64)


def test_a_table_of_another_scale_is_no_released_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", PRESET)
    path = tmp_path / "dit_4_channel_0.5B_synthetic_data.pt"  # here, under a released name
    write_state_dict(path, network(1, input_size=64, pos_interp_scale=1.0).state_dict())
    with pytest.raises(CheckpointError, match=re.escape("pos_interp_scale=1, the model has 2")):
        MicroDiTPipeline.from_pretrained(path, autoencoder="demo", text_encoder="minilm")


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
