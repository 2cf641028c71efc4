"""Images to latents and back, with tiny autoencoders of the classes that the registry names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2
from safetensors.torch import load_file, save_file

from microdit.model.pretrained.autoencoder import AUTOENCODERS, autoencoder_fingerprint, load_autoencoder
from microdit.model.pretrained.hub import ModelFilesError
from tests.servers.hub import TOKEN, Hub

KL: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}

DC: dict[str, Any] = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
    "scaling_factor": 0.41407,
}

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 0.7]


def kl(seed: int = 0, **options: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    module = AutoencoderKL(**{**KL, **options}).eval()
    with torch.no_grad():  # the posterior is to have a width that matters
        module.encoder.conv_out.weight.mul_(20)
    return module


def flux2() -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    module = AutoencoderKLFlux2(**{**KL, "latent_channels": 4, "batch_norm_eps": 0.01}).eval()
    module.bn.running_mean.copy_(torch.randn(16))
    module.bn.running_var.copy_(torch.rand(16) + 0.1)
    return module


def saved(module: Any, folder: Path) -> str:
    module.save_pretrained(folder)
    return str(folder)


def images(batch: int = 3, height: int = 64, width: int = 48) -> torch.Tensor:
    noise = torch.rand(batch, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def raw(module: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The most likely latents, as diffusers gives them."""
    with torch.no_grad():
        encoded = module.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent


def blocks(z: torch.Tensor) -> torch.Tensor:
    """FLUX.2's order of patches: channel, row in the patch, column in the patch."""
    batch, channels, height, width = z.shape
    patches = z.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, 4 * channels, height // 2, width // 2)


def channels(values: Any) -> torch.Tensor:
    return torch.as_tensor(values).view(1, -1, 1, 1)


def shift_scale() -> tuple[Any, Any]:
    return kl(scaling_factor=0.36, shift_factor=0.1), lambda z, _: (z - 0.1) * 0.36


def scale_alone() -> tuple[Any, Any]:
    return kl(scaling_factor=0.13025, latent_channels=16), lambda z, _: z * 0.13025


def mean_std() -> tuple[Any, Any]:
    module = kl(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)
    return module, lambda z, _: (z - channels(MEAN)) * 0.5 / channels(STD)


def batch_norm() -> tuple[Any, Any]:
    return flux2(), lambda z, m: (blocks(z) - channels(m.bn.running_mean)) / channels(m.bn.running_var + 0.01).sqrt()


def deterministic() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return AutoencoderDC(**DC).eval(), lambda z, _: z * 0.41407


@pytest.mark.parametrize(
    ("case", "kind", "depth", "downsample"),
    [
        (shift_scale, "shift_scale", 4, 8),
        (scale_alone, "shift_scale", 16, 8),
        (mean_std, "mean_std", 4, 8),
        (batch_norm, "batch_norm", 16, 16),
        (deterministic, "shift_scale", 8, 4),
    ],
)
def test_latents_are_those_of_diffusers_normalised(case: Any, kind: str, depth: int, downsample: int, tmp_path: Path):
    module, normalise = case()
    model = load_autoencoder(saved(module, tmp_path / "ae"), dtype=torch.float32)
    assert (model.channels, model.downsample, model.normaliser) == (depth, downsample, kind)
    pixels = images()
    wanted = normalise(raw(module, pixels), module)
    latents = model.encode(pixels, posterior="mode")
    assert latents.dtype == torch.float32
    assert latents.shape == (3, depth, 64 // downsample, 48 // downsample)
    assert wanted.std() > 0.01
    assert (latents - wanted).abs().max() < 1e-4 * wanted.abs().max()

    with torch.no_grad():
        decoded = module.decode(raw(module, pixels)).sample
    back = model.decode(latents)
    assert back.dtype == torch.uint8
    assert back.shape == pixels.shape
    difference = back.permute(0, 3, 1, 2).float() - ((decoded + 1) * 127.5).clamp(0, 255)
    assert difference.abs().max() <= 0.51  # rounded, not cut
    assert back.float().std() > 0


def test_a_sample_is_its_own(tmp_path: Path):
    model = load_autoencoder(saved(kl(), tmp_path / "ae"), dtype=torch.float32)
    pixels = images(4)
    together = model.encode(pixels, seeds=[7, 2**63 - 1, 0, 7])
    assert torch.equal(together, model.encode(pixels, seeds=[7, 2**63 - 1, 0, 7]))  # the same bytes, made again
    alone = model.encode(pixels[2:3], seeds=[0])
    assert (alone[0] - together[2]).abs().max() < 1e-5 * together.abs().max()  # whatever is beside it
    moments = model.encode(pixels, posterior="moments")
    mean, std = moments.chunk(2, dim=1)
    assert torch.equal(mean, model.encode(pixels, posterior="mode"))
    noise = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(7))
    for i in (0, 3):
        assert (mean[i] + std[i] * noise - together[i]).abs().max() < 1e-5
    assert (together - mean).abs().mean() > 0.01


def test_moments_of_patches(tmp_path: Path):
    module = flux2()
    model = load_autoencoder(saved(module, tmp_path / "ae"), dtype=torch.float32)
    mean, std = model.encode(images(1), posterior="moments").chunk(2, dim=1)
    noise = blocks(torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(5)))
    assert (mean + std * noise - model.encode(images(1), seeds=[5])).abs().max() < 1e-5


@pytest.mark.parametrize("case", [shift_scale, batch_norm])
def test_noise_may_be_drawn_before(case: Any, tmp_path: Path):
    module, _ = case()
    model = load_autoencoder(saved(module, tmp_path / "ae"), dtype=torch.float32)
    pixels, seeds = images(3), [4, 2**63 - 1, 9]
    noise = model.noise(seeds, 64, 48)
    assert noise.shape == (3, 4, 8, 6) and noise.dtype == torch.float32
    assert torch.equal(noise[1], model.noise(seeds[1:2], 64, 48)[0])
    assert torch.equal(model.encode(pixels, noise=noise), model.encode(pixels, seeds=seeds))
    assert not torch.equal(model.encode(pixels, noise=-noise), model.encode(pixels, seeds=seeds))
    with pytest.raises(ValueError, match="needs one seed for each of the 3 images"):
        model.encode(pixels, noise=noise[:2])


def test_how_many_go_through_the_network_at_once(tmp_path: Path):
    model = load_autoencoder(saved(kl(), tmp_path / "ae"))
    assert [model.together(side, 32) for side in (32, 64, 128, 256, 512, 1024)] == [32, 16, 4, 1, 1, 1]
    assert model.together(64, 3) == 3
    assert model.to("meta").together(1024, 32) == 32  # no CPU


def test_statistics_keep_their_digits_in_bfloat16(tmp_path: Path):
    module = flux2()
    model = load_autoencoder(saved(module, tmp_path / "ae"))
    pixels = images()
    half = module.to(torch.bfloat16)
    with torch.no_grad():
        z = half.encode((pixels.permute(0, 3, 1, 2) / 127.5 - 1).bfloat16()).latent_dist.mode().float()
    exact = flux2()
    wanted = (blocks(z) - channels(exact.bn.running_mean)) / channels(exact.bn.running_var + 0.01).sqrt()
    assert (model.encode(pixels, posterior="mode") - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert model.fingerprint["dtype"] == "bfloat16"
    statistics = model.encode(pixels, posterior="mode").mean(), wanted.mean()
    assert abs(statistics[0] - statistics[1]) < 1e-3


@pytest.mark.parametrize("case", [shift_scale, mean_std, batch_norm, deterministic])
def test_saved_and_opened_it_is_equal(case: Any, tmp_path: Path):
    """In bfloat16, which would change the statistics of a batch norm; diffusers opens it too."""
    module, _ = case()
    model = load_autoencoder(saved(module, tmp_path / "made"))
    model.save_pretrained(tmp_path / "saved")
    again = load_autoencoder(tmp_path / "saved")
    latents = model.encode(images(), posterior="mode")
    assert torch.equal(again.encode(images(), posterior="mode"), latents)
    assert torch.equal(again.decode(latents), model.decode(latents))
    assert again.fingerprint["normaliser"] == model.fingerprint["normaliser"]
    weights = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    for key, value in weights.items():
        statistics = key.startswith("bn.running")
        assert value.dtype == (torch.float32 if statistics else torch.bfloat16) or key == "bn.num_batches_tracked"
        assert not statistics or torch.equal(value, module.state_dict()[key])
    type(module).from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["_name_or_path"] == "made"
    assert model.class_name == again.class_name == type(module).__name__
    with pytest.raises(FileExistsError, match="saved is there already: give a new folder"):
        model.save_pretrained(tmp_path / "saved")


def test_moved_to_another_device(tmp_path: Path):
    model = load_autoencoder(saved(flux2(), tmp_path / "ae"))
    assert model.device == torch.device("cpu")
    assert model.to("meta") is model and model.device == torch.device("meta")
    assert model.encode(images(), posterior="mode").device == torch.device("meta")  # no part was left behind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_on_a_gpu(dtype: torch.dtype, tolerance: float, tmp_path: Path):
    folder, pixels, seeds = saved(flux2(), tmp_path / "ae"), images(), [1, 2, 3]
    cpu = load_autoencoder(folder, dtype=dtype)
    gpu = load_autoencoder(folder, dtype=dtype, device="cuda")
    for posterior in ("sample", "mode", "moments"):
        wanted = cpu.encode(pixels, posterior=posterior, seeds=seeds)
        found = gpu.encode(pixels.pin_memory(), posterior=posterior, seeds=seeds)
        assert found.device.type == "cuda"
        assert (found.cpu() - wanted).abs().max() <= tolerance * wanted.abs().max()
    noise = gpu.noise(seeds, *pixels.shape[1:3]).pin_memory()
    assert torch.equal(gpu.encode(pixels, noise=noise), gpu.encode(pixels, seeds=seeds))


def test_many_images_are_taken_in_parts(tmp_path: Path):
    model = load_autoencoder(saved(kl(), tmp_path / "ae"), dtype=torch.float32)
    pixels = images(5, 160, 192)  # two of them fit together
    latents = model.encode(pixels, seeds=range(5))
    single = torch.cat([model.encode(pixels[i : i + 1], seeds=[i]) for i in range(5)])
    assert (latents - single).abs().max() < 1e-4 * single.abs().max()
    assert (model.decode(latents).int() - model.decode(single).int()).abs().max() <= 1


def test_an_old_config_means_the_default_of_its_class(tmp_path: Path):
    folder = saved(kl(), tmp_path / "ae")
    config = json.loads((tmp_path / "ae" / "config.json").read_text())
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        del config[name]
    for statistics, wanted in (
        ({}, {"kind": "shift_scale", "shift": 0.0, "scale": 0.18215}),
        ({"latents_mean": MEAN, "latents_std": STD}, {"kind": "mean_std", "mean": MEAN, "std": STD, "scale": 0.18215}),
    ):
        (tmp_path / "ae" / "config.json").write_text(json.dumps(config | statistics))
        assert load_autoencoder(folder).fingerprint["normaliser"] == wanted


def test_what_cannot_be_asked(tmp_path: Path):
    folder = saved(kl(), tmp_path / "ae")
    model = load_autoencoder(folder)
    for wrong in (images().float(), images()[0], images()[..., :1]):
        with pytest.raises(ValueError, match=r"images: expected uint8 \(B, H, W, 3\), got"):
            model.encode(wrong, posterior="mode")
    with pytest.raises(ValueError, match=r"images of 60 x 48: .* takes multiples of 8 pixels"):
        model.encode(images(1, 60, 48), posterior="mode")
    with pytest.raises(ValueError, match="needs one seed for each of the 3 images"):
        model.encode(images(3), seeds=[1, 2])
    with pytest.raises(ValueError, match="posterior='mean': expected 'sample', 'mode' or 'moments'"):
        model.encode(images(), posterior="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"latents \(1, 16, 8, 8\): .* takes \(B, 4, h, w\)"):
        model.decode(torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match=r"overflows in float16 \(force_upcast\)"):
        load_autoencoder(folder, dtype=torch.float16)
    unknown = "autoencoder 'sdx1' is neither an existing folder nor a hub repository id.*named ones are demo, sdxl"
    with pytest.raises(ValueError, match=unknown):
        load_autoencoder("sdx1")
    torch.manual_seed(0)
    dc = load_autoencoder(saved(AutoencoderDC(**DC), tmp_path / "dc"))
    with pytest.raises(ValueError, match="is deterministic: it has no moments"):
        dc.encode(images(), posterior="moments")


def test_what_is_no_autoencoder(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"there is no vae/config\.json or config\.json in .*named ones are demo, sdxl"
    ):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="its class is 'UNet2DModel', expected one of AutoencoderKL, AutoencoderDC"):
        load_autoencoder(tmp_path)


def test_a_folder_of_a_pipeline(tmp_path: Path):
    saved(kl(), tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "config.json").write_text("{}")
    model = load_autoencoder(tmp_path / "pipeline")
    assert model.fingerprint["folder"] == "pipeline"
    assert model.fingerprint["subfolder"] == "vae"
    assert model.fingerprint == autoencoder_fingerprint(tmp_path / "pipeline")
    before = model.fingerprint["sha256"]
    saved(kl(seed=1), tmp_path / "pipeline" / "vae")
    assert autoencoder_fingerprint(tmp_path / "pipeline")["sha256"] != before


def test_the_demo_autoencoder_gives_pictures_back():
    model = load_autoencoder("demo")
    assert (model.channels, model.downsample) == (4, 8)
    pixels = torch.full((1, 64, 64, 3), 255, dtype=torch.uint8)
    pixels[0, 12:52, 16:48] = torch.tensor([220, 60, 40], dtype=torch.uint8)
    pixels[0, 24:40, 24:40] = torch.tensor([40, 80, 200], dtype=torch.uint8)
    latents = model.encode(pixels, posterior="mode")
    error = (model.decode(latents).float() - pixels.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 20
    assert model.fingerprint == autoencoder_fingerprint("demo")


# -- from the hub ----------------------------------------------------------------------------------------------------
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def files_of(module: Any, folder: Path, prefix: str = "") -> dict[str, bytes]:
    module.save_pretrained(folder)
    return {prefix + path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "prefix", "depth"),
    [("sdxl", "vae/", 4), ("sdxl-fp16-fix", "", 4), ("ostris", "", 16), ("flux2", "vae/", 16)],
)
def test_named_ones_from_the_hub(name: str, prefix: str, depth: int, hub: Hub, tmp_path: Path):
    """Of all that lies in a repository, one config and one copy of the weights at the pinned commit are fetched."""
    entry = AUTOENCODERS[name]
    module = flux2() if name == "flux2" else kl(latent_channels=depth, scaling_factor=0.2, force_upcast=False)
    files = files_of(module, tmp_path / "module", prefix)
    decoys = {
        f"{prefix}diffusion_pytorch_model.fp16.safetensors": b"half",
        f"{prefix}diffusion_pytorch_model.bin": b"pickle",
        f"{prefix}sdxl_vae.safetensors": b"single file",
        "unet/diffusion_pytorch_model.safetensors": b"unet",
        "unet/config.json": b'{"_class_name": "UNet2DConditionModel"}',
        "model_index.json": b"{}",
    }
    assert entry.revision
    commit = hub.add(entry.where, {**decoys, **files}, commit=entry.revision.ljust(40, "0"))
    # what main becomes afterwards does not matter
    hub.add(entry.where, {**decoys, **files_of(kl(seed=9), tmp_path / "later", prefix)})
    told = autoencoder_fingerprint(name)
    assert hub.downloads() == [f"{prefix}config.json"]
    model = load_autoencoder(name)
    assert hub.downloads() == [f"{prefix}config.json", f"{prefix}diffusion_pytorch_model.safetensors"]
    assert model.fingerprint == told
    assert model.revision == told["revision"] == commit
    assert told["repo"] == entry.where
    assert autoencoder_fingerprint(entry.where) == told
    assert (model.channels, model.name) == (depth, name)
    exact = load_autoencoder(tmp_path / "module")
    assert torch.equal(model.encode(images(), posterior="mode"), exact.encode(images(), posterior="mode"))


def test_a_branch_is_remembered_as_its_commit(hub: Hub, tmp_path: Path):
    first = hub.add("owner/name", files_of(kl(seed=1), tmp_path / "one"))
    old = load_autoencoder("owner/name")
    second = hub.add("owner/name", files_of(kl(seed=2), tmp_path / "two"))
    new = load_autoencoder("owner/name")
    assert (old.revision, new.revision) == (first, second)
    again = load_autoencoder("owner/name", revision=first)
    assert torch.equal(again.encode(images(), posterior="mode"), old.encode(images(), posterior="mode"))
    assert not torch.equal(new.encode(images(), posterior="mode"), old.encode(images(), posterior="mode"))


def test_any_repository(hub: Hub, tmp_path: Path):
    torch.manual_seed(0)
    hub.add("owner/dc", files_of(AutoencoderDC(**DC), tmp_path / "dc"))
    assert load_autoencoder("owner/dc").channels == 8
    hub.add("owner/pipe", files_of(kl(), tmp_path / "kl", "vae/") | {"model_index.json": b"{}"})
    assert load_autoencoder("owner/pipe").fingerprint["subfolder"] == "vae"
    hub.add("owner/odd", files_of(kl(), tmp_path / "odd", "first_stage/"))
    assert load_autoencoder("owner/odd:first_stage").fingerprint["subfolder"] == "first_stage"
    with pytest.raises(ValueError, match=r"there is no vae/config\.json or config\.json in owner/odd"):
        load_autoencoder("owner/odd")


def test_a_gated_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add("owner/gated", files_of(flux2(), tmp_path / "flux2", "vae/"), gated=True)
    for ask in (load_autoencoder, autoencoder_fingerprint):
        with pytest.raises(ModelFilesError, match="owner/gated is gated: accept its terms at") as error:
            ask("owner/gated")
        assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_autoencoder("owner/gated").channels == 16


def test_weights_of_torch_are_read_without_unpickling_code(hub: Hub, tmp_path: Path):
    module = kl()
    module.save_pretrained(tmp_path / "bin", safe_serialization=False)
    hub.add("owner/bin", tmp_path / "bin")
    model = load_autoencoder("owner/bin", dtype=torch.float32)
    assert hub.downloads() == ["config.json", "diffusion_pytorch_model.bin"]
    wanted = raw(module, images()) * module.config.scaling_factor
    assert (model.encode(images(), posterior="mode") - wanted).abs().max() < 1e-4 * wanted.abs().max()

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"encoder.conv_in.weight": Trap()}, tmp_path / "bin" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelFilesError, match=r"diffusion_pytorch_model\.bin is damaged"):
        load_autoencoder(tmp_path / "bin")
    assert not (tmp_path / "sprung").exists()


def test_damaged_and_incomplete_weights(tmp_path: Path):
    """Half a model is refused: diffusers fills what is missing with random numbers, and warns."""
    folder = saved(kl(), tmp_path / "ae")
    weights = tmp_path / "ae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    with pytest.raises(
        ModelFilesError, match=r"ae: diffusion_pytorch_model\.safetensors is damaged .*put a whole copy"
    ):
        load_autoencoder(folder)
    weights.write_bytes(whole)
    config = tmp_path / "ae" / "config.json"
    told = config.read_text()
    for text in (told[:50], "[]"):
        config.write_text(text)
        with pytest.raises(ModelFilesError, match=r"ae: config\.json is damaged .*put a whole copy into .*ae"):
            load_autoencoder(folder)
    config.write_text(told)
    state = load_file(weights)
    del state["encoder.conv_in.weight"]
    save_file(state, weights)
    with pytest.raises(ModelFilesError, match=r"lacks 1 of its model's weights: encoder\.conv_in\.weight"):
        load_autoencoder(folder)
