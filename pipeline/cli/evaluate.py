"""`microdit evaluate`: whether pictures, or a model, got better."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.command import Json, json_answer
from microdit.pipeline.cli.generate import load_pipeline, request_errors

if TYPE_CHECKING:
    from microdit.model.text_to_image import MicroDiTPipeline
    from microdit.pipeline.evaluation.evaluate import EvaluationOptions

MODEL = ("checkpoints", "state.json", "model_index.json")  # what a folder holds that is a run, a checkpoint, a pipeline


# longer than 60 lines by its options and its help alone
def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A folder of pictures; a run, a checkpoint, a saved pipeline or a released model, as `microdit "
            "generate` takes it; for `geneval` also a file of detections (JSON lines).",
            show_default=False,
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="REF", help="A folder of pictures, or an .npz file with mean and covariance."),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="With commas between: fid, kid, prdc, clip-fid, fd-dinov2, cmmd; fid-lite and kid-lite need no hub; "
            "clip-score-torchmetrics, clip-score-hessel, clip-score-mlperf; geneval.",
        ),
    ] = "kid-lite",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What a model draws: one prompt a line, or the column prompt, caption or text of a .tsv, .csv or "
            ".jsonl file. For `geneval` its evaluation_metadata.jsonl.",
        ),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(metavar="NUMBERS", help="Draw with each of these, e.g. 1,2,3,5. Default: the checkpoint's."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 30,
    sampler: Annotated[str, typer.Option(help="`heun`, `unipc` or `dpmpp_2m`.")] = "heun",
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; each further one takes the next.")] = 0,
    images_per_prompt: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pictures of each prompt; GenEval: 4.")
    ] = 1,
    size: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Resize and crop all pictures to a square first.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="How Inception's pictures are resized: `clean-fid`, `pytorch-fid`, `torch-fidelity`.")
    ] = "clean-fid",
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Weights of features, e.g. inception=pt_inception-2015-12-05.pth."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="Default: a GPU if there is one.")] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Save mean and covariance of the pictures' features, and stop."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where evaluation.json goes, and the pictures that are drawn.")
    ] = Path("evaluation"),
    as_json: Json = False,
) -> None:
    """Measure pictures: against others (FID and its kin), against their captions (CLIP score), by GenEval's rules.

    A model draws pictures of the prompts into the folder `pictures` of `--out`; those that are there stay, so the
    same command goes on. Each figure has its standard error; `evaluation.json` has every setting beside it, as figures
    of other settings do not compare.

    **Examples**

    - `microdit evaluate pictures --reference photos --metrics kid-lite,fid-lite`

    - `microdit evaluate pictures --reference val2014_30k_stats.npz --metrics fid --model inception=inception.pth`

    - `microdit evaluate runs/demo/run --prompts prompts.txt --reference photos --guidance 1,2,4 --out sweep`

    - `microdit evaluate photos --metrics fid-lite --save-statistics photos.npz`

    - `microdit evaluate my/run --metrics geneval --prompts evaluation_metadata.jsonl --images-per-prompt 4
      --model mask2former=mask2former_swin-s.pth`

    - `microdit evaluate detections.jsonl --metrics geneval --prompts evaluation_metadata.jsonl`
    """
    from microdit.pipeline.evaluation.evaluate import (
        GENEVAL,
        EvaluationOptions,
        evaluate_pictures,
        write_evaluation,
    )
    from microdit.pipeline.evaluation.prompt_files import judge_detections

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    options = EvaluationOptions(names, protocol, _models(model or []), size, device, out, prompts)
    options.check()
    with json_answer(as_json) as answer:
        if save_statistics is not None:
            _save_statistics(what, save_statistics, options)
            return
        if Path(what).is_file() and names == [GENEVAL]:
            assert prompts is not None
            rows = [{"metrics": {GENEVAL: judge_detections(Path(what), prompts)}}]
        elif Path(what).is_dir() and not any((Path(what) / name).exists() for name in MODEL):
            rows = [evaluate_pictures(Path(what), reference, options)]
        else:
            settings = {"num_inference_steps": steps, "sampler": sampler}
            rows = _of_model(what, images_per_prompt, reference, options, _numbers(guidance), seed, settings)
        answer.update(rows[0] if len(rows) == 1 else {"rows": rows})
        path = write_evaluation(out, answer)
    if not as_json:
        _print(rows)
        print(f"all settings: {path}")


def _models(given: list[str]) -> dict[str, str]:
    """Split NAME=PATH."""
    if bad := [each for each in given if "=" not in each]:
        raise RequestError(f"--model {bad[0]}: expected NAME=PATH, for example inception=inception.pth")
    return dict(each.split("=", 1) for each in given)


def _numbers(text: str | None) -> list[float | None]:
    """Read numbers with commas between; none at all is the checkpoint's own."""
    if text is None:
        return [None]
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise RequestError(f"--guidance {text}: expected numbers with commas between, for example 1,2,3,5") from None


def _save_statistics(what: str, path: Path, options: "EvaluationOptions") -> None:
    from microdit.pipeline.evaluation.evaluate import save_statistics
    from microdit.pipeline.evaluation.metrics import METRICS

    features = {METRICS[name].features for name in options.metrics if name in METRICS}
    if len(features) != 1 or path.suffix != ".npz":
        raise RequestError(
            f"--save-statistics {path}: expected a file .npz, and with --metrics one metric that compares with pictures"
        )
    statistics = save_statistics(Path(what), path, features.pop(), options)
    print(f"{path}: {statistics.features}, of {statistics.count:,} pictures")


def _of_model(
    what: str,
    images_per_prompt: int,
    reference: Path | None,
    options: "EvaluationOptions",
    guidance: list[float | None],
    seed: int,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Draw the prompts with each guidance scale, and measure the pictures."""
    from microdit.pipeline.evaluation.drawing import draw_missing
    from microdit.pipeline.evaluation.evaluate import evaluate_pictures
    from microdit.pipeline.evaluation.prompt_files import read_prompts

    if options.prompts is None:
        raise RequestError(f"{what}: there is no such folder of pictures; a model needs --prompts FILE")
    texts = [prompt for prompt in read_prompts(options.prompts) for _ in range(images_per_prompt)]
    rows = []
    with request_errors(options.out):
        pipe: MicroDiTPipeline = load_pipeline(what, None, None, None, options.device)
        for scale in guidance:
            asked = {**settings, "guidance_scale": pipe.guidance_scale if scale is None else scale}
            name = f"guidance-{asked['guidance_scale']:g}"
            folder = options.out / "pictures" / name
            draw_missing(pipe, texts, folder, seed=seed, options=asked)
            drawn = {"model": what, "prompts": str(options.prompts), "seed": seed, **asked}
            measured = evaluate_pictures(folder, reference, replace(options, out=options.out / name))
            rows.append({"drawn": drawn, **measured})
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    """Print a table with a line for each metric, and a column for each guidance scale."""
    table = Table()
    table.add_column("metric")
    for row in rows:
        scale = row.get("drawn", {}).get("guidance_scale")
        table.add_column("value" if scale is None else f"guidance {scale:g}", justify="right")
    for name in rows[0]["metrics"]:
        table.add_row(printable(name), *(_figure(row["metrics"][name]) for row in rows))
    Console().print(table)


def _figure(figures: Mapping[str, Any]) -> str:
    error = "" if figures.get("error") is None else f" ± {figures['error']:.2g}"
    return f"{figures['value']:.5g}{error}"
