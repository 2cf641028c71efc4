"""How much a source holds, told before it is read, and where that is known from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config import sources as given
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.estimate.past_build import Earlier
from microdit.pipeline.files.find import list_files
from microdit.pipeline.sources.registry import sources_of


@dataclass(frozen=True)
class Expected:
    """A source as a plan sees it."""

    units: int
    inputs: int
    origin: str
    """Where the numbers come from."""
    fetched: float | None = None
    """Bytes that are brought here; None if nobody says it."""
    failed: float = 0.0
    """The share of the inputs that ingest is expected to drop, where no earlier build says better."""
    unit_inputs: int | None = None
    """Of each unit but the last; None if they are about the same."""

    def shards(self, shard_samples: int) -> int:
        each = self.unit_inputs or math.ceil(self.inputs / self.units)
        whole, rest = divmod(self.inputs, each)
        return whole * math.ceil(each / shard_samples) + math.ceil(rest / shard_samples)


@dataclass(frozen=True)
class Dataset:
    """What is written about a dataset: by its publisher, or by those who counted."""

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


def expected(config: BuildConfig, earlier: Earlier | None, samples: Mapping[str, int]) -> dict[str, Expected]:
    """What each source of a config holds: as it was told, counted in a local list, written about it, or listed.

    Nothing but a source that is none of the first three asks the network for a listing.

    Args:
        samples: by source the number of inputs, as it was told; under "" for the one source that cannot say it.

    Raises:
        RequestError: nobody knows how many inputs a source has; a list or a file is not there.
    """
    for name in samples:
        if name and name not in config.sources:
            raise RequestError(f"--samples {name}=...: there is no such source; expected {', '.join(config.sources)}")
    found: dict[str, Expected] = {}
    unknown = []
    for name, options in config.sources.items():
        told = samples.get(name)
        one = _told(told, name, options, earlier) if told is not None else _known(name, options, config, earlier)
        if one is None:
            unknown.append(name)
        else:
            found[name] = one
    if unknown and "" in samples:
        if len(unknown) > 1:
            raise RequestError(
                f"--samples {samples['']}: {len(unknown)} sources do not say how many inputs they have; "
                f"give {' '.join(f'--samples {name}=N' for name in unknown)}"
            )
        name = unknown.pop()
        found[name] = _told(samples[""], name, config.sources[name], earlier)
    elif "" in samples:
        raise RequestError(f"--samples {samples['']}: every source says how many inputs it has; give --samples NAME=N")
    if unknown:
        raise RequestError(
            f"sources.{unknown[0]}: how many inputs it has is known only by reading it; "
            f"say how many you expect with --samples {unknown[0]}=N, or name a smaller build of it with --from CORPUS"
        )
    return {name: found[name] for name in config.sources}


def parse_samples(given: Sequence[str]) -> dict[str, int]:
    """`--samples`: N, or NAME=N, as `expected` takes them.

    Raises:
        RequestError: one is no number above 0, or is given twice.
    """
    found: dict[str, int] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or name in found:
            raise RequestError(f"--samples {text}: expected a number of inputs, or SOURCE=N, each source once")
        found[name] = int(number)
    return found


def _told(samples: int, name: str, options: Any, earlier: Earlier | None) -> Expected:
    each = earlier.inputs_of_a_unit(name) if earlier is not None else None
    cut = options.unit_inputs if isinstance(options, given.UrlsSource | given.OpenmojiSource) else None
    each = cut or each
    units = max(1, math.ceil(samples / each)) if each else 1
    return Expected(units, samples, "as it was told (--samples)", unit_inputs=cut)


def _known(name: str, options: Any, config: BuildConfig, earlier: Earlier | None) -> Expected | None:
    match options:
        case given.UrlsSource() | given.OpenmojiSource():
            stage = _source(name, config).stage()
            return Expected(stage["units"], stage["inputs"], "counted: its list", unit_inputs=options.unit_inputs)
        case given.Sa1bSource() if options.links is not None or _is_default(options, "files"):
            dropped = SA1B.failed if options.caption == "joined" and options.require_caption else 0.0
            return _chosen([SA1B], options, dropped)
        case given.Cc12mSource() if _is_default(options, "files"):
            return _chosen([CC12M], options)
        case given.JourneydbSource() if _is_default(options, "root"):
            sets = [JOURNEYDB[split] for split in options.splits]
            return _chosen(sets, options, sets[0].failed if options.require_caption else 0.0)
        case given.DiffusiondbSource() if _is_default(options, "root"):
            sets = [DIFFUSIONDB[options.subset]]
            scored = options.image_nsfw is not None or options.prompt_nsfw is not None
            return _chosen(sets, options, sets[0].failed if scored else 0.0)
        case given.TextcapsSource() if _is_default(options, "images"):
            return _chosen([Dataset(1, sum(TEXTCAPS[split] for split in options.splits))], options)
        case given.CocoSource() if _is_default(options, "images"):
            inputs = min(options.choose or COCO.inputs, COCO.inputs)
            return _chosen([Dataset(COCO.files, inputs, COCO.fetched)], options)
    return _listed(name, options, config, earlier)


def _is_default(options: Any, field: str) -> bool:
    default = type(options).model_fields[field].default
    return default is not None and getattr(options, field) == default


def _chosen(sets: list[Dataset], options: given.FileOptions, failed: float = 0.0) -> Expected:
    """What `units` and `limit` leave of a dataset."""
    files, inputs = sum(each.files for each in sets), sum(each.inputs for each in sets)
    wanted = len(options.units) if isinstance(options.units, list) else options.units or files
    units = min(wanted, files, options.limit or files)
    taken = round(inputs * units / files)
    known = [each.fetched for each in sets if each.fetched is not None]
    fetched = sum(known) * units / files if len(known) == len(sets) else None
    taken = min(taken, options.limit or taken)
    return Expected(units, taken, "written about the dataset", fetched, failed)


def _listed(name: str, options: Any, config: BuildConfig, earlier: Earlier | None) -> Expected | None:
    """Files of which we know only by listing: rows of local parquet files, or as many in a file as earlier."""
    each = earlier.inputs_of_a_unit(name) if earlier is not None else None
    pattern = getattr(options, "files", None)
    if isinstance(options, given.ParquetSource) and "://" not in str(pattern):
        files = list_files(str(pattern), f"sources.{name}.files").files
        try:
            rows = sum(pq.ParquetFile(Path(file.url)).metadata.num_rows for file in files)
        except (OSError, ValueError) as error:
            raise RequestError(f"sources.{name}.files = {pattern!r}: {error}") from None
        found = _chosen([Dataset(len(files), rows, sum(file.size or 0 for file in files))], options)
        return Expected(found.units, found.inputs, "counted: its files' rows", found.fetched)
    if each is None:
        return None
    units = len(_source(name, config).units())
    inputs = min(round(units * each), getattr(options, "limit", None) or round(units * each))
    return Expected(units, inputs, f"listed: {units:,} files, with {each:,.0f} inputs in each as in the earlier build")


def _source(name: str, config: BuildConfig) -> Any:
    return sources_of(config.model_copy(update={"sources": {name: config.sources[name]}}))[0]
