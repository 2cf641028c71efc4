"""What the tests of `microdit convert` share: MDS folders that Streaming wrote, others, and what is in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from microdit.pipeline.cli.app import app
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.mds.columns import Naming
from microdit.pipeline.mds.format import MdsWriter, open_shard, read_index
from microdit.pipeline.mds.to_corpus import to_corpus
from tests.data.mds import make

ROOT = Path(__file__).parents[3]
OFFICIAL, WORKERS = ROOT / "tests/data/mds/official", ROOT / "tests/data/mds/workers"
SMALL = Naming("small", text_shape=(77, 8))
TEXT = "text/dfn-clip-h@source"
COLUMNS = [IMAGES, "captions/source", TEXT, "latents/sdxl-64", "latents/sdxl-128"]
Sample = dict[str, Any]


def all_samples(kind: str) -> list[Sample]:
    return [sample for worker in range(len(make.COUNTS[kind])) for sample in make.samples(kind, worker)]


def arrays(corpus: Corpus, column: str) -> list[np.ndarray]:
    rows = [row for commit in corpus.commits(column) for row in read_rows(corpus, commit)]
    return [array_from_bytes(row.members["npy"]) for row in rows if row.ok]


def write(folder: Path, samples: list[Mapping[str, Any]], size_limit: int = 1 << 20, **encodings: str) -> Path:
    """An MDS folder of samples with small arrays, or with bytes in their place."""
    folder.mkdir(parents=True)
    columns = {"caption": "str", **dict.fromkeys(make.SIZES["workers"], "bytes")} | encodings
    writer = MdsWriter(folder, columns, size_limit=size_limit)
    for sample in samples:
        writer.write(
            {k: v if isinstance(v, bytes) else make.encoded({k: v})[k] for k, v in sample.items() if k in columns}
        )
    writer.close()
    return folder


def read_mds(folder: Path) -> list[dict[str, bytes]]:
    found = []
    for info in read_index(folder):
        with open_shard(folder, info) as shard:
            names = info.column_names
            found += [dict(zip(names, shard.read(i, names), strict=True)) for i in range(info.samples)]
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def microdit(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus of `workers`: eight samples in five units, without pictures. Not to be changed."""
    url = tmp_path_factory.mktemp("small") / "corpus"
    to_corpus(WORKERS, str(url), SMALL, threads=2)
    return Corpus.open(url)
