"""Measure sets of pictures: `microdit evaluate`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microdit.model.device import best_device
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.curation.duplicates import default_evaluation
from microdit.pipeline.evaluation.clip_scores import CONVENTIONS, clip_score
from microdit.pipeline.evaluation.corpus_pictures import Subset, is_corpus, open_corpus_pictures
from microdit.pipeline.evaluation.detecting import COLOR_MODEL, DETECTOR, detect_pictures
from microdit.pipeline.evaluation.feature_cache import cached_features, keep_features
from microdit.pipeline.evaluation.feature_sets import FeatureSet
from microdit.pipeline.evaluation.features import WIDTHS, Extractor, load_extractor
from microdit.pipeline.evaluation.geneval import parse_prompts
from microdit.pipeline.evaluation.metrics import METRICS, check_counts
from microdit.pipeline.evaluation.named_files import STATISTICS, named_file
from microdit.pipeline.evaluation.picture_sets import PictureSet, open_pictures
from microdit.pipeline.evaluation.prompt_files import judge_detections, read_json_lines
from microdit.pipeline.evaluation.questions import JUDGE, judge_pictures, read_questions
from microdit.pipeline.evaluation.statistics import FeatureStatistics

GENEVAL, DPG = "geneval", "dpg"
REFERENCE = "reference"  # as prompts: the captions of the reference's pictures
COCO_30K = "coco-30k"  # as a reference: of the corpus of configs/coco-val.yaml


@dataclass(frozen=True)
class EvaluationOptions:
    """Choose what is measured, and how.

    Attributes:
        protocol: how Inception's pictures are resized (`microdit.pipeline.evaluation.resizing`).
        models: by name of features, or of a CLIP score, where its weights are.
        size: resize and crop all pictures to so many pixels first.
        subset: the part of the corpus that is measured, and `reference_subset` of the one that is compared with.
        cache: a folder that keeps features from one call to the next.
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
    subset: Subset = field(default_factory=Subset)
    reference_subset: Subset = field(default_factory=Subset)
    cache: Path | None = None

    def check(self) -> None:
        """Refuse unknown names.

        Raises:
            RequestError: there is one.
        """
        names = [*METRICS, *CONVENTIONS, GENEVAL, DPG]
        if unknown := [name for name in self.metrics if name not in names]:
            raise RequestError(f"metric {unknown[0]!r} is not known; there are {', '.join(names)}")
        if GENEVAL in self.metrics and self.prompts is None:
            raise RequestError(f"metric {GENEVAL!r}: give --prompts geneval, or its evaluation_metadata.jsonl")
        if DPG in self.metrics and (self.prompts is None or JUDGE not in self.models):
            raise RequestError(
                f"metric {DPG!r}: give --prompts dpg-bench, and --model {JUDGE}=NAME: a captioner, e.g. qwen2.5-vl-7b, "
                "or http://host:8000/v1#MODEL"
            )
        models = {metric.features for metric in METRICS.values()} | CONVENTIONS.keys() | {DETECTOR, COLOR_MODEL, JUDGE}
        if unknown := sorted(self.models.keys() - models):
            raise RequestError(f"model {unknown[0]!r} is not known; there are {', '.join(sorted(models))}")

    @property
    def torch_device(self) -> torch.device:
        """The device that was asked for, else the best one."""
        return torch.device(self.device or best_device())


def open_set(where: str | Path, what: str, size: int | None = None, subset: Subset | None = None) -> PictureSet:
    """Open a corpus, a folder of pictures, or tars; `coco-30k` is of the corpus of configs/coco-val.yaml.

    Raises:
        RequestError: there is no such set, or a part is chosen of what is no corpus.
    """
    subset = subset or Subset()
    if str(where) == COCO_30K and not Path(where).exists():
        return open_corpus_pictures(default_evaluation(), Subset(subset.source, subset.selection, coco=True), size)
    if is_corpus(str(where)):
        return open_corpus_pictures(str(where), subset, size)
    if subset:
        raise RequestError(f"{what} {where}: it is no corpus, of which alone a source or a selection can be taken")
    return open_pictures(Path(where), what, size)


class Evaluator:
    """Measures sets of pictures against one reference; networks and the reference's features are loaded once."""

    def __init__(self, reference: str | Path | None, options: EvaluationOptions):
        """Open the reference.

        Raises:
            RequestError: there is none, or a name is not known.
        """
        options.check()
        self.options, self.reference = options, reference
        self.distances = [name for name in options.metrics if name in METRICS]
        if self.distances and reference is None:
            raise RequestError(f"metric {self.distances[0]!r}: what is compared with? Give --reference")
        self._other = self._open_reference() if self.distances else None
        self._extractors: dict[str, Extractor] = {}
        self._references: dict[str, FeatureSet] = {}

    def measure(self, pictures: PictureSet, out: Path | None = None) -> dict[str, Any]:
        """Measure a set: what `evaluation.json` holds, `metrics` with `value` and `error`, and all settings.

        Args:
            out: where detections go, in place of the options'.

        Raises:
            RequestError: the request is wrong; the message says how.
        """
        options = self.options
        captions = pictures.captions() if CONVENTIONS.keys() & {*options.metrics} else []
        self._check(pictures)
        figures: dict[str, Any] = {}
        own: dict[str, FeatureSet] = {}
        for name in self.distances:
            features = METRICS[name].features
            if features not in own:
                own[features] = self.features(features, pictures)
            figures[name] = METRICS[name].compute(own[features], self._reference(features))
        for name in options.metrics:
            if name in CONVENTIONS:
                model = options.models.get(name)
                figures[name] = clip_score(name, pictures.pixels(), captions, model, options.torch_device)
            if name == GENEVAL:
                figures[name] = self._geneval(pictures, out or options.out)
            if name == DPG:
                assert options.prompts is not None
                asked, judge = read_questions(options.prompts), options.models[JUDGE]
                figures[name] = judge_pictures(pictures, asked, out or options.out, judge, options.torch_device)
        return {
            "metrics": {name: figures[name] for name in options.metrics},
            "pictures": _about(pictures, pictures.where),
            "reference": None if self._other is None else _about(self._other, self.reference),
            "features": {name: self._extractors[name].settings for name in own},
            "size": options.size,
            "software": {"torch": torch.__version__, "numpy": np.__version__, "device": str(options.torch_device)},
        }

    def features(self, name: str, pictures: PictureSet) -> FeatureSet:
        """Compute the features of a set, or read those that are kept.

        Raises:
            RequestError: the network cannot be had, or gives what is not finite.
        """
        extractor, cache = self._extractor(name), self.options.cache
        device = self.options.torch_device.type
        depends_on = () if cache is None else (extractor.identity, pictures.identity, pictures.size, device)
        features = None if cache is None else cached_features(cache, *depends_on)
        if features is None or len(features) != len(pictures):
            features = _extract(extractor, pictures)
            if cache is not None:
                keep_features(cache, features, *depends_on)
        return FeatureSet(features, extractor.identity)

    def reference_captions(self) -> list[str]:
        """Read the captions of the reference's pictures, to draw from.

        Raises:
            RequestError: there are none.
        """
        other = self._other or (None if self.reference is None else self._open_reference())
        if not isinstance(other, PictureSet):
            raise RequestError(f"--prompts {REFERENCE}: give --reference with pictures that have captions")
        return other.captions()

    def _extractor(self, name: str) -> Extractor:
        if name not in self._extractors:
            options = self.options
            model, device = options.models.get(name), options.torch_device
            self._extractors[name] = load_extractor(name, protocol=options.protocol, model=model, device=device)
        return self._extractors[name]

    def _reference(self, name: str) -> FeatureSet:
        if name not in self._references:
            assert self._other is not None
            self._references[name] = (
                self.features(name, self._other)
                if isinstance(self._other, PictureSet)
                else _known(self._extractor(name), self._other)
            )
        return self._references[name]

    def _open_reference(self) -> PictureSet | FeatureStatistics:
        reference, options = self.reference, self.options
        assert reference is not None
        if str(reference) in STATISTICS and not Path(reference).exists():
            return FeatureStatistics.read(named_file(str(reference), STATISTICS[str(reference)]))
        if Path(reference).is_file() and Path(reference).suffix == ".npz":
            return FeatureStatistics.read(Path(reference))
        return open_set(reference, "reference", options.size, options.reference_subset)

    def _check(self, pictures: PictureSet) -> None:
        """Refuse sets that are too small, and of another shape than the reference."""
        other = self._other
        for name in self.distances:
            check_counts(name, len(pictures), len(other) if isinstance(other, PictureSet) else None)
        if isinstance(other, PictureSet) and other.shape != pictures.shape:
            raise RequestError(
                f"pictures of {'x'.join(map(str, pictures.shape))} pixels and a reference of "
                f"{'x'.join(map(str, other.shape))}; give --size N to resize and crop all to N x N"
            )

    def _geneval(self, pictures: PictureSet, out: Path) -> dict[str, Any]:
        """Detect what is in the pictures, into `detections.jsonl` of the folder `out`, and score it."""
        options = self.options
        assert options.prompts is not None
        prompts = parse_prompts(line for _, line in read_json_lines(options.prompts))
        path = detect_pictures(pictures, prompts, out, options.models, options.torch_device)
        return judge_detections(path, options.prompts)


def evaluate_pictures(what: str | Path, reference: str | Path | None, options: EvaluationOptions) -> dict[str, Any]:
    """Measure the pictures of a folder, tars or a corpus, against others, statistics of a file, or their captions.

    Returns as `Evaluator.measure`.

    Raises:
        RequestError: the request is wrong; the message says how.
    """
    evaluator = Evaluator(reference, options)
    return evaluator.measure(open_set(what, "pictures", options.size, options.subset))


def save_statistics(what: str | Path, out: Path, features: str, options: EvaluationOptions) -> FeatureStatistics:
    """Write mean and covariance of the features of a set, as `--reference` takes them.

    Raises:
        RequestError: the request is wrong; the message says how.
    """
    options.check()
    pictures = open_set(what, "pictures", options.size, options.subset)
    statistics = Evaluator(None, replace(options, metrics=[])).features(features, pictures).statistics
    statistics.write(out)
    return statistics


def _known(extractor: Extractor, statistics: FeatureStatistics) -> FeatureSet:
    """Check that the statistics of a reference are of the features that a metric takes.

    Raises:
        RequestError: they are of others.
    """
    width = len(statistics.mean)
    if statistics.features and statistics.features != extractor.identity:
        raise RequestError(
            f"the reference's statistics are of the features {statistics.features!r}, and the metric takes "
            f"{extractor.identity!r}; make them anew with `microdit evaluate --save-statistics`"
        )
    if width != WIDTHS[extractor.name]:
        fitting = [name for name, other in WIDTHS.items() if other == width]
        raise RequestError(
            f"the reference's statistics are of {width} features, and {extractor.name} has {WIDTHS[extractor.name]}; "
            f"give statistics of {extractor.name}{f', or a metric of {fitting[0]}' if fitting else ''}"
        )
    return FeatureSet(known=statistics)


def _extract(extractor: Extractor, pictures: PictureSet) -> np.ndarray:
    """Compute the features (N, D) of a set, with a bar on a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(f"{extractor.name} of {pictures.where}", total=len(pictures))
        features = np.concatenate(list(extractor.extract(pictures.pixels(lambda: bar.advance(task)))))
    if not np.isfinite(features).all():
        raise RequestError(f"features {extractor.name!r}: the network gives NaN for some of {pictures.where}")
    return features


def _about(some: PictureSet | FeatureStatistics, where: str | Path | None) -> dict[str, Any]:
    if isinstance(some, FeatureStatistics):
        return {"statistics": str(where), "features": some.features, "count": some.count}
    height, width = some.shape
    return {"pictures": str(where), "count": len(some), "height": height, "width": width, "sha256": some.identity}


def write_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> Path:
    """Write `evaluation.json` into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    path.write_text(json.dumps(evaluation, indent=1) + "\n")
    return path
