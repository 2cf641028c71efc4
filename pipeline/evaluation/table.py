"""Evaluate several sets and models, with several guidance scales and seeds, into one table."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation.duplicates import default_evaluation
from microdit.pipeline.evaluation.contamination import contaminated_captions, contaminated_images
from microdit.pipeline.evaluation.corpus_pictures import is_corpus
from microdit.pipeline.evaluation.drawing import draw_missing
from microdit.pipeline.evaluation.drawing_actors import draw_on_actors
from microdit.pipeline.evaluation.evaluate import COCO_30K, GENEVAL, EvaluationOptions, Evaluator, open_set
from microdit.pipeline.evaluation.metrics import METRICS
from microdit.pipeline.evaluation.picture_sets import is_tars, open_pictures
from microdit.pipeline.evaluation.prompt_files import judge_detections, read_prompts
from microdit.pipeline.evaluation.request import EvaluationRequest

if TYPE_CHECKING:
    from microdit.model.text_to_image import MicroDiTPipeline

Row: TypeAlias = dict[str, Any]
Load = Callable[[str, str | None], "MicroDiTPipeline"]
"""Loads the pipeline of a model's name, for a device."""
MODEL = ("checkpoints", "state.json", "model_index.json")  # what a folder holds that is a run, a checkpoint, a pipeline


def is_pictures(what: str) -> bool:
    """Tell a set of pictures from a model."""
    path = Path(what)
    if what == COCO_30K or is_tars(path) or is_corpus(what):
        return True
    return path.is_dir() and not any((path / name).exists() for name in MODEL)


def evaluate_all(request: EvaluationRequest, load: Load) -> list[Row]:
    """Carry out a request: a row for each set, and for each model and guidance scale.

    Raises:
        RequestError: the request is wrong; the message says how.
    """
    options = request.options()
    if all(Path(what).is_file() and Path(what).suffix == ".jsonl" for what in request.what):
        return [_judged(what, request, options) for what in request.what]
    prompts = _prompts(request, options)
    evaluator = Evaluator(request.reference, options)
    prompts = evaluator.reference_captions() if prompts is None else prompts
    texts = [text for text in prompts[: request.limit] for _ in range(request.images_per_prompt)]
    rows: list[Row] = []
    for what, label in zip(request.what, _labels(request.what), strict=True):
        if is_pictures(what):
            out = request.out / label if len(request.what) > 1 else request.out
            rows.append(
                {"what": what, **evaluator.measure(open_set(what, "pictures", options.size, options.subset), out)}
            )
        else:
            rows += _of_model(what, label, texts, request, evaluator, load)
    return rows


def contamination(request: EvaluationRequest) -> Row:
    """Count what the training has of the prompts and of the reference, if the request names its corpus.

    Raises:
        RequestError: there is no such corpus, or nothing to look for in it.
    """
    options, found = request.options(), Row()
    assert request.training is not None
    corpus = Corpus.open(request.training)
    if options.prompts is not None:
        found["captions"] = contaminated_captions(corpus, read_prompts(options.prompts)[: request.limit])
    reference = request.reference or ""
    if reference == COCO_30K or reference.endswith(".parquet") or (reference and is_corpus(reference)):
        found["images"] = contaminated_images(corpus, default_evaluation() if reference == COCO_30K else reference)
    if not found:
        raise RequestError(f"--training {request.training}: give --prompts, or a corpus as --reference, to look for")
    return {"corpus": corpus.url, **found}


def _judged(what: str, request: EvaluationRequest, options: EvaluationOptions) -> Row:
    """Score a file of detections."""
    if list(request.metrics) != [GENEVAL]:
        raise RequestError(f"{what}: detections are scored by the metric {GENEVAL!r} alone")
    assert options.prompts is not None
    return {"what": what, "metrics": {GENEVAL: judge_detections(Path(what), options.prompts)}}


def _prompts(request: EvaluationRequest, options: EvaluationOptions) -> list[str] | None:
    """Read what models draw; None if it is the captions of the reference.

    Raises:
        RequestError: there are models and no prompts.
    """
    models = [what for what in request.what if not is_pictures(what)]
    if models and request.prompts is None:
        raise RequestError(f"{models[0]}: there is no such folder of pictures; a model needs --prompts FILE")
    if models and options.subset:
        raise RequestError(
            f"{models[0]}: it is a model; --source and --selection are of corpora, those of REF's begin "
            "with --reference-"
        )
    if not models:
        return []
    return None if options.prompts is None else read_prompts(options.prompts)


def _labels(names: Sequence[str]) -> list[str]:
    """Name the folders of several models: the last part of each that tells them apart."""
    parts = [[part for part in name.rstrip("/").split("/") if part] or ["set"] for name in names]
    length = 1
    while len({tuple(each[-length:]) for each in parts}) < len({tuple(each) for each in parts}):
        length += 1
    return ["-".join(each[-length:]).replace(":", "-") for each in parts]


def _of_model(
    what: str, label: str, texts: list[str], request: EvaluationRequest, evaluator: Evaluator, load: Load
) -> Iterator[Row]:
    """Draw the prompts with each guidance scale, and measure the pictures."""
    pipe = load(what, request.device)
    for scale in request.guidance or [pipe.guidance_scale]:
        asked = {"num_inference_steps": request.steps, "sampler": request.sampler, "guidance_scale": float(scale)}
        drawn = {
            "model": what,
            "prompts": request.prompts,
            "prompts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
            "count": len(texts),
            "seed": request.seed,
            "seeds": request.seeds,
            **asked,
            **pipe.settings,
            "dtype": str(pipe.dtype).removeprefix("torch."),
        }
        rows = []
        for number in range(request.seeds):
            name = f"guidance-{scale:g}" + (f"-{number + 1}" if number else "")
            name = f"{label}/{name}" if len(request.what) > 1 else name
            folder, seed = request.out / "pictures" / name, request.seed + number * len(texts)
            if request.actors:
                draw_on_actors(request.actors, load, what, request.device, texts, folder, seed=seed, options=asked)
            draw_missing(pipe, texts, folder, seed=seed, options=asked)
            rows.append(evaluator.measure(open_pictures(folder, "pictures", request.size), request.out / name))
        yield {"what": what, "drawn": drawn, **over_seeds(rows)}


def over_seeds(rows: Sequence[Row]) -> Row:
    """Join the rows of several seeds: of each value the mean, and the values with their standard deviation."""
    if len(rows) == 1:
        return dict(rows[0])
    metrics = {}
    for name, first in rows[0]["metrics"].items():
        values = [row["metrics"][name]["value"] for row in rows]
        errors = [row["metrics"][name].get("error") for row in rows]
        error = None if None in errors else float(np.sqrt(np.mean(np.square(errors))))
        spread = {"values": values, "deviation": float(np.std(values, ddof=1))}
        metrics[name] = {**first, "value": float(np.mean(values)), "error": error, "seeds": spread}
    return {**rows[0], "metrics": metrics, "pictures": [row["pictures"] for row in rows]}


def higher_is_better(metric: str) -> bool:
    """Tell whether larger values of a metric are better ones."""
    return metric not in METRICS or METRICS[metric].higher_is_better


def best_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Find the number of the best row of each metric; of one row, and of equal ones, none is."""
    best = {}
    for name in rows[0]["metrics"]:
        values = [row["metrics"][name]["value"] for row in rows]
        if len(set(values)) > 1:
            best[name] = values.index(max(values) if higher_is_better(name) else min(values))
    return best


def row_label(row: Mapping[str, Any], several: bool) -> str:
    """Name a row: by its guidance scale, and by what it is of if there are several."""
    scale = row.get("drawn", {}).get("guidance_scale")
    parts = [Path(str(row.get("what", "value"))).name] if several or scale is None else []
    return " ".join([*parts, *([f"guidance {scale:g}"] if scale is not None else [])])
