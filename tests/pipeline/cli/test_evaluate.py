"""`microdit evaluate`, from the command to the figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from microdit.pipeline.cli.app import app
from tests.model.tiny import write_run
from tests.pipeline.evaluation.references import DATA
from tests.pipeline.evaluation.test_evaluate import folder

pytest.importorskip("efficientnet_lite_pytorch")


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
        (("--metrics", "geneval"), "give --prompts with its evaluation_metadata.jsonl"),
        (("--metrics", "fld", "--reference", "."), "metric 'fld' is not known"),
        (("--model", "inception"), "expected NAME=PATH"),
        (("--guidance", "1;2", "--prompts", "{prompts}", "{run}"), "expected numbers with commas between"),
        (("--prompts", "{nowhere}", "{run}"), "it cannot be read as text"),
        (("--prompts", "{nameless}", "{run}"), "line 1: it has words; expected a column prompt or caption or text"),
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
