"""`microdit evaluate`: whether pictures, or a model, got better."""

from collections.abc import Mapping, Sequence
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
    from microdit.pipeline.evaluation.request import EvaluationRequest


# longer than 60 lines by its options and its help alone
def evaluate(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WHAT]...",
            help="A folder of pictures, tars of them, or a corpus; a run, a checkpoint, a saved pipeline or a released "
            "model, as `microdit generate` takes it; for `geneval` also a file of detections (JSON lines). Several "
            "give one table.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE.yaml", help="Settings, e.g. configs/evaluate/quick.yaml; options go before them."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="As WHAT a folder, tars or a corpus; an .npz file with mean and covariance; coco-30k, "
            "coco-30k-boomb0om.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With commas between: fid, kid, prdc, clip-fid, fd-dinov2, cmmd; fid-lite and kid-lite (the default) "
            "need no hub; clip-score-torchmetrics, clip-score-hessel, clip-score-mlperf; geneval, dpg.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="What a model draws: one prompt a line, or the column prompt, caption or text of a .tsv, .csv or "
            ".jsonl file; or a list by name: geneval, partiprompts, dpg-bench, coco-30k-boomb0om; `reference`: the "
            "captions of that.",
        ),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(
            metavar="CORPUS",
            help="What a model was trained on: its captions that are prompts, or nearly, and its images near those of "
            "a corpus REF are counted.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Take the first N prompts.")] = None,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="Of a corpus WHAT the source.")] = None,
    selection: Annotated[str | None, typer.Option(metavar="NAME", help="Of a corpus WHAT the selection.")] = None,
    reference_source: Annotated[str | None, typer.Option(metavar="NAME", help="Of a corpus REF.")] = None,
    reference_selection: Annotated[str | None, typer.Option(metavar="NAME", help="Of a corpus REF.")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(metavar="NUMBERS", help="Draw with each of these, e.g. 1,2,3,5. Default: the checkpoint's."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the sampler; 30.")] = None,
    sampler: Annotated[str | None, typer.Option(help="`heun` (the default), `unipc` or `dpmpp_2m`.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the first picture; each further one takes the next.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Draw all N times, and say how much the figures vary.")
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pictures of each prompt; GenEval: 4.")
    ] = None,
    actors: Annotated[int | None, typer.Option(min=0, metavar="N", help="Draw with N Ray actors.")] = None,
    size: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Resize and crop all pictures to a square first.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="How Inception's pictures are resized: `clean-fid`, `pytorch-fid`, `torch-fidelity`."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Weights, e.g. inception=inception.pth; for dpg judge=NAME."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="Default: a GPU if there is one.")] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Save mean and covariance of the pictures' features, and stop."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where evaluation.json and .html go, and the pictures; `evaluation`."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure pictures: against others (FID and its kin), against their captions (CLIP score), by GenEval's rules.

    A model draws pictures of the prompts into the folder `pictures` of `--out`; those that are there stay, so the
    same command goes on. Each figure has its standard error; `evaluation.json` has every setting beside it, as figures
    of other settings do not compare, and `evaluation.html` shows the table, a plot and pictures.

    **Examples**

    - `microdit evaluate pictures --reference photos --metrics kid-lite,fid-lite`

    - `microdit evaluate pictures --reference val2014_30k_stats.npz --metrics fid --model inception=inception.pth`

    - `microdit evaluate runs/demo/run --prompts prompts.txt --reference photos --guidance 1,2,4 --out sweep`

    - `microdit evaluate my/run other/run --config configs/evaluate/quick.yaml --reference my/corpus --size 256`

    - `microdit evaluate photos --metrics fid-lite --save-statistics photos.npz`

    - `microdit evaluate my/run --metrics geneval --prompts geneval --images-per-prompt 4
      --model mask2former=mask2former_swin-s.pth`

    - `microdit evaluate detections.jsonl --metrics geneval --prompts evaluation_metadata.jsonl`
    """
    from microdit.pipeline.evaluation.evaluate import write_evaluation
    from microdit.pipeline.evaluation.page import write_page
    from microdit.pipeline.evaluation.table import contamination, evaluate_all

    given = {
        "what": what, "reference": reference, "prompts": prompts, "training": training, "limit": limit,
        "source": source, "selection": selection, "reference_source": reference_source,
        "reference_selection": reference_selection,
        "steps": steps, "sampler": sampler, "seed": seed, "seeds": seeds, "images_per_prompt": images_per_prompt,
        "actors": actors, "size": size, "protocol": protocol, "device": device, "out": out,
        "metrics": None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()],
        "guidance": _numbers(guidance), "models": _models(model or []) or None,
    }  # fmt: skip
    with json_answer(as_json) as answer:
        request = _request(config, {name: value for name, value in given.items() if value not in (None, [])})
        if save_statistics is not None:
            _save_statistics(request, save_statistics)
            return
        with request_errors(request.out):
            rows = evaluate_all(request, _load)
            shared = None if request.training is None else contamination(request)
        answer.update(rows[0] if len(rows) == 1 else {"rows": rows})
        if shared is not None:
            answer["contamination"] = shared
        path, page = write_evaluation(request.out, answer), write_page(rows, request.out)
    if not as_json:
        _print(rows)
        for line in () if shared is None else _shared_lines(shared):
            print(printable(line))
        print(printable(f"all settings: {path}\npictures: {page}"))


def _request(config: str | None, given: Mapping[str, Any]) -> "EvaluationRequest":
    """Read the settings of a file, and put the options in their place."""
    from pydantic import ValidationError

    from microdit.pipeline.config.yaml import load_yaml
    from microdit.pipeline.evaluation.request import EvaluationRequest

    base = {} if config is None else load_yaml(config, EvaluationRequest).model_dump(exclude_unset=True)
    models = {**base.get("models", {}), **given.get("models", {})}
    try:
        return EvaluationRequest.model_validate({**base, **given, **({"models": models} if models else {})})
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0]).replace("_", "-")
        raise RequestError(f"--{name} {fault['input']}: {fault['msg']}") from None


def _models(given: list[str]) -> dict[str, str]:
    """Split NAME=PATH."""
    if bad := [each for each in given if "=" not in each]:
        raise RequestError(f"--model {bad[0]}: expected NAME=PATH, for example inception=inception.pth")
    return dict(each.split("=", 1) for each in given)


def _numbers(text: str | None) -> list[float] | None:
    """Read numbers with commas between."""
    if text is None:
        return None
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise RequestError(f"--guidance {text}: expected numbers with commas between, for example 1,2,3,5") from None


def _save_statistics(request: "EvaluationRequest", path: Path) -> None:
    from microdit.pipeline.evaluation.evaluate import save_statistics
    from microdit.pipeline.evaluation.metrics import METRICS

    options = request.options()
    features = {METRICS[name].features for name in options.metrics if name in METRICS}
    if len(features) != 1 or path.suffix != ".npz" or len(request.what) != 1:
        raise RequestError(
            f"--save-statistics {path}: expected a file .npz, one WHAT, and with --metrics one metric that compares "
            "with pictures"
        )
    statistics = save_statistics(request.what[0], path, features.pop(), options)
    print(printable(f"{path}: {statistics.features}, of {statistics.count:,} pictures"))


def _shared_lines(shared: Mapping[str, Any]) -> list[str]:
    """Say what the training has of the evaluation."""
    lines = []
    if (captions := shared.get("captions")) is not None:
        lines.append(
            f"training: {captions['equal']:,} of {captions['captions']:,} captions are prompts and "
            f"{captions['near']:,} nearly are, of {captions['prompts']:,} prompts"
        )
        lines += [f"  {each['sample']}: {each['caption']!r} ({each['prompt']!r})" for each in captions["examples"][:3]]
    if (images := shared.get("images")) is not None:
        lines.append(
            f"training: {images['near']:,} of {images['images']:,} images are near one of the reference, "
            f"{images['equal']:,} equal to one"
        )
    return lines


def _load(what: str, device: str | None) -> "MicroDiTPipeline":
    return load_pipeline(what, None, None, None, device)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with a line for each metric, and a column for each row; the best is marked."""
    from microdit.pipeline.evaluation.page import figure_text
    from microdit.pipeline.evaluation.table import best_rows, row_label

    table, best = Table(), best_rows(rows)
    several = len({row["what"] for row in rows}) > 1
    table.add_column("metric")
    for row in rows:
        table.add_column(printable(row_label(row, several)) if len(rows) > 1 else "value", justify="right")
    for name in rows[0]["metrics"]:
        cells = [
            figure_text(row["metrics"][name]) + (" *" if best.get(name) == i else "") for i, row in enumerate(rows)
        ]
        table.add_row(printable(name), *cells)
    Console().print(table)
    if best:
        print("* the best of the line")
