"""`microdit generate`, from the command to the files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from microdit.model.checkpoint import write_state_dict
from microdit.model.network import PRESETS
from microdit.model.pretrained.autoencoder import AUTOENCODERS
from microdit.model.pretrained.text_registry import TEXT_ENCODERS
from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.cli.app import app
from tests.model.pretrained.openclip_format import DATA, read_tower, write_model
from tests.model.pretrained.test_autoencoder import kl
from tests.model.tiny import SIZES, network, write_run
from tests.servers.hub import Hub, hub

__all__ = ["hub"]
RELEASED = "VSehwag24/MicroDiT/ckpts/dit_4_channel_37M_real_and_synthetic_data.pt"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


def generate(checkpoint: Any, *arguments: Any) -> Result:
    return CliRunner().invoke(app, ["generate", "--checkpoint", str(checkpoint), *map(str, arguments)])


def parameters(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["parameters"])


def test_prompts_in_files_out(run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\ufeffa snail\r\n\n  une pomme à côté  \n", encoding="utf-8")
    settings = ("--steps", 2, "--sampler", "unipc", "--guidance-scale", 3, "--guidance-interval", 0.1, 20)
    more = ("--negative-prompt", "dog", "--height", 48, "--width", 32, "--device", "cpu", "--images-per-prompt", 2)
    result = generate(run, "--prompt", "red apple", "--prompts", prompts, "--out", out, "--seed", 0, *settings, *more)
    assert (result.exit_code, result.stdout) == (0, f"6 pictures in {out}\n"), result.output
    assert "12/12" in result.stderr  # the bar: 6 pictures of 2 steps
    paths = sorted(out.glob("0*.png"))
    assert [path.name for path in paths] == [
        "00000-red-apple.png", "00001-red-apple.png", "00002-a-snail.png", "00003-a-snail.png",
        "00004-une-pomme-c-t.png", "00005-une-pomme-c-t.png",
    ]  # fmt: skip
    assert [parameters(path)["prompt"] for path in paths[::2]] == ["red apple", "a snail", "une pomme à côté"]
    assert [parameters(path)["seed"] for path in paths] == list(range(6))
    fields = parameters(paths[3])
    wanted = {
        "negative_prompt": "dog", "num_inference_steps": 2, "sampler": "unipc", "guidance_scale": 3.0,
        "guidance_interval": [0.1, 20.0], "height": 48, "width": 32, "autoencoder": "demo", "text_encoder": "minilm",
    }  # fmt: skip
    assert wanted.items() <= fields.items() and fields["checkpoint"].endswith("ema.safetensors")
    with Image.open(out / "grid.png") as sheet:
        assert sheet.width > 2 * 96 and sheet.height > 3 * 96
    pipe = MicroDiTPipeline.from_pretrained(run)
    drawn = pipe("a snail", seed=3, **{key: wanted[key] for key in list(wanted)[:-2]}).images[0]
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(Image.open(paths[3]))).max() <= 2

    once = generate(run, "--prompt", "red apple", "--out", out, "--steps", 1)
    assert once.stdout == f"1 picture: {out / '00006-red-apple.png'}\n"
    assert parameters(out / "00006-red-apple.png")["guidance_scale"] == 2.0  # the run's own


def test_a_run_saved_as_a_pipeline(run: Path, tmp_path: Path) -> None:
    saved = generate(run, "--save", tmp_path / "saved")
    assert (saved.exit_code, saved.stdout) == (0, f"saved as a pipeline in {tmp_path / 'saved'}\n")
    for number, checkpoint in enumerate((run, tmp_path / "saved")):
        assert generate(checkpoint, "--prompt", "dog", "--steps", 2, "--out", tmp_path / str(number)).exit_code == 0
    one, two = (np.asarray(Image.open(tmp_path / str(number) / "00000-dog.png")) for number in (0, 1))
    assert np.array_equal(one, two)
    again = generate(run, "--save", tmp_path / "saved")
    assert again.exit_code == 2 and "saved is there already: give a new folder" in again.stderr


def test_a_released_checkpoint_by_its_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network and small encoders, where the released ones lie."""
    write_model(tmp_path / "clip", read_tower(DATA / "openclip")[0])
    text, codec = TEXT_ENCODERS["dfn-clip-h"], AUTOENCODERS["sdxl"]
    hub.add(str(text.where), tmp_path / "clip", commit=text.revision)
    kl().save_pretrained(tmp_path / "vae" / "vae")
    hub.add(codec.where, tmp_path / "vae", commit=codec.revision)
    preset = {name: size for name, size in SIZES.items() if name not in ("input_size", "caption_channels")}
    monkeypatch.setitem(PRESETS, "small", preset)
    net = network(1, caption_channels=64, input_size=64, pos_interp_scale=2.0)
    write_state_dict(tmp_path / "net.pt", net.state_dict())
    commit = hub.add("VSehwag24/MicroDiT", {RELEASED.split("/", 2)[2]: (tmp_path / "net.pt").read_bytes()})
    small = ("--steps", 1, "--height", 64, "--width", 64, "--prompt", "red apple", "--out", tmp_path / "out")
    for checkpoint in (RELEASED, RELEASED.rpartition("/")[2]):
        result = generate(checkpoint, *small)
        assert result.exit_code == 0, result.output
    fields = [parameters(tmp_path / "out" / f"0000{number}-red-apple.png") for number in (0, 1)]
    assert fields[0] == fields[1] and (fields[0]["checkpoint"], fields[0]["revision"]) == (RELEASED, commit)
    assert (fields[0]["autoencoder"], fields[0]["text_encoder"]) == ("sdxl", "dfn-clip-h")
    assert (fields[0]["guidance_scale"], fields[0]["sampler"]) == (5.0, "heun")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to draw: give --prompt TEXT or --prompts FILE"),
        (("--prompts", "none.txt"), "--prompts none.txt: cannot be read as text"),
        (("--prompts", "empty.txt"), "--prompts empty.txt: there is no prompt in it"),
        (("--prompts", "latin.txt"), "--prompts latin.txt: cannot be read as text in UTF-8"),
        (("--prompt", "dog", "--out", "empty.txt"), "--out empty.txt: it is a file; give a folder"),
        (("--prompt", "dog", "--out", "empty.txt/out"), "Not a directory: 'empty.txt/out'"),
        (("--save", "empty.txt/saved"), "Not a directory: 'empty.txt/saved'"),
        (("--prompt", "dog", "--sampler", "euler"), "sampler='euler': expected one of heun, dpmpp_2m, unipc"),
        (("--prompt", "dog", "--guidance-scale", "-2"), "guidance_scale=-2.0: expected 0 or more"),
        (("--prompt", "dog", "--guidance-interval", "3", "1"), "guidance_interval=(3.0, 1.0): expected noise levels"),
        (("--prompt", "dog", "--height", "40"), "height=40: expected a multiple of 16 pixels"),
        (("--prompt", "dog", "--device", "gpu"), "--device gpu: "),
        (("--prompt", "dog", "--autoencoder", "sdlx"), "'sdlx'"),
        (("--prompt", "dog", "--text-encoder", "t6"), "'t6'"),
        (("--prompt", "dog", "--revision", "main"), "revision='main' was given with"),
        (("--prompt", "dog", "--steps", "0"), "--steps"),
        (("--prompt", "dog", "--seed", "-1"), "--seed"),
    ],
)
def test_bad_requests(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes("pomme à".encode("latin-1"))
    result = generate(run, *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not result.stdout and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--height", "100000"), "--height 100000: expected 1 to 8,192 pixels"),
        (("--width", "0"), "--width 0: expected 1 to 8,192 pixels"),
        (("--seed", str(2**64)), f"--seed {2**64}: expected 0 to {2**64 - 1}"),
        (("--seed", str(2**64 - 1), "--images-per-prompt", "2"), f"expected 0 to {2**64 - 2}, as 2 pictures"),
    ],
)
def test_numbers_are_refused_before_a_checkpoint_is_loaded(arguments: tuple[str, ...], message: str) -> None:
    result = generate("no/such/checkpoint", "--prompt", "dog", *arguments)
    assert result.exit_code == 2 and message in result.stderr and "no/such" not in result.stderr


def test_a_prompt_that_is_cut_is_counted(run: Path, tmp_path: Path) -> None:
    small = ("--steps", 1, "--height", 32, "--width", 32, "--out", tmp_path / "out", "--device", "cpu")
    result = generate(run, "--prompt", "word " * 3000, "--prompt", "dog", *small)
    assert result.exit_code == 0, result.output
    assert "1 of 2 prompts have more than the" in result.stderr


@pytest.mark.parametrize("name", ["none", "runs/none/step", "VSehwag24/MicroDiT"])
def test_no_such_checkpoint(name: str) -> None:
    result = generate(name, "--prompt", "dog")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"microdit: {name}") and "dit_16_channel_37M" in result.stderr
