"""Parameters shared out over processes (FSDP2), beside DDP and one process alone."""

import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from microdit.trainer.processes import SECONDS, Moments, Team
from microdit.trainer.train import train
from tests.trainer.conftest import MODEL, STAGE

STAGES = [
    STAGE | {"steps": 5, "mask_ratio": 0.5, "micro_batch": 3, "ema_half_life": [100, 20]},
    STAGE | {"steps": 4, "micro_batch": 5, "ema_half_life": [100, 20], "clip": 0.01},
]

FIELDS = {
    "model": MODEL | {"num_experts": 3},  # which two processes cannot share evenly
    "stages": STAGES, "checkpoint_every": 3, "checkpoint_keep": 9, "parallel": "fsdp",
}  # fmt: skip

FILES = ("model", "ema", "ema-2", "optimizer")


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


def tensors(out: Path, name: str, step: int = 9) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_near(a: Path, b: Path, step: int = 9) -> None:
    """The same run but for rounding: losses, norms, and all that is in the last checkpoint."""
    assert losses(a) == pytest.approx(losses(b), rel=1e-4)
    assert [line["grad_norm"] for line in lines(a)] == pytest.approx([line["grad_norm"] for line in lines(b)], rel=1e-3)
    for name in FILES:
        found, expected = tensors(a, name, step), tensors(b, name, step)
        assert found.keys() == expected.keys()
        for key in found:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-2, atol=2e-4, msg=f"{name} {key}")


def test_sharded_processes_train_as_one_and_go_on_after_a_kill(recipe, team, tmp_path: Path) -> None:
    train(recipe(out=tmp_path / "one", **FIELDS))
    assert team(recipe(out=tmp_path / "whole", **FIELDS)) == [0, 0]
    assert_near(tmp_path / "whole", tmp_path / "one")
    assert team(recipe(out=tmp_path / "ddp", **FIELDS | {"parallel": "ddp"})) == [0, 0]
    assert_near(tmp_path / "whole", tmp_path / "ddp")

    # killed in the middle of a stage and run again: the same numbers, bit by bit
    killed = recipe(out=tmp_path / "killed", **FIELDS)
    assert team(killed, at=(1, 8, signal.SIGKILL))[1] == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000009").exists()
    assert team(killed) == [0, 0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in FILES:
        a, b = tensors(tmp_path / "killed", name), tensors(tmp_path / "whole", name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("backend", "micro_batch"),
    [("eager", 3), pytest.param("inductor", 4, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_compiled_blocks_train_under_ddp_as_plain_ones(
    recipe, team, tmp_path: Path, backend: str, micro_batch: int
) -> None:
    """Gradients are accumulated before they are exchanged; there is no graph break (`team` asks for that)."""
    stages = [STAGE | {"steps": 4, "mask_ratio": 0.5, "micro_batch": micro_batch, "ema_half_life": [100, 20]}]
    fields = {"stages": stages, "checkpoint_every": 100, "text_lengths": [32]}
    for name in ("plain", "compiled"):
        assert team(recipe(out=tmp_path / name, **fields, compile=name == "compiled"), backend=backend) == [0, 0]
    assert_near(tmp_path / "compiled", tmp_path / "plain", step=4)


@pytest.mark.slow
def test_compiled_in_bf16_they_differ_by_rounding_and_go_on_after_one(recipe, team, tmp_path: Path) -> None:
    stages = [STAGE | {"steps": 5, "mask_ratio": 0.5, "ema_half_life": [100, 20]}]
    fields = FIELDS | {"precision": "bf16", "stages": stages, "text_lengths": [32], "checkpoint_every": 1}
    train(recipe(out=tmp_path / "one", **fields))
    assert team(recipe(out=tmp_path / "two", **fields, compile=True)) == [0, 0]  # without a graph break
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-2)
    assert {value.dtype for value in tensors(tmp_path / "two", "model", 5).values()} == {torch.float32}
    for name, half_life in (("ema", 100), ("ema-2", 20)):
        before, after, weights = (tensors(tmp_path / "two", *which) for which in ((name, 4), (name, 5), ("model", 5)))
        for key in before:
            expected = before[key] + (1 - 0.5 ** (16 / half_life)) * (weights[key] - before[key])
            torch.testing.assert_close(after[key], expected)
    # two go on from what one process wrote; the first one passes over what is damaged, and tells the other
    for step in (4, 5):
        path = tmp_path / "one" / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    assert team(recipe(out=tmp_path / "one", **fields)) == [0, 0]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=2e-2)


def test_they_ask_each_other_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(Team, "largest", lambda self, value: value)
    moments, asked = Moments(Team(0, 2, torch.device("cpu"))), []
    for step in range(1, 400):
        now += 0.1 if step < 200 else 3.0
        if moments.now(step):
            assert moments.now(step)  # as often as one likes
            asked.append((step, now))
    gaps = [b[1] - a[1] for a, b in itertools.pairwise(asked[3:])]
    assert max(gaps[:8]) == pytest.approx(SECONDS) and max(gaps) <= 20 * 3.0
    assert [step for step, _ in asked[-3:]] == [397, 398, 399]
    assert all(Moments(Team(0, 1, torch.device("cpu"))).now(step) for step in range(9))
