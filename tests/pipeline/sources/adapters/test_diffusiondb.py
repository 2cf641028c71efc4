"""DiffusionDB: parts of both sizes, prompts from the json in a zip, and the limits on the metadata."""

import json
from pathlib import Path

from microdit.pipeline.config.sources import DiffusiondbSource
from microdit.pipeline.sources.adapters.diffusiondb import Diffusiondb
from tests.pipeline.helpers.dataset_archives import by_key, empty, write_zip


def row(image: float | None, prompt: float | None, width: int = 512, height: int = 512) -> dict:
    return {"image_nsfw": image, "prompt_nsfw": prompt, "width": width, "height": height}


NAMES = ["safe", "edge", "unsafe", "blurred", "prompt", "unscored", "nan", "small", "unknown", "silent"]

TABLE = {
    "1/safe.webp": row(0.1, 0.0),
    "1/edge.webp": row(0.2, 0.2),
    "1/unsafe.webp": row(0.21, 0.0),
    "1/blurred.webp": row(2.0, 0.0),
    "1/prompt.webp": row(0.1, 0.9),
    "1/unscored.webp": row(None, 0.0),
    "1/nan.webp": row(float("nan"), 0.0),
    "1/small.webp": row(0.0, 0.0, 512, 192),
    "1/silent.webp": row(0.0, 0.0),
}


def source(root: Path, part: bytes | None = None, **options) -> Diffusiondb:
    about = {f"{name}.webp": {"p": f"a  {name}", "se": 7, "c": 7.5, "st": 50, "sa": "k_euler"} for name in NAMES}
    about["silent.webp"]["p"] = " "
    about["lost.webp"] = {"p": "not in the zip"}
    members = {f"{name}.webp": name.encode() for name in NAMES}
    members["part-000001.json"] = json.dumps(about).encode() if part is None else part
    write_zip(root / "diffusiondb-large-part-1/part-000001.zip", members)
    write_zip(root / "diffusiondb-large-part-2/part-010001.zip", {"part-010001.json": b"{}"})
    write_zip(root / "images/part-000001.zip", {"x.png": b"png", "part-000001.json": b'{"x.png": {"p": "two"}}'})
    empty(root / "metadata-large.parquet")
    empty(root / "metadata.parquet")
    return Diffusiondb("ddb", DiffusiondbSource(adapter="diffusiondb", root=str(root), **options), root, 256)


def test_what_is_taken_and_why_not(tmp_path: Path):
    large = source(tmp_path)
    assert large.units() == ["ddb-000000", "ddb-000001"]
    found = by_key(large, TABLE)
    assert {key: item.reason for key, item in found.items()} == {
        "safe": None,
        "edge": None,
        "unsafe": "nsfw",
        "blurred": "nsfw",
        "prompt": "nsfw",
        "unscored": "nsfw",
        "nan": "nsfw",
        "small": "too_small",
        "unknown": "no_scores",
        "silent": "no_caption",
        "lost": "missing",
    }
    assert all((item.data is None) == (item.reason is not None) for item in found.values())
    assert "blurred by" in found["blurred"].detail
    assert found["prompt"].detail == "prompt_nsfw is 0.9, at most 0.2 is taken"
    safe = found["safe"]
    assert (safe.data, safe.caption) == (b"safe", "a safe")
    assert safe.origin == "ddb/diffusiondb-large-part-1/part-000001.zip/safe.webp"
    assert safe.fields == {
        "image_nsfw": 0.1, "prompt_nsfw": 0.0, "seed": 7, "cfg": 7.5, "steps": 50, "sampler": "k_euler"
    }  # fmt: skip


def test_thresholds(tmp_path: Path):
    found = by_key(source(tmp_path, image_nsfw=1.0, prompt_nsfw=None), TABLE)
    assert [key for key, item in found.items() if item.reason == "nsfw"] == ["blurred", "unscored", "nan"]
    unfiltered = source(tmp_path, image_nsfw=None, prompt_nsfw=None)
    assert not unfiltered.tables()
    assert {item.reason for item in by_key(unfiltered).values()} == {None, "no_caption", "missing"}


def test_the_small_subset_is_png(tmp_path: Path):
    small = source(tmp_path, subset="2m")
    assert [spec.listing.files[0].name for spec in small.tables()] == ["metadata.parquet"]
    found = by_key(small, {"1/x.png": row(0.0, 0.0)})
    assert (found["x"].data, found["x"].caption) == (b"png", "two")


def test_a_part_whose_json_cannot_be_read(tmp_path: Path):
    for part in (b"{", b"[]", b""):
        found = by_key(source(tmp_path, part), TABLE)
        assert found["safe"].reason == "no_caption"
        assert found["safe"].detail.startswith("the part's json cannot be read")
