"""Real pipelines of several classes, from a folder and from a hub; and one message for each that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.synthesis import MakerOptions
from microdit.pipeline.sources.synthesis.drawing import Order
from microdit.pipeline.sources.synthesis.makers import Maker, resolve_maker
from tests.model.tiny import write_run
from tests.pipeline.helpers.tiny_pipelines import save_pipeline
from tests.servers.hub import TOKEN, Hub

ORDERS = [Order("a red apple", 1), Order("a blue house", 2), Order("a dog", 3)]
WHERE = "sources.x.makers.0"


def maker(model: Path | str, **options: Any) -> Maker:
    given = {"steps": 2, "size": 32, "dtype": "float32", **options}
    return resolve_maker(WHERE, MakerOptions.model_validate({"model": str(model), **given}))


def draw(made: Maker, orders: list[Order] = ORDERS) -> list[list[Any]]:
    pictures = []
    for picture in made.load().draw(orders):
        assert isinstance(picture, np.ndarray), picture
        assert picture.std() > 5
        pictures.append(picture.tolist())
    return pictures


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux", "z-image"])
def test_a_pipeline_draws_by_its_seeds(kind: str, tmp_path: Path) -> None:
    made = maker(save_pipeline(kind, tmp_path / kind), arguments={})
    drawn = draw(made)
    assert np.shape(drawn) == (3, 32, 32, 3)
    assert draw(made) == drawn
    assert drawn[0] != drawn[1]
    assert draw(made, [Order("a red apple", 4), *ORDERS[1:]])[0] != drawn[0]
    assert made.identity.keys() == {"folder", "sha256"}


@pytest.mark.slow
def test_sana_draws_too(tmp_path: Path) -> None:
    test_a_pipeline_draws_by_its_seeds("sana", tmp_path)


def test_a_pipeline_of_ours_draws_from_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    made = maker(run, guidance=2.0, negative_prompt="gray", arguments={"sampler": "unipc"})
    drawn = draw(made)
    assert np.shape(drawn) == (3, 32, 32, 3) and draw(made) == drawn
    assert made.fields()["model"] == "ema.safetensors" and made.fields()["revision"] == made.identity["sha256"]
    (run / "checkpoints" / "step-00000010").rename(run / "checkpoints" / "step-00000011")
    assert draw(maker(run, guidance=2.0, negative_prompt="gray", arguments={"sampler": "unipc"})) == drawn
    with pytest.raises(RequestError, match=r"makers\.0\.variant = 'fp16': it is for pipelines of diffusers"):
        maker(run, variant="fp16")


def test_from_a_hub_only_the_files_that_are_loaded_come_and_at_one_commit(
    hub: Hub, tiny_sd: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n# A model\n")
    for copy in (
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "all.safetensors",
    ):
        (folder / copy).write_bytes(b"not to be read")
    commit = hub.add("someone/tiny", folder)
    made = maker("someone/tiny")
    assert not [file for file in hub.downloads() if file.endswith(".safetensors")]
    assert made.identity == {"repo": "someone/tiny", "revision": commit}
    assert made.fields()["license"] == "openrail"
    hub.add("someone/tiny", {"model_index.json": b"{}"})  # main has moved
    assert draw(made) == draw(maker(tiny_sd))
    assert not {file for file in hub.downloads() if "fp16" in file or file.endswith((".bin", "all.safetensors"))}


def test_a_gated_model_is_one_message_before_anything_is_loaded(hub: Hub, tiny_sd: Path, monkeypatch: Any) -> None:
    hub.add("black-forest-labs/FLUX.1-dev", tiny_sd, gated=True)
    with pytest.raises(RequestError, match=r"FLUX.1-dev is gated: accept its terms at https://huggingface.co/"):
        maker("black-forest-labs/FLUX.1-dev")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = maker("black-forest-labs/FLUX.1-dev")
    assert made.fields()["commercial_use"] is False
    assert "(non-commercial use only)" in made.licence.describe()


def edited_index(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model_index.json"
        index = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in index.items() if value != "gone"}))

    return edit


def without(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def renamed(name: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename(folder / new) and None


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("edit", "options", "words"),
    [
        (edited_index(_class_name="Flux9Pipeline"), {}, "it is a Flux9Pipeline, which diffusers .* does not have"),
        (edited_index(_class_name=["x", "My"]), {}, "Python code of its own is never run"),
        (edited_index(_class_name="UNet2DModel"), {}, "UNet2DModel, which diffusers .* does not have"),
        (edited_index(_class_name="StableDiffusionImg2ImgPipeline"), {}, r"of prompts alone \(it takes image\)"),
        (edited_index(_class_name="DDPMPipeline"), {}, r"of prompts alone \(it takes no prompt\)"),
        (edited_index(_class_name="WanPipeline"), {}, r"of prompts alone \(it takes num_frames\)"),
        (edited_index(unet=["my_code", "UNet"]), {}, "its part unet is my_code.UNet, code of its own"),
        (edited_index(vae="gone"), {}, "lacks vae, which a StableDiffusionPipeline needs"),
        (without("vae"), {}, "lacks its part vae: there is no folder vae"),
        (without(WEIGHTS), {}, "lacks weights of its part unet in the format safetensors"),
        (renamed(WEIGHTS, "unet/diffusion_pytorch_model.bin"), {}, "in the format safetensors, the only one"),
        (renamed(WEIGHTS, "unet/diffusion_pytorch_model.fp16.safetensors"), {}, "has the variants fp16"),
        (edited_index(), {"variant": "fp16"}, "has no weights of the variant fp16"),
        (edited_index(), {"revision": "main"}, "is a folder, which has no revisions"),
        (without("model_index.json"), {}, "there is no checkpoint; expected the out folder of a training run"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_message(
    edit: Callable[[Path], None], options: dict[str, Any], words: str, tiny_sd: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    edit(folder)
    with pytest.raises(RequestError, match=words) as caught:
        maker(folder, **options)
    assert str(caught.value).startswith(f"{WHERE}.model = {str(folder)!r}: ")


def test_names_fields_and_loras_that_are_wrong_are_one_message(tiny_sd: Path) -> None:
    with pytest.raises(RequestError, match="there is no such folder or file, and it is no repository of the hub"):
        maker("no such folder")
    with pytest.raises(RequestError, match=r"makers\.0\.arguments\.cfg = 3: a StableDiffusionPipeline takes no such"):
        maker(tiny_sd, arguments={"cfg": 3})
    with pytest.raises(RequestError, match=r"makers\.0\.autoencoder = 'sdxl': it is for our own models"):
        maker(tiny_sd, autoencoder="sdxl")
    with pytest.raises(RequestError, match=r"makers\.0\.lora = .*(package peft|has no \*.safetensors)|lora\.0\.file"):
        maker(tiny_sd, lora=[{"model": str(tiny_sd)}])


def test_damaged_weights_are_one_message_of_the_maker(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    (folder / WEIGHTS).write_bytes(b"\x10")
    with pytest.raises(RequestError, match=r"makers\.0\.model = .*: it cannot be loaded: "):
        maker(folder).load()
