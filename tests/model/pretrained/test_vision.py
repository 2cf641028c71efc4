"""Vision models through the loading code, against what transformers gives by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    SiglipModel,
    ViTForImageClassification,
    ViTModel,
)

from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.vision import load_vision_model, vision_fingerprint
from tests.model.pretrained.vision_models import SIDE, aesthetic_model, classifier, clip_model, dino_model, siglip_model
from tests.servers.hub import Hub

CAPTIONS = ["a red apple", "", "a green apple on the old table near the river and the house " * 9]


def picture(seed: int = 0, width: int = 50, height: int = 44) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def pixel_values(
    pixels: np.ndarray, size: int, mean: list[float], std: list[float], crop: int | None = None
) -> torch.Tensor:
    """Bicubic to `size` (the short side if there is a `crop` of its middle), and normalised: Pillow and numpy alone."""
    image = Image.fromarray(pixels)
    if crop is None:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        width, height = image.size
        scale = size / min(width, height)
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    values = (np.asarray(image) / 255 - np.array(mean)) / np.array(std)
    return torch.tensor(values.transpose(2, 0, 1), dtype=torch.float32)[None]


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]


def unit(tensor: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(tensor.float(), dim=-1).numpy()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_that_compares_gives_the_cosines_of_transformers(tmp_path: Path, kind: str) -> None:
    name = (clip_model if kind == "clip" else siglip_model)(tmp_path)
    model = load_vision_model(name, "compare")
    images = [picture(i) for i in range(3)]
    seen = model.see([model.prepare(image) for image in images], 4)
    read = model.read(CAPTIONS, 4)
    if kind == "clip":
        values = torch.cat([pixel_values(image, 16, CLIP_MEAN, CLIP_STD, 16) for image in images])
        module = CLIPModel.from_pretrained(name).eval()
    else:
        values = torch.cat([pixel_values(image, SIDE, HALF, HALF) for image in images])
        module = SiglipModel.from_pretrained(name).eval()
    length = module.config.text_config.max_position_embeddings
    tokens = AutoTokenizer.from_pretrained(name)(
        CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    assert tokens["input_ids"].shape == (3, length)
    output = module(pixel_values=values, **tokens)
    assert np.abs(seen - unit(output.image_embeds)).max() < 5e-3  # float16
    assert np.abs(read - unit(output.text_embeds)).max() < 5e-3
    cosines = (seen * read).sum(1)
    assert (np.abs(cosines) <= 1 + 1e-5).all()
    wanted = (output.logits_per_image - getattr(module, "logit_bias", 0)).diagonal() / module.logit_scale.exp()
    assert cosines == pytest.approx(wanted.numpy(), abs=5e-3)
    assert np.ptp(cosines) > 0.01
    # the numbers of an image are those that it has alone in a batch of this size
    alone = model.see([model.prepare(images[1])], 4)
    assert np.array_equal(alone[0], seen[1])


@torch.inference_mode()
def test_embeddings_are_the_pooled_features(tmp_path: Path) -> None:
    name = dino_model(tmp_path / "dino")
    model = load_vision_model(name, "embed")
    images = [picture(0), picture(1, 90, 44)]
    found = model.see([model.prepare(image) for image in images])
    values = torch.cat(
        [pixel_values(image, 40, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], SIDE) for image in images]
    )
    wanted = unit(Dinov2Model.from_pretrained(name).eval()(pixel_values=values).pooler_output)
    assert found.shape == (2, 32)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert (found * wanted).sum(1).min() > 0.9995  # bfloat16
    assert (found[0] * found[1]).sum() < 0.999


@torch.inference_mode()
def test_a_pooler_that_is_not_in_the_files_is_not_made_up(tmp_path: Path) -> None:
    name = classifier(tmp_path)
    first = load_vision_model(name, "embed")
    second = load_vision_model(name, "embed")
    image = first.prepare(picture())
    found = first.see([image])
    assert np.array_equal(found, second.see([image]))
    module = ViTModel.from_pretrained(name, add_pooling_layer=False).eval()
    wanted = unit(module(pixel_values=pixel_values(picture(), SIDE, HALF, HALF)).last_hidden_state[:, 0])
    assert (found * wanted).sum() > 0.9995


@torch.inference_mode()
def test_a_classifier_gives_the_probability_of_its_label(tmp_path: Path) -> None:
    name = classifier(tmp_path)
    module = ViTForImageClassification.from_pretrained(name).eval()
    values = pixel_values(picture(), SIDE, HALF, HALF)
    wanted = module(pixel_values=values).logits.softmax(-1)[0]
    total = 0.0
    for i, label in enumerate(["normal", "nsfw", "drawing"]):
        model = load_vision_model(name, "classify", label=label)
        [found] = model.see([model.prepare(picture())], 2)
        assert found == pytest.approx(float(wanted[i]), abs=5e-3)
        total += float(found)
    assert total == pytest.approx(1, abs=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["Linear", "ReLU"])
def test_a_clip_tower_with_the_head_of_laion(tmp_path: Path, kind: str) -> None:
    name = aesthetic_model(tmp_path / "head", kind)
    model = load_vision_model(name, "aesthetic")
    images = [picture(i) for i in range(3)]
    found = model.see([model.prepare(image) for image in images], 4)
    config = json.loads((Path(name) / "config.json").read_text()) | {"model_type": "clip_vision_model"}
    tower = CLIPVisionModelWithProjection.from_pretrained(
        name, config=CLIPVisionModelWithProjection.config_class(**config)
    )
    values = torch.cat([pixel_values(image, SIDE, CLIP_MEAN, CLIP_STD, SIDE) for image in images])
    x = torch.nn.functional.normalize(tower.eval()(pixel_values=values).image_embeds, dim=-1)
    weights = load_file(Path(name) / "model.safetensors")
    for number in (0, 2, 4):
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
        if kind == "ReLU" and number < 4:
            x = x.clamp(min=0)
    assert found.shape == (3,)
    assert found == pytest.approx(x[:, 0].numpy(), abs=0.05)
    other = aesthetic_model(tmp_path / "other", "ReLU" if kind == "Linear" else "Linear")
    assert not np.allclose(
        load_vision_model(other, "aesthetic").see([model.prepare(i) for i in images], 4), found, atol=0.1
    )


def test_a_model_of_a_single_label_gives_what_it_gives(tmp_path: Path) -> None:
    name = classifier(tmp_path, {0: "beauty"})
    model = load_vision_model(name, "aesthetic")
    found = model.see([model.prepare(picture(i)) for i in range(2)])
    assert found.shape == (2,)
    assert np.ptp(found) > 0  # no softmax of one


def test_wrong_models_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    name, clip, dino = classifier(tmp_path / "vit"), clip_model(tmp_path / "clip"), dino_model(tmp_path / "dino")
    aesthetic = aesthetic_model(tmp_path / "aesthetic")
    with pytest.raises(ValueError, match="no label 'porn'; its labels are normal, nsfw, drawing"):
        vision_fingerprint(name, "classify", label="porn")
    with pytest.raises(ValueError, match="its labels are"):
        vision_fingerprint(name, "aesthetic")
    with pytest.raises(ValueError, match="leave out label"):
        vision_fingerprint(aesthetic, "aesthetic", label="good")
    with pytest.raises(ValueError, match="'dinov2' has no text tower"):
        vision_fingerprint(dino, "compare")
    with pytest.raises(ValueError, match="nor efficientnet"):
        vision_fingerprint("resnet", "embed")
    (Path(clip) / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no preprocessor_config\.json"):
        vision_fingerprint(clip, "compare")
    (Path(dino) / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"there is no config\.json with a model_type"):
        vision_fingerprint(dino, "embed")


def test_weights_that_are_pickled_damaged_or_not_whole(tmp_path: Path) -> None:
    name = Path(classifier(tmp_path / "vit"))
    weights = load_file(name / "model.safetensors")
    torch.save(weights, name / "pytorch_model.bin")
    whole = (name / "model.safetensors").read_bytes()
    (name / "model.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=r"holds no weights; expected one of model\.safetensors"):
        load_vision_model(name, "classify", label="nsfw")
    (name / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is damaged"):
        load_vision_model(name, "classify", label="nsfw")
    aesthetic = Path(aesthetic_model(tmp_path / "aesthetic"))
    weights = load_file(aesthetic / "model.safetensors")
    for missing, message in (
        ("layers.", r"no layers\.<n>\.weight: the head is missing"),
        ("layers.2.", r"its head does not fit together"),
        ("visual_projection.", "lacks 1 of its model's weights"),
    ):
        rest = {key: value for key, value in weights.items() if not key.startswith(missing)}
        save_file(rest, aesthetic / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelFilesError, match=message):
            load_vision_model(aesthetic, "aesthetic")


def test_a_model_of_the_hub_is_known_by_its_commit(hub: Hub, tmp_path: Path) -> None:
    folder = Path(clip_model(tmp_path / "clip"))
    local = vision_fingerprint(folder, "compare")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    commit = hub.add("owner/clip", folder)
    told = vision_fingerprint("owner/clip", "compare")
    assert told == {"repo": "owner/clip", "revision": commit, "dtype": "float16"}
    assert set(hub.downloads()) == {"config.json", "preprocessor_config.json"}
    model = load_vision_model("owner/clip", "compare", revision=commit)
    assert model.fingerprint == told
    assert "pytorch_model.bin" not in hub.downloads()
    here = load_vision_model(folder, "compare")
    assert here.fingerprint == local
    image = here.prepare(picture())
    assert np.array_equal(model.see([image], 2), here.see([image], 2))
    with pytest.raises(ModelFilesError, match="the hub has no repository owner/none"):
        vision_fingerprint("owner/none", "compare")
