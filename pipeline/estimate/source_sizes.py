"""Sizes of the sources before they are read, and the origin of each figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config import sources
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.estimate.past_build import PastBuild
from microdit.pipeline.files.find import list_files
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.sources.source import Source


@dataclass(frozen=True)
class SourceSize:
    """Size of a source: `inputs` in `units`."""

    units: int
    inputs: int
    origin: str
    """Origin of the numbers."""
    fetched: float | None = None
    """Bytes that are downloaded; None if unknown."""
    failed: float = 0.0
    """The share of the inputs that ingest is expected to drop, where no past build says better."""
    unit_inputs: int | None = None
    """Inputs of each unit but the last; None if all have about the same."""

    def shards(self, shard_samples: int) -> int:
        """Count the shards that the units are cut into."""
        each = self.unit_inputs or math.ceil(self.inputs / self.units)
        whole, rest = divmod(self.inputs, each)
        return whole * math.ceil(each / shard_samples) + math.ceil(rest / shard_samples)


@dataclass(frozen=True)
class Dataset:
    """Published or counted figures of a dataset."""

    files: int
    inputs: int
    fetched: float | None = None
    failed: float = 0.0


# SA-1B: 11,186 images and 11.3 GB in each of 51 tars that were counted; LLaVA's captions are of about 10 million.
# CC12M: the hub's counts; 504.1 GiB in 996 tars that were counted. JourneyDB: its card; 3.29 TB for 4.69 million.
# DiffusionDB: its card; of 14 million, 10 or 11 are left below the paper's NSFW scores. COCO: 6 GB, 40,504 images.
SA1B = Dataset(1_000, 11_185_362, 11.3e12, failed=0.106)
CC12M = Dataset(2_176, 10_968_539, 1.18e12)

JOURNEYDB = {
    "train": Dataset(200, 4_453_193, 3.12e12, failed=0.059),
    "valid": Dataset(200, 234_156, 0.164e12, failed=0.059),
}

DIFFUSIONDB = {"2m": Dataset(2_000, 2_000_000, 1.6e12, 0.25), "large": Dataset(14_000, 14_000_000, 6.5e12, 0.25)}
TEXTCAPS = {"train": 21_953, "val": 3_166}
COCO = Dataset(1, 40_504, 6e9)


def source_sizes(config: BuildConfig, past: PastBuild | None, samples: Mapping[str, int]) -> dict[str, SourceSize]:
    """Size each source of a config: as given, counted in a local list, from published figures, or listed.

    The network is asked for a listing only if none of the first three applies.

    Args:
        samples: given number of inputs by source; under "" for the one source of unknown size.

    Raises:
        RequestError: a source has an unknown number of inputs, or a list or file does not exist.
    """
    for name in samples:
        if name and name not in config.sources:
            raise RequestError(f"--samples {name}=...: there is no such source; expected {', '.join(config.sources)}")
    sizes: dict[str, SourceSize] = {}
    unknown = []
    for name, options in config.sources.items():
        if name in samples:
            sizes[name] = _as_given(samples[name], name, options, past)
        elif (size := _known(name, options, config, past)) is not None:
            sizes[name] = size
        else:
            unknown.append(name)
    if unknown and "" in samples:
        if len(unknown) > 1:
            raise RequestError(
                f"--samples {samples['']}: {len(unknown)} sources do not say how many inputs they have; "
                f"give {' '.join(f'--samples {name}=N' for name in unknown)}"
            )
        name = unknown.pop()
        sizes[name] = _as_given(samples[""], name, config.sources[name], past)
    elif "" in samples:
        raise RequestError(f"--samples {samples['']}: every source says how many inputs it has; give --samples NAME=N")
    if unknown:
        raise RequestError(
            f"sources.{unknown[0]}: how many inputs it has is known only by reading it; "
            f"say how many you expect with --samples {unknown[0]}=N, or name a smaller build of it with --from CORPUS"
        )
    return {name: sizes[name] for name in config.sources}


def parse_samples(texts: Sequence[str]) -> dict[str, int]:
    """Parse `--samples`: N, or NAME=N, as `source_sizes` takes them.

    Raises:
        RequestError: one is no number above 0, or is given twice.
    """
    samples: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or name in samples:
            raise RequestError(f"--samples {text}: expected a number of inputs, or SOURCE=N, each source once")
        samples[name] = int(number)
    return samples


def _as_given(samples: int, name: str, options: sources.SourceOptions, past: PastBuild | None) -> SourceSize:
    """Size of a source whose number of inputs is given; its units are as large as they were in the past build."""
    cut = options.unit_inputs if isinstance(options, sources.UrlsSource | sources.OpenmojiSource) else None
    each = cut or (past.inputs_of_a_unit(name) if past is not None else None)
    units = max(1, math.ceil(samples / each)) if each else 1
    return SourceSize(units, samples, "as given (--samples)", unit_inputs=cut)


def _known(name: str, options: sources.SourceOptions, config: BuildConfig, past: PastBuild | None) -> SourceSize | None:
    """Count a source in its list, take the published figures of its dataset, or list its files; None if unknown."""
    match options:
        case sources.UrlsSource() | sources.OpenmojiSource():
            declared = _source(name, config).stage()
            return SourceSize(
                declared["units"], declared["inputs"], "counted: its list", unit_inputs=options.unit_inputs
            )
        case sources.Sa1bSource() if options.links is not None or _is_default(options, "files"):
            dropped = SA1B.failed if options.caption == "joined" and options.require_caption else 0.0
            return _chosen([SA1B], options, dropped)
        case sources.Cc12mSource() if _is_default(options, "files"):
            return _chosen([CC12M], options)
        case sources.JourneydbSource() if _is_default(options, "root"):
            sets = [JOURNEYDB[split] for split in options.splits]
            return _chosen(sets, options, sets[0].failed if options.require_caption else 0.0)
        case sources.DiffusiondbSource() if _is_default(options, "root"):
            sets = [DIFFUSIONDB[options.subset]]
            scored = options.image_nsfw is not None or options.prompt_nsfw is not None
            return _chosen(sets, options, sets[0].failed if scored else 0.0)
        case sources.TextcapsSource() if _is_default(options, "images"):
            return _chosen([Dataset(1, sum(TEXTCAPS[split] for split in options.splits))], options)
        case sources.CocoSource() if _is_default(options, "images"):
            inputs = min(options.choose or COCO.inputs, COCO.inputs)
            return _chosen([Dataset(COCO.files, inputs, COCO.fetched)], options)
    expected = getattr(options, "expected", None)
    if expected is not None:
        return _chosen([Dataset(expected.files, expected.inputs, expected.bytes)], options)
    return _listed(name, options, config, past)


def _is_default(options: sources.FileOptions, field: str) -> bool:
    default = type(options).model_fields[field].default
    return default is not None and getattr(options, field) == default


def _chosen(sets: list[Dataset], options: sources.FileOptions, failed: float = 0.0) -> SourceSize:
    """Return the part of a dataset that `units` and `limit` take."""
    files, inputs = sum(each.files for each in sets), sum(each.inputs for each in sets)
    wanted = len(options.units) if isinstance(options.units, list) else options.units or files
    units = min(wanted, files, options.limit or files)
    taken = round(inputs * units / files)
    known = [each.fetched for each in sets if each.fetched is not None]
    fetched = sum(known) * units / files if len(known) == len(sets) else None
    taken = min(taken, options.limit or taken)
    return SourceSize(units, taken, "written about the dataset", fetched, failed)


def _listed(
    name: str, options: sources.SourceOptions, config: BuildConfig, past: PastBuild | None
) -> SourceSize | None:
    """List the files of a source: rows of local parquet files, or as many inputs in each file as in the past build."""
    each = past.inputs_of_a_unit(name) if past is not None else None
    pattern = getattr(options, "files", None)
    if isinstance(options, sources.ParquetSource) and "://" not in str(pattern):
        files = list_files(str(pattern), f"sources.{name}.files").files
        try:
            rows = sum(pq.ParquetFile(Path(file.url)).metadata.num_rows for file in files)
        except (OSError, ValueError) as error:
            raise RequestError(f"sources.{name}.files = {pattern!r}: {error}") from None
        chosen = _chosen([Dataset(len(files), rows, sum(file.size or 0 for file in files))], options)
        return SourceSize(chosen.units, chosen.inputs, "counted: its files' rows", chosen.fetched)
    if each is None:
        return None
    units = len(_source(name, config).units())
    inputs = min(round(units * each), getattr(options, "limit", None) or round(units * each))
    return SourceSize(
        units, inputs, f"listed: {units:,} files, with {each:,.0f} inputs in each as in the earlier build"
    )


def _source(name: str, config: BuildConfig) -> Source:
    return sources_of(config.model_copy(update={"sources": {name: config.sources[name]}}))[0]
