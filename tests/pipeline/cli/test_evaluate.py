"""`microdit evaluate`, from the command to the figures."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.cli.app import app
from microdit.pipeline.config.yaml import load_yaml
from microdit.pipeline.evaluation.clip_scores import CONVENTIONS
from microdit.pipeline.evaluation.drawing import draw_missing
from microdit.pipeline.evaluation.metrics import METRICS
from microdit.pipeline.evaluation.request import EvaluationRequest
from tests.model.pretrained.vision_models import clip_model
from tests.model.tiny import write_run
from tests.pipeline.evaluation.references import DATA
from tests.pipeline.evaluation.test_evaluate import folder

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


def evaluate(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_two_folders(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "first", range(24)), folder(tmp_path / "second", range(50, 74))
    settings = (first, "--reference", second, "--metrics", "kid-lite,fid-lite", "--out", tmp_path / "out")
    result = evaluate(*settings)
    assert result.exit_code == 0, result.output
    assert "kid-lite" in result.stdout and "fid-lite" in result.stdout and "±" in result.stdout
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(written["metrics"]) == ["kid-lite", "fid-lite"]
    assert json.loads(evaluate(*settings, "--json").stdout) == written


def test_a_model_draws_what_is_missing_and_is_measured_with_each_guidance(run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.tsv", tmp_path / "out"
    prompts.write_text("id\tCaption\n" + "".join(f"{i}\tpicture {i}\n" for i in range(20)))
    reference = folder(tmp_path / "photos", range(20))
    settings = (run, "--reference", reference, "--prompts", prompts, "--guidance", "1,2", "--size", 32, "--out", out)
    settings += ("--steps", 2, "--sampler", "unipc", "--device", "cpu")
    result = evaluate(*settings)
    assert result.exit_code == 0, result.output
    assert "guidance 1" in result.stdout and "guidance 2" in result.stdout
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    assert [row["drawn"]["guidance_scale"] for row in rows] == [1.0, 2.0]
    pictures = sorted((out / "pictures" / "guidance-2").iterdir())
    assert [path.name for path in pictures] == [f"{i:06}.png" for i in range(20)]
    with Image.open(pictures[7]) as image:
        assert image.info["prompt"] == "picture 7" and json.loads(image.info["parameters"])["seed"] == 7
        before = np.asarray(image)
    untouched = pictures[3].stat().st_mtime_ns
    pictures[7].unlink()
    assert evaluate(*settings).exit_code == 0
    assert json.loads((out / "evaluation.json").read_text())["rows"] == rows
    with Image.open(pictures[7]) as image:  # alone in its batch: the same but for rounding
        assert np.abs(np.asarray(image).astype(int) - before).max() <= 1
    assert pictures[3].stat().st_mtime_ns == untouched
    result = evaluate(*settings[:-4], "--sampler", "heun", "--device", "cpu")
    assert (
        result.exit_code == 2 and "it was drawn with sampler = 'unipc', not 'heun'; give another --out" in result.stderr
    )


def test_statistics_are_saved_and_compared_with(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "first", range(24)), folder(tmp_path / "second", range(50, 74))
    result = evaluate(second, "--metrics", "fid-lite", "--save-statistics", tmp_path / "second.npz")
    assert result.exit_code == 0 and result.stdout.endswith("of 24 pictures\n"), result.output
    result = evaluate(first, "--reference", tmp_path / "second.npz", "--metrics", "fid-lite", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_detections_are_judged(tmp_path: Path) -> None:
    prompts, detections, out = tmp_path / "prompts.jsonl", tmp_path / "detections.jsonl", tmp_path / "out"
    cases = [json.loads(line) for line in (DATA / "geneval.jsonl").read_text().splitlines()]
    prompts.write_text("".join(json.dumps(case["prompt"]) + "\n" for case in cases))
    pictures = [{"prompt": case["prompt"]["prompt"], "detections": case["detections"]} for case in cases]
    detections.write_text("".join(json.dumps(each) + "\n" for each in pictures))
    result = evaluate(detections, "--metrics", "geneval", "--prompts", prompts, "--out", out)
    assert result.exit_code == 0, result.output
    figures = json.loads((out / "evaluation.json").read_text())["metrics"]["geneval"]
    assert figures["images"] == pytest.approx(np.mean([case["correct"] for case in cases]))
    detections.write_text(json.dumps(pictures[0]) + "\n")
    result = evaluate(detections, "--metrics", "geneval", "--prompts", prompts, "--out", out)
    assert result.exit_code == 2 and f"there is no picture of {len(cases) - 1} prompts" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metrics", "geneval"), "give --prompts geneval, or its evaluation_metadata.jsonl"),
        (("--metrics", "fld", "--reference", "."), "metric 'fld' is not known"),
        (("--model", "inception"), "expected NAME=PATH"),
        (("--guidance", "1;2", "--prompts", "{prompts}", "{run}"), "expected numbers with commas between"),
        (("--prompts", "{nowhere}", "{run}"), "there is no such file; expected one, or one of geneval"),
        (
            ("--prompts", "{nameless}", "{run}"),
            "line 1: it has words; expected a column prompt or prompts",
        ),
        (("{run}",), "a model needs --prompts FILE"),
        (("--save-statistics", "file.txt"), "expected a file .npz"),
    ],
)
def test_wrong_requests_end_with_one_message(
    arguments: tuple[str, ...], message: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "nameless.jsonl").write_text('{"words": "a"}\n')
    files = {name: str(tmp_path / f"{name}.{end}") for name, end in
             (("prompts", "txt"), ("nowhere", "txt"), ("nameless", "jsonl"))}  # fmt: skip
    files["nowhere"] += "x"
    files["run"] = str(run)
    what = [] if "{run}" in arguments else [tmp_path]
    result = evaluate(*what, *(each.format(**files) for each in arguments), "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_several_sets_and_seeds_give_one_table_and_a_page(run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("".join(f"picture {i}\n" for i in range(6)))
    reference = folder(tmp_path / "photos", range(20), tint=60)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"metrics: [fid-lite]\nreference: {reference}\nprompts: {prompts}\nlimit: 4\nguidance: [1, 3]\nsize: 32\n"
        "steps: 2\nsampler: unipc\ndevice: cpu\n"
    )
    settings = (run, reference, "--config", config, "--guidance", "2", "--seeds", 3, "--out", out)
    result = evaluate(*settings)
    assert result.exit_code == 0, result.output
    model, photos = json.loads((out / "evaluation.json").read_text())["rows"]
    assert model["drawn"]["guidance_scale"] == 2.0 and model["drawn"]["count"] == 4  # options go before the file
    found, same = model["metrics"]["fid-lite"], photos["metrics"]["fid-lite"]
    assert len(set(found["seeds"]["values"])) == 3 and found["seeds"]["deviation"] > 0
    assert found["value"] == pytest.approx(np.mean(found["seeds"]["values"]))
    assert same["value"] == pytest.approx(0, abs=1e-6)
    seeds = []
    for name in ("guidance-2", "guidance-2-2", "guidance-2-3"):
        for path in sorted((out / "pictures" / "run" / name).iterdir()):
            with Image.open(path) as image:
                seeds.append(json.loads(image.info["parameters"])["seed"])
    assert seeds == list(range(12))
    page = (out / "evaluation.html").read_text()
    assert page.count("data:image/jpeg") == 4 + 12 and "picture 3" in page and "(best)" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    assert "photos" in result.stdout and "* the best of the line" in result.stdout


def test_a_sweep_is_plotted(run: Path, tmp_path: Path) -> None:
    reference = folder(tmp_path / "photos", range(20))
    clip = clip_model(tmp_path / "clip")
    settings = (run, "--reference", reference, "--prompts", "reference", "--limit", 3, "--size", 32, "--steps", 1)
    settings += ("--metrics", "fid-lite,clip-score-mlperf", "--model", f"clip-score-mlperf={clip}", "--device", "cpu")
    result = evaluate(*settings, "--guidance", "1,2,4", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count("<svg") == 2 and "fid-lite against clip-score-mlperf" in page
    assert "fid-lite against guidance" in page and page.count('class="best" cx') == 2
    with Image.open(tmp_path / "out" / "pictures" / "guidance-4" / "000002.png") as image:
        assert image.info["prompt"] == "picture 2"


SETTINGS = ("--size", 32, "--steps", 1, "--device", "cpu", "--sampler", "unipc", "--metrics", "fid-lite")


def drawn_and_figures(run: Path, out: Path, photos: Path, *more: Any) -> tuple[list[bytes], Any]:
    """Draw 70 pictures, which are two batches, and measure them."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("".join(f"picture {i}\n" for i in range(70)))
    result = evaluate(run, "--reference", photos, "--prompts", prompts, *SETTINGS, *more, "--out", out)
    assert result.exit_code == 0, result.output
    paths = sorted((out / "pictures" / "guidance-2").iterdir())
    return [path.read_bytes() for path in paths], json.loads((out / "evaluation.json").read_text())["metrics"]


def test_a_run_that_was_stopped_gives_the_same_figures(run: Path, tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", range(20))
    whole = drawn_and_figures(run, tmp_path / "out", photos)
    assert len(whole[0]) == 70
    for number in (*range(30), 66):  # it was stopped in the middle of both batches
        (tmp_path / "out" / "pictures" / "guidance-2" / f"{number:06}.png").unlink()
    assert drawn_and_figures(run, tmp_path / "out", photos) == whole


def test_each_of_several_processes_draws_its_batches(run: Path, tmp_path: Path) -> None:
    pipe = MicroDiTPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    prompts, options = [f"picture {i}" for i in range(70)], {"num_inference_steps": 1, "sampler": "unipc"}
    draw_missing(pipe, prompts, tmp_path / "one", options=options)
    draw_missing(pipe, prompts, tmp_path / "two", options=options, part=(1, 2))
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == [f"{i:06}.png" for i in range(64, 70)]
    draw_missing(pipe, prompts, tmp_path / "two", options=options, part=(0, 2))
    one, two = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two"))
    assert one == two and len(one) == 70


@pytest.mark.slow
def test_ray_actors_and_a_killed_process_give_the_same_figures(run: Path, tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", range(20))
    whole = drawn_and_figures(run, tmp_path / "one", photos)
    assert drawn_and_figures(run, tmp_path / "two", photos, "--actors", 2) == whole
    arguments = [run, "--reference", photos, "--prompts", tmp_path / "prompts.txt", *SETTINGS]
    command = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", "evaluate"]
    process = subprocess.Popen([*command, *map(str, [*arguments, "--out", tmp_path / "killed"])])
    while not any((tmp_path / "killed").rglob("*.png")):
        assert process.poll() is None, "it was over before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "evaluation.json").exists()
    assert drawn_and_figures(run, tmp_path / "killed", photos) == whole


@pytest.mark.parametrize("name", ["paper", "quick", "demo"])
def test_shipped_settings_are_read(name: str) -> None:
    request = load_yaml(f"configs/evaluate/{name}.yaml", EvaluationRequest)
    assert set(request.metrics) <= {*METRICS, *CONVENTIONS} and request.reference and request.prompts == "reference"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to evaluate"),
        (("a", "--protocol", "mine"), "--protocol mine: Input should be 'clean-fid'"),
        (("a", "--guidance", "1,x"), "--guidance 1,x: expected numbers"),
        (("a", "--prompts", "reference", "--source", "b"), "a: it is a model; --source and --selection are of corpora"),
        (("/nowhere", "--reference", "/nowhere"), "/nowhere: there is no such folder of pictures; a model needs"),
        (("a", "--prompts", "reference", "--metrics", "clip-score-hessel"), "--prompts reference: give --reference"),
    ],
)
def test_wrong_requests(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = evaluate(*arguments, "--out", tmp_path)
    assert result.exit_code == 2 and message in result.stderr, result.output
