"""Measure a folder of pictures: `microdit evaluate`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microdit.model.device import best_device
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.clip_scores import CONVENTIONS, clip_score
from microdit.pipeline.evaluation.detecting import COLOR_MODEL, DETECTOR, detect_pictures
from microdit.pipeline.evaluation.feature_sets import FeatureSet
from microdit.pipeline.evaluation.features import WIDTHS, Extractor, load_extractor
from microdit.pipeline.evaluation.geneval import parse_prompts
from microdit.pipeline.evaluation.metrics import METRICS, check_counts
from microdit.pipeline.evaluation.picture_sets import PictureSet, open_pictures
from microdit.pipeline.evaluation.prompt_files import judge_detections, read_json_lines
from microdit.pipeline.evaluation.statistics import FeatureStatistics

GENEVAL = "geneval"


@dataclass(frozen=True)
class EvaluationOptions:
    """Choose what is measured, and how.

    Attributes:
        protocol: how Inception's pictures are resized (`microdit.pipeline.evaluation.resizing`).
        models: by name of features, or of a CLIP score, where its weights are.
        size: resize and crop all pictures to so many pixels first.
    """

    metrics: Sequence[str]
    protocol: str = "clean-fid"
    models: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    device: str | None = None
    out: Path = Path("evaluation")
    """Path to which detections are written."""
    prompts: Path | None = None
    """GenEval's prompts, for that metric."""

    def check(self) -> None:
        """Refuse unknown names.

        Raises:
            RequestError: there is one.
        """
        names = [*METRICS, *CONVENTIONS, GENEVAL]
        if unknown := [name for name in self.metrics if name not in names]:
            raise RequestError(f"metric {unknown[0]!r} is not known; there are {', '.join(names)}")
        if GENEVAL in self.metrics and self.prompts is None:
            raise RequestError(f"metric {GENEVAL!r}: give --prompts with its evaluation_metadata.jsonl")
        models = {metric.features for metric in METRICS.values()} | CONVENTIONS.keys() | {DETECTOR, COLOR_MODEL}
        if unknown := sorted(self.models.keys() - models):
            raise RequestError(f"model {unknown[0]!r} is not known; there are {', '.join(sorted(models))}")


def evaluate_pictures(what: Path, reference: Path | None, options: EvaluationOptions) -> dict[str, Any]:
    """Measure the pictures of a folder, against those of another or the statistics of a file, or their captions.

    Returns what `evaluation.json` holds: `metrics` by name with `value` and `error`, and all settings.

    Raises:
        RequestError: the request is wrong; the message says how.
    """
    options.check()
    device = torch.device(options.device) if options.device else best_device()
    pictures = open_pictures(what, "pictures", options.size)
    distances = [name for name in options.metrics if name in METRICS]
    if distances and reference is None:
        raise RequestError(f"metric {distances[0]!r}: what is compared with? Give --reference")
    captions = pictures.captions() if CONVENTIONS.keys() & {*options.metrics} else []
    other = None if reference is None or not distances else _open_reference(reference, options)
    for name in distances:
        check_counts(name, len(pictures), len(other) if isinstance(other, PictureSet) else None)
    if isinstance(other, PictureSet) and other.shape != pictures.shape:
        raise RequestError(
            f"pictures of {'x'.join(map(str, pictures.shape))} pixels and a reference of "
            f"{'x'.join(map(str, other.shape))}; give --size N to resize and crop all to N x N"
        )
    figures: dict[str, Any] = {}
    sets: dict[str, tuple[Extractor, FeatureSet, FeatureSet]] = {}
    for name in distances:
        features = METRICS[name].features
        if features not in sets:
            model = options.models.get(features)
            extractor = load_extractor(features, protocol=options.protocol, model=model, device=device)
            sets[features] = (extractor, _extract(extractor, pictures), _reference(extractor, other))
        figures[name] = METRICS[name].compute(*sets[features][1:])
    for name in options.metrics:
        if name in CONVENTIONS:
            figures[name] = clip_score(name, pictures.pixels(), captions, options.models.get(name), device)
        if name == GENEVAL:
            figures[name] = _geneval(pictures, options, device)
    return {
        "metrics": {name: figures[name] for name in options.metrics},
        "pictures": _about(pictures, what),
        "reference": None if other is None else _about(other, reference),
        "features": {name: extractor.settings for name, (extractor, *_) in sets.items()},
        "size": options.size,
        "software": {"torch": torch.__version__, "numpy": np.__version__, "device": str(device)},
    }


def _geneval(pictures: PictureSet, options: EvaluationOptions, device: torch.device | str) -> dict[str, Any]:
    """Detect what is in the pictures, into `detections.jsonl` of the folder `out`, and score it."""
    assert options.prompts is not None
    prompts = parse_prompts(line for _, line in read_json_lines(options.prompts))
    path = detect_pictures(pictures, prompts, options.out, options.models, device)
    return judge_detections(path, options.prompts)


def _open_reference(reference: Path, options: EvaluationOptions) -> PictureSet | FeatureStatistics:
    if reference.is_file() and reference.suffix == ".npz":
        return FeatureStatistics.read(reference)
    return open_pictures(reference, "reference", options.size)


def _reference(extractor: Extractor, other: PictureSet | FeatureStatistics | None) -> FeatureSet:
    """Make the features of the reference, or check that its statistics are of the same ones.

    Raises:
        RequestError: they are of others.
    """
    assert other is not None
    if isinstance(other, PictureSet):
        return _extract(extractor, other)
    width = len(other.mean)
    shapes = {metric.features for metric in METRICS.values()}
    if other.features and other.features != extractor.identity:
        raise RequestError(
            f"the reference's statistics are of the features {other.features!r}, and the metric takes "
            f"{extractor.identity!r}; make them again with `microdit evaluate --save-statistics`"
        )
    if width != WIDTHS[extractor.name]:
        fitting = [name for name in shapes if WIDTHS[name] == width]
        raise RequestError(
            f"the reference's statistics are of {width} features, and {extractor.name} has {WIDTHS[extractor.name]}; "
            f"give statistics of {extractor.name}{f', or a metric of {fitting[0]}' if fitting else ''}"
        )
    return FeatureSet(known=other)


def _extract(extractor: Extractor, pictures: PictureSet) -> FeatureSet:
    """Compute the features of a set, with a bar on a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(f"{extractor.name} of {pictures.folder.name}", total=len(pictures))
        features = np.concatenate(list(extractor.extract(pictures.pixels(lambda: bar.advance(task)))))
    if not np.isfinite(features).all():
        raise RequestError(f"features {extractor.name!r}: the network gives NaN for some of {pictures.folder}")
    return FeatureSet(features, extractor.identity)


def save_statistics(what: Path, out: Path, features: str, options: EvaluationOptions) -> FeatureStatistics:
    """Write mean and covariance of the features of a folder's pictures, as `--reference` takes them.

    Raises:
        RequestError: the request is wrong; the message says how.
    """
    options.check()
    pictures = open_pictures(what, "pictures", options.size)
    device = torch.device(options.device) if options.device else best_device()
    extractor = load_extractor(features, protocol=options.protocol, model=options.models.get(features), device=device)
    statistics = _extract(extractor, pictures).statistics
    statistics.write(out)
    return statistics


def _about(some: PictureSet | FeatureStatistics, where: Path | None) -> dict[str, Any]:
    if isinstance(some, FeatureStatistics):
        return {"statistics": str(where), "features": some.features, "count": some.count}
    height, width = some.shape
    return {"folder": str(where), "count": len(some), "height": height, "width": width, "sha256": some.identity()}


def write_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> Path:
    """Write `evaluation.json` into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    path.write_text(json.dumps(evaluation, indent=1) + "\n")
    return path
