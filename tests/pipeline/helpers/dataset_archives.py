"""Small archives, and sources of them with dictionaries as tables, for tests of the adapters."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import Task, UnitTask


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def empty(path: Path) -> Path:
    """Make an empty file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def read_all(source: FileSource, *tables: Mapping[str, dict[str, Any]]) -> list[Input]:
    """Read all inputs, with these tables instead of those that a build makes."""
    source._joined = list(tables)  # type: ignore[arg-type]
    return [item for unit in source.units() for item in source.read(unit, lambda ordinal: True)]


def by_key(source: FileSource, *tables: Mapping[str, dict[str, Any]]) -> dict[str, Input]:
    found = read_all(source, *tables)
    assert len({item.key for item in found}) == len(found)
    return {item.key: item for item in found}


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def ingested(
    folder: Path, source: dict[str, Any], column: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Build one source without the driver; return the rows of its images, and of `captions/source`."""
    given = {"name": "tried", "corpus": str(folder / "corpus"), "shard_samples": 4, "sources": {"own": source}}
    given |= {"images": {"min_side": 32}, "columns": {"captions/source": column or {}}}
    config = BuildConfig.model_validate({**given, "resources": {"scratch": str(folder / "scratch")}})
    corpus = Corpus.create(str(folder / "corpus"), "tried", 4)
    sources, stages = sources_of(config), stages_of(config)
    declare(corpus, config, sources, stages)
    images: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    with sources[0].running(corpus, print):
        for unit in sources[0].units():
            ingest_unit(corpus, pickle.loads(pickle.dumps(sources[0])), UnitTask(unit), config)
    for commit in sorted(corpus.commits(IMAGES), key=lambda commit: commit.ref.shard):
        images += corpus.sidecar(commit).to_pylist()
        for made in stages[0].run(corpus, Task(commit.ref, {"captions/source": 0})):
            captions += corpus.sidecar(made).to_pylist()
    return images, captions
