"""Runs from the first step to the last."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from microdit.model.checkpoint import load_model
from microdit.model.edm import EDM
from microdit.model.loading import find_parts
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.trainer.run import Run
from microdit.trainer.start import largest_that_fits
from microdit.trainer.train import train
from tests.trainer.conftest import STAGE, losses, tensors, validations


def test_a_run_learns_logs_and_leaves_what_generation_needs(recipe, tmp_path) -> None:
    stage = STAGE | {"steps": 60, "learning_rate": 3e-3}
    summary = train(recipe(stages=[stage], log_every=10, checkpoint_every=100))
    assert summary["images"] == 960 and summary["steps"] == 60 and summary["skipped"] == 0 and summary["signal"] == 0
    found = losses(tmp_path / "run")
    assert list(found) == [10, 20, 30, 40, 50, 60]
    assert found[60] < 0.97 * found[10]
    folder = Path(summary["checkpoint"])
    net, ema = load_model(folder / "model.safetensors"), load_model(folder / "ema.safetensors")
    assert summary["parameters"] == sum(p.numel() for p in net.parameters())
    assert not torch.equal(net.final_layer.linear.weight, ema.final_layer.linear.weight)
    info = json.loads((folder / "generate.json").read_text())
    assert info["latent_shape"] == [4, 4, 4]
    assert info["latents"] == {"stage": "latents", "autoencoder": "demo", "resolution": 32}
    assert info["text"] == {"stage": "text", "encoder": "tiny"}
    assert info["sigma_min"] == EDM.sigma_min and find_parts(folder).edm == EDM(sigma_data=info["sigma_data"])
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_the_lowest_noise_to_draw_from_comes_with_the_checkpoint_and_may_change(recipe, tmp_path) -> None:
    stage = STAGE | {"steps": 2}
    folder = Path(train(recipe(stages=[stage]))["checkpoint"])
    changed = Path(train(recipe(stages=[stage | {"steps": 4}], sigma_min=1.5))["checkpoint"])  # the run goes on
    assert (find_parts(folder).edm.sigma_min, find_parts(changed).edm.sigma_min) == (0.002, 1.5)


def test_micro_batches_change_nothing_but_rounding(recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 4, "mask_ratio": 0.5}]
    train(recipe(stages=stages, out=str(tmp_path / "a")))
    train(recipe(stages=[stages[0] | {"micro_batch": 6}], out=str(tmp_path / "b")))
    assert list(losses(tmp_path / "b").values()) == pytest.approx(list(losses(tmp_path / "a").values()), rel=1e-5)


def test_auto_is_the_largest_micro_batch_that_fits(recipe, tmp_path) -> None:
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > 12:
            raise torch.OutOfMemoryError("too much")

    assert largest_that_fits(50, attempt) == 7 and tried == [50, 25, 13, 7]
    with pytest.raises(RequestError, match="not even one image"):
        largest_that_fits(2, lambda size: attempt(size + 100))
    summary = train(recipe(stages=[STAGE | {"steps": 2, "micro_batch": "auto"}]))
    assert summary["steps"] == 2


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 3, "mask_ratio": 0.5}]
    text = {"text/tiny@source": 1.0}
    fields = {"stages": stages, "text": text, "text_lengths": [16], "hold_out": 5}
    train(recipe(**fields, out=str(tmp_path / "plain"), validate_every=1))
    torch._dynamo.reset()
    counters.clear()
    train(recipe(**fields | {"hold_out": 0}, out=str(tmp_path / "not-validated"), compile=True))
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    train(recipe(**fields, validate_every=1, compile=True))
    assert counters["stats"]["unique_graphs"] == graphs > 0  # nothing is compiled for the validation
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "run")
    assert list(compiled.values()) == pytest.approx(list(plain.values()), rel=1e-5)
    for step, figures in validations(tmp_path / "run").items():
        assert figures["loss"] == pytest.approx(validations(tmp_path / "plain")[step]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"dim": 30}}, "model: .*dim=30"),
        ({"model": {"dimension": 32}}, "model: .*dimension.*expected arguments of MicroDiT"),
        ({"model": {"preset": "huge"}}, "preset = 'huge': expected one of xl_2, tiny_2"),
        ({"model": {"in_channels": 16}}, "in_channels = 16: the columns say 4"),
        ({"corpus": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"text": {"text/other@source": 1.0}}, "text/other@source"),
        (
            {"stages": [STAGE | {"steps": 1}, STAGE | {"steps": 1, "mask_ratio": 0.9}]},
            r"stages\.1, latents/demo-32: mask_ratio=0\.9 keeps 0 of 4 tokens",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(recipe, fields, message) -> None:
    with pytest.raises(RequestError, match=message):
        train(recipe(**fields))


def test_seeds_of_more_than_32_bits_are_seeds_of_their_own(recipe, tmp_path) -> None:
    seeds = [3, 3 + 2**32, 3 + 2**40, 2**63 - 1]  # of the first three torch on a CPU sees the same 32 bits
    for seed in seeds:
        train(recipe(seed=seed, out=str(tmp_path / str(seed)), stages=[STAGE | {"steps": 1, "learning_rate": 1e-9}]))
    found = [tensors(tmp_path / str(seed), 1)["x_embedder.proj.weight"] for seed in seeds]
    assert all((found[i] - found[j]).abs().max() > 0.1 for i in range(4) for j in range(i))
    assert len({losses(tmp_path / str(seed))[1] for seed in seeds}) == 4


def test_the_log_tells_loss_by_noise_memory_and_time_left(recipe, tmp_path) -> None:
    train(recipe(log_every=4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        found = [value for value in line["loss_by_noise"].values() if value is not None]
        assert len(line["loss_by_noise"]) == 6 and min(found) <= line["loss"] <= max(found)
        assert line["peak_memory_mb"] > 50 and line["mfu"] is None and 0 <= line["data_wait"] <= 1
    assert lines[-1]["seconds_left"] == 0 < lines[0]["seconds_left"]


def test_a_disk_that_is_full_for_a_while_costs_no_line_of_the_log(recipe, tmp_path, monkeypatch, capfd) -> None:
    """The limit on a file's size stands for the disk."""
    limits, log = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run" / "log.jsonl"
    before, original = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), Run.report

    def report(self) -> None:
        full = 3 <= self.progress.step <= 9
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 100 if full else limits[0], limits[1]))
        original(self)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if full and self.progress.step > 3:
            assert list(losses(tmp_path / "run")) == [1, 2]  # no line is torn

    monkeypatch.setattr(Run, "report", report)
    try:
        assert train(recipe())["steps"] == 12
    finally:
        signal.signal(signal.SIGXFSZ, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(losses(tmp_path / "run")) == list(range(1, 13))
    said = capfd.readouterr()
    assert said.out.count("waits in memory until there is room") == 1 and said.out.count("is written again") == 1
    assert "Traceback" not in said.err
    assert tensorboard_steps(tmp_path / "run") == list(range(1, 13))


def tensorboard_steps(out: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return sorted({event.step for event in events.Scalars("loss")})


def test_a_second_run_in_one_folder_is_refused_while_the_first_lives(recipe, tmp_path, at_step, monkeypatch) -> None:
    def second() -> None:
        with pytest.raises(RequestError, match=r"another run works in .*/run \(process .*take another folder"):
            train(recipe())

    at_step(6, second)
    assert train(recipe())["steps"] == 12
    assert list(losses(tmp_path / "run")) == list(range(1, 13))


def test_the_corpus_is_only_read(corpus: Corpus, recipe) -> None:
    def listing() -> list[str]:
        return sorted(item.name for item in corpus.store.list())

    before = listing()
    train(recipe())
    assert listing() == before
