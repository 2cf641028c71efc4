"""The adapter `img2dataset`: its three formats, and shards that are not finished."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare
from microdit.pipeline.stages.stage import UnitTask
from tests.pipeline.helpers.dataset_archives import ingested, picture, write_tar

ROWS: list[dict[str, Any]] = [
    {"key": f"00000000{n}", "caption": f"caption {n}", "url": f"http://x/{n}", "status": "success", "width": n}
    for n in range(4)
]
ROWS[2] |= {"status": "failed_to_download", "caption": "never fetched"}


def write(folder: Path, form: str, rows: list[dict[str, Any]] = ROWS, shard: str = "00000") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    there = {row["key"]: picture(n) for n, row in enumerate(rows) if row["status"] == "success"}
    table = [row | ({"jpg": there.get(row["key"])} if form == "parquet" else {}) for row in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / f"{shard}.parquet")
    members = {f"{key}.jpg": data for key, data in there.items()}
    members |= {f"{row['key']}.json": json.dumps(row).encode() for row in rows if row["key"] in there}
    if form == "webdataset":
        write_tar(folder / f"{shard}.tar", dict(sorted(members.items())))
    elif form == "files":
        (folder / shard).mkdir()
        for name, data in members.items():
            (folder / shard / name).write_bytes(data)
    (folder / f"{shard}_stats.json").write_text("{}")


@pytest.mark.parametrize("form", ["webdataset", "parquet", "files"])
def test_each_format(tmp_path: Path, form: str) -> None:
    write(tmp_path / "in", form)
    write(tmp_path / "in", form, [row | {"key": f"1{row['key'][1:]}"} for row in ROWS], "00001")
    (tmp_path / "in" / "00001_stats.json").unlink()  # not finished
    images, captions = ingested(tmp_path, {"adapter": "img2dataset", "folder": str(tmp_path / "in")})
    assert [row["key"] for row in images] == ["000000000", "000000001", "000000003"]
    assert [row["caption"] for row in captions] == ["caption 0", "caption 1", "caption 3"]
    assert json.loads(images[1]["fields"]) == {"url": "http://x/1", "width": 1}


@pytest.mark.parametrize("form", ["webdataset", "parquet", "files"])
def test_an_image_that_the_table_has_alone_is_missing(tmp_path: Path, form: str) -> None:
    write(tmp_path / "in", form)
    rows = pq.read_table(tmp_path / "in" / "00000.parquet").to_pylist()
    rows.append({**ROWS[0], "key": "lost"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "00000.parquet")
    images, _ = ingested(tmp_path, {"adapter": "img2dataset", "folder": str(tmp_path / "in")})
    assert [(row["key"], row["reason"]) for row in images][3:] == [("lost", "missing")]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    with pytest.raises(RequestError, match=r"sources\.own\.folder = .*neither tars nor parquet tables"):
        ingested(tmp_path, {"adapter": "img2dataset", "folder": str(tmp_path / "in")})


@pytest.mark.parametrize("form", ["webdataset", "parquet", "files"])
def test_shards_that_are_finished_later_are_new_units_when_told(tmp_path: Path, form: str) -> None:
    config = BuildConfig.model_validate(
        {
            "name": "t", "corpus": str(tmp_path / "corpus"),
            "sources": {"own": {"adapter": "img2dataset", "folder": str(tmp_path / "in")}},
        }
    )  # fmt: skip
    corpus = Corpus.create(config.corpus, "t", 2048)

    def units(grow: bool = False) -> list[str]:
        [source] = sources_of(config)
        declare(corpus, config, [source], [], print, grow)
        with source.running(corpus, print):
            for unit in source.units():
                ingest_unit(corpus, source, UnitTask(unit), config)
        return [line["origin"].split("/")[1] for c in corpus.commits(IMAGES) for line in corpus.sidecar(c).to_pylist()]

    end = "tar" if form == "webdataset" else "parquet"
    for shard in ("00000", "00001", "00002"):
        write(tmp_path / "in", form, shard=shard)
    stats = tmp_path / "in" / "00001_stats.json"
    stats.unlink()
    assert units() == [f"0000{n}.{end}" for n in (0, 2) for _ in range(3)]
    stats.write_text("{}")
    assert len(units()) == 6
    assert units(grow=True) == [f"0000{n}.{end}" for n in (0, 2, 1) for _ in range(3)]
