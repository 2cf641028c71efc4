"""mmdet's Mask2Former converted to transformers', against mmdet's layout in plain torch; mmdet's post-processing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.mask2former import load_detector, network_of, objects_of, prepared
from tests.model.pretrained.mmdet_mask2former import Detector


@pytest.fixture(scope="module")
def original() -> Detector:
    torch.manual_seed(5)
    detector = Detector().eval()
    with torch.no_grad():
        for name, value in detector.named_parameters():
            if "norm" in name or ".gn." in name:
                value += 0.2 * torch.randn(value.shape)
            elif "sampling_offsets" in name:
                value += 0.5 * torch.randn(value.shape)
    return detector


@pytest.mark.parametrize("size", [(256, 256), (224, 320)])
@torch.inference_mode()
def test_the_converted_network_gives_what_the_original_gives(original: Detector, size: tuple[int, int]) -> None:
    network = network_of(original.state_dict(), heads=(1, 2, 4, 8))
    pixels = torch.randn(1, 3, *size)
    classes, masks = original(pixels)
    found = network(pixel_values=pixels)
    assert (found.class_queries_logits[0] - classes).abs().max() < 1e-4
    assert (found.masks_queries_logits[0] - masks).abs().max() < 1e-4 * masks.abs().max()


@torch.inference_mode()
def test_the_order_of_the_neighbours_matters(original: Detector) -> None:
    """As the comparison would pass without the reordering otherwise."""
    weights = original.state_dict()
    name = "backbone.stages.0.downsample.reduction.weight"
    channels = weights[name].shape[1] // 4
    shuffled = weights[name].reshape(-1, channels, 4)[..., [0, 2, 1, 3]].reshape(weights[name].shape)
    pixels = torch.randn(1, 3, 128, 128)
    first, second = (
        network_of(each, heads=(1, 2, 4, 8))(pixel_values=pixels).class_queries_logits
        for each in (weights, {**weights, name: shuffled})
    )
    assert (first - second).abs().max() > 1e-2


def test_an_unknown_or_a_missing_weight_is_refused(original: Detector) -> None:
    weights = original.state_dict()
    with pytest.raises(ModelFilesError, match=r"the weight 'backbone\.extra' is not known"):
        network_of({**weights, "backbone.extra": torch.zeros(1)})
    del weights["panoptic_head.mask_embed.2.bias"]
    with pytest.raises(ModelFilesError, match=r"it lacks 1 weights, the first model\.transformer_module\.decoder"):
        network_of(weights, heads=(1, 2, 4, 8))


def test_a_picture_is_scaled_to_800_pixels_and_padded(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    batch, size = prepared(pixels)
    assert size == (800, 800) and batch.shape == (1, 3, 800, 800)
    wide, size = prepared(pixels[:200])
    assert size == (521, 1333) and wide.shape == (1, 3, 544, 1344)
    assert (wide[..., 521:, :] == 0).all() and (wide[..., 1333:] == 0).all()
    flat, _ = prepared(np.full((800, 800, 3), 200, np.uint8))
    assert flat[0, :, 0, 0].numpy() == pytest.approx(
        [(200 - 123.675) / 58.395, (200 - 116.28) / 57.12, (200 - 103.53) / 57.375]
    )


def test_objects_are_queries_and_classes_by_mmdets_rules() -> None:
    random = torch.Generator().manual_seed(3)
    classes, masks = torch.randn(6, 4, generator=random), torch.randn(6, 9, 11, generator=random)
    masks[2] = -1  # an empty mask
    found = list(objects_of(classes, masks))
    assert len(found) == 18  # all, as they are fewer than 100
    probabilities = functional.softmax(classes, -1)[:, :3]
    order = sorted(((float(probabilities[q, c]), q, c) for q in range(6) for c in range(3)), reverse=True)
    for each, (score, query, label) in zip(found, order, strict=True):
        inside = masks[query][masks[query] > 0].sigmoid()
        expected = score * float(inside.sum()) / (len(inside) + 1e-6)
        assert each.label == label and each.score == pytest.approx(expected, abs=1e-6)
        assert np.array_equal(each.mask, (masks[query] > 0).numpy())
        if query == 2:
            assert each.box == (0, 0, 0, 0) and each.score == 0
        else:
            rows, columns = np.nonzero(each.mask)
            assert each.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "detector.pth")
    with pytest.raises(ModelFilesError, match=r"its SHA-256 begins with [0-9a-f]{8}; expected 743b7d99"):
        load_detector(tmp_path / "detector.pth")
