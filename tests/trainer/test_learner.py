"""Steps of the learner on each device: the CPU's losses are what a GPU's are held against."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.experts import one_hot_experts
from benchmarks.train_step import make_batch
from microdit.model.layers import Experts
from microdit.model.network import MicroDiT
from microdit.model.sharding import shard_blocks, whole
from microdit.trainer.learner import Learner
from microdit.trainer.processes import Team
from microdit.trainer.recipe import Recipe
from tests.trainer.conftest import MODEL, STAGE

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
CONFIG = MODEL | {"input_size": 4, "in_channels": 4, "patch_size": 2, "caption_channels": 16}
STEPS = 4


def losses(device: str, **fields: Any) -> list[float]:
    """Train a few steps on made-up samples: the loss of each."""
    named: dict[str, Any] = {"name": "learner", "corpus": "none", "out": "none", "text": {"none": 1.0}, "lanes": 8}
    recipe = Recipe.model_validate(named | {"stages": [STAGE | {"steps": 9, "mask_ratio": 0.5}]} | fields)
    learner = Learner(recipe, CONFIG, Team(0, 1, torch.device(device)))
    batch = make_batch(CONFIG, images=8, micro_batch=4, ragged=True)
    return [learner.step(batch, recipe.stages[0], 1e-3).loss.item() for _ in range(STEPS)]


@pytest.fixture
def one_process(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A process group of one: NCCL on a GPU, Gloo on a CPU. Gives the device."""
    device: str = request.param
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03)])
def test_a_device_trains_as_the_cpu(device: str, precision: str, tolerance: float) -> None:
    expected = losses("cpu", precision="fp32")
    assert losses(device, precision=precision) == pytest.approx(expected, rel=tolerance)
    assert expected[-1] != expected[0]


@pytest.mark.gpu
@NO_GPU
def test_compiled_blocks_train_as_plain_ones_on_a_gpu() -> None:
    assert losses("cuda", compile=True) == pytest.approx(losses("cuda"), rel=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_experts_equal_the_one_hot_form(device: str) -> None:
    torch.manual_seed(0)
    layer = Experts(32, 64, multiple_of=1, num_experts=4, capacity=2.0)
    layer.init_weights(out_std=0.02)
    layer.to(device)
    x = torch.randn(3, 40, 32, device=device)
    torch.testing.assert_close(layer(x), one_hot_experts(layer, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("one_process", DEVICES, indirect=True)
def test_one_process_that_shares_out_its_parameters_has_the_same_gradients(one_process: str) -> None:
    torch.manual_seed(0)
    plain = MicroDiT(**CONFIG).to(one_process)
    torch.nn.init.normal_(plain.final_layer.linear.weight, std=0.02)
    shared = MicroDiT(**CONFIG).to(one_process)
    shared.load_state_dict(plain.state_dict())
    shard_blocks(shared, one_process, 1, bf16=False)
    part = make_batch(CONFIG, images=4, micro_batch=4, ragged=True).micro_batches[0].to(torch.device(one_process))
    sigma = part.sigma_normal.exp()
    for net in (plain, shared):
        net(part.latents, sigma, part.text, part.text_mask)["sample"].square().mean().backward()
    for (name, expected), found in zip(plain.named_parameters(), shared.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        if expected.grad is not None and found.grad is not None:
            torch.testing.assert_close(whole(found.grad), expected.grad, rtol=1e-3, atol=1e-6, msg=name)
