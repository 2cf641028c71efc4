"""Data sets as people have them: every picture is a row, and no caption is at a wrong one."""

import shutil
from pathlib import Path
from typing import Any

from tests.pipeline.helpers.dataset_archives import ingested

CASES = Path(__file__).parents[2] / "data" / "cases" / "sources"
NUMBERED_TWICE = CASES / "T-two-img2dataset-folders-same-keys"


def built(folder: Path, case: Path, **options: Any) -> dict[str, tuple[str | None, str | None]]:
    """Build a folder of tars; return the caption of each picture, or why it or its caption failed, by its origin."""
    source = {"adapter": "webdataset", "files": str(case / "**" / "*.tar"), **options}
    images, captions = ingested(folder, source)
    reasons = [image["reason"] or text["reason"] for image, text in zip(images, captions, strict=True)]
    origins = [image["origin"].removeprefix("own/") for image in images]
    texts = [text["caption"] for text in captions]
    assert len(set(origins)) == len(origins)
    return dict(zip(origins, zip(texts, reasons, strict=True), strict=True))


def test_tables_beside_tars_are_joined_to_those_alone(tmp_path: Path) -> None:
    join = {"file": str(NUMBERED_TWICE / "*" / "*.parquet"), "key": "key", "fields": {"long": "caption"}}
    source = {"adapter": "webdataset", "files": str(NUMBERED_TWICE / "*" / "*.tar"), "joins": [join]}
    images, _ = ingested(tmp_path / "a", source)
    assert [image["fields"] for image in images] == [
        f'{{"long": "folder {folder} caption {n}"}}' for folder in "ab" for n in range(3)
    ]
    images, _ = ingested(tmp_path / "b", source | {"joins": [{**join, "rows_of": "all"}]})
    assert [image["fields"] for image in images] == [""] * 6


def test_a_table_that_lies_elsewhere_is_of_all_tars(tmp_path: Path) -> None:
    shutil.copytree(NUMBERED_TWICE / "a", tmp_path / "a")
    shutil.copytree(NUMBERED_TWICE / "b", tmp_path / "b")
    (tmp_path / "captions.parquet").write_bytes((NUMBERED_TWICE / "a" / "00000.parquet").read_bytes())
    join = {"file": str(tmp_path / "captions.parquet"), "key": "key", "fields": {"long": "caption"}}
    source = {"adapter": "webdataset", "files": str(tmp_path / "a" / "*.tar"), "joins": [join]}
    images, _ = ingested(tmp_path / "out", source)
    assert [image["fields"] for image in images] == [f'{{"long": "folder a caption {n}"}}' for n in range(3)]
