"""Folders of pictures against folders and statistics files; wrong requests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.evaluate import EvaluationOptions, evaluate_pictures, save_statistics
from microdit.pipeline.evaluation.statistics import FeatureStatistics
from tests.model.pretrained.test_vision import picture
from tests.model.pretrained.vision_models import clip_model

pytest.importorskip("efficientnet_lite_pytorch")
LITE = EvaluationOptions(["fid-lite", "kid-lite"])


def folder(path: Path, seeds: range, tint: int = 0) -> Path:
    """Pictures of 48 x 48, each with its caption as a PNG's text."""
    path.mkdir()
    for seed in seeds:
        pixels = (picture(seed, 48, 48) + np.array([tint, 0, -tint])).clip(0, 255).astype(np.uint8)
        info = PngInfo()
        info.add_itxt("prompt", f"picture {seed}")
        Image.fromarray(pixels).save(path / f"{seed:04}.png", pnginfo=info)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    return {
        "first": folder(root / "first", range(24)),
        "other": folder(root / "other", range(100, 124)),
        "tinted": folder(root / "tinted", range(200, 224), tint=90),
    }


def test_like_pictures_are_nearer_than_unlike_ones(sets: dict[str, Path]) -> None:
    like = evaluate_pictures(sets["first"], sets["other"], LITE)["metrics"]
    unlike = evaluate_pictures(sets["tinted"], sets["other"], LITE)["metrics"]
    for name in LITE.metrics:
        assert unlike[name]["value"] > like[name]["value"] + 3 * unlike[name]["error"], (name, like, unlike)
    assert abs(like["kid-lite"]["value"]) < 4 * like["kid-lite"]["error"]
    assert unlike["kid-lite"]["subset"] == 24 and unlike["kid-lite"]["subsets"] == 1


def test_statistics_stand_for_the_pictures_that_they_are_of(sets: dict[str, Path], tmp_path: Path) -> None:
    options = EvaluationOptions(["fid-lite"])
    save_statistics(sets["other"], tmp_path / "other.npz", "lite0", options)
    by_file = evaluate_pictures(sets["first"], tmp_path / "other.npz", options)
    by_folder = evaluate_pictures(sets["first"], sets["other"], options)
    assert by_file["metrics"]["fid-lite"]["value"] == pytest.approx(by_folder["metrics"]["fid-lite"]["value"], rel=1e-6)
    assert by_file["reference"]["count"] == 24 and by_file["reference"]["features"].startswith("lite0 ")
    with np.load(tmp_path / "other.npz") as arrays:  # as others write them
        np.savez(tmp_path / "plain.npz", ref_mu=arrays["mu"], ref_sigma=arrays["sigma"])
    plain = evaluate_pictures(sets["first"], tmp_path / "plain.npz", options)
    assert plain["metrics"] == by_file["metrics"]


def test_everything_that_matters_is_said(sets: dict[str, Path]) -> None:
    found = evaluate_pictures(sets["first"], sets["other"], EvaluationOptions(["fid-lite"], size=32))
    assert found["pictures"]["count"] == 24 and found["pictures"]["height"] == 32 and found["size"] == 32
    assert len(found["pictures"]["sha256"]) == 64 and "sha256" in found["features"]["lite0"]
    assert json.loads(json.dumps(found)) == found


def test_captions_are_the_texts_of_the_pictures_or_beside_them(sets: dict[str, Path], tmp_path: Path) -> None:
    options = EvaluationOptions(["clip-score-mlperf"], models={"clip-score-mlperf": clip_model(tmp_path / "clip")})
    own = evaluate_pictures(sets["first"], None, options)["metrics"]["clip-score-mlperf"]
    beside = tmp_path / "beside"
    beside.mkdir()
    for path in sets["first"].iterdir():
        with Image.open(path) as image:
            (beside / f"{path.stem}.txt").write_text(image.info["prompt"] + "\n")
            image.copy().save(beside / path.name, pnginfo=PngInfo())
    assert evaluate_pictures(beside, None, options)["metrics"]["clip-score-mlperf"] == own
    (beside / "0007.txt").unlink()
    with pytest.raises(RequestError, match=r"0007\.png: it has no caption; expected 0007\.txt beside it"):
        evaluate_pictures(beside, None, options)


def test_wrong_requests_have_one_message_each(sets: dict[str, Path], tmp_path: Path) -> None:
    few, empty, mixed, clear, large = (tmp_path / name for name in ("few", "empty", "mixed", "clear", "large"))
    folder(few, range(5))
    empty.mkdir()
    folder(mixed, range(24))
    Image.new("RGB", (20, 30)).save(mixed / "0003.png")
    folder(clear, range(24))
    Image.new("RGBA", (48, 48), (255, 0, 0, 100)).save(clear / "0003.png")
    large.mkdir()
    for i in range(24):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(large / f"{i}.png")
    statistics = tmp_path / "statistics.npz"
    FeatureStatistics(np.zeros(2048), np.eye(2048)).write(statistics)
    other = tmp_path / "other.npz"
    FeatureStatistics(np.zeros(1280), np.eye(1280), "lite0 of another day").write(other)
    first = sets["first"]
    cases: list[tuple[Path, Path | None, list[str], str]] = [
        (first, few, ["kid-lite"], r"metric 'kid-lite': 5 pictures of the reference; it takes at least 20"),
        (empty, first, ["fid-lite"], "pictures .*empty: it holds no pictures; expected files in .png"),
        (tmp_path / "none", first, ["fid-lite"], "there is no such folder"),
        (mixed, first, ["fid-lite"], r"0000.png has 48 x 48 pixels and 0003.png 20 x 30; give --size N"),
        (clear, first, ["fid-lite"], "0003.png: it has transparency"),
        (first, large, ["fid-lite"], "pictures of 48x48 pixels and a reference of 64x64; give --size N"),
        (first, None, ["fid-lite"], "metric 'fid-lite': what is compared with"),
        (first, statistics, ["kid-lite"], "it needs the reference's pictures, and a statistics file holds"),
        (first, statistics, ["fid-lite"], "are of 2048 features, and lite0 has 1280; give statistics of lite0, or a"),
        (first, other, ["fid-lite"], "are of the features 'lite0 of another day', and the metric takes 'lite0 "),
        (first, first, ["fld"], "metric 'fld' is not known; there are fid, kid"),
    ]
    for what, reference, metrics, message in cases:
        with pytest.raises(RequestError, match=message):
            evaluate_pictures(what, reference, EvaluationOptions(metrics))


def test_a_damaged_picture_is_named(sets: dict[str, Path], tmp_path: Path) -> None:
    folder(tmp_path / "some", range(24))
    path = tmp_path / "some" / "0005.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RequestError, match=r"0005\.png: .*; a set is measured whole, so mend or remove it"):
        evaluate_pictures(tmp_path / "some", sets["first"], EvaluationOptions(["fid-lite"]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, "it has the keys mean; expected an .npz file with mu/sigma or ref_mu/ref_sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 3))}, r"a covariance of shape \(2, 3\); expected"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not all finite"),
        ({"mu": np.array(["a"]), "sigma": np.zeros((1, 1))}, "of floats"),
    ],
)
def test_files_that_hold_no_statistics_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(RequestError, match=message):
        FeatureStatistics.read(tmp_path / "file.npz")


def test_statistics_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", mu=np.array([{}], object), sigma=np.zeros((1, 1)))
    with pytest.raises(RequestError, match="cannot be read"):
        FeatureStatistics.read(tmp_path / "file.npz")
    (tmp_path / "file.npz").write_bytes(b"no archive")
    with pytest.raises(RequestError, match="cannot be read"):
        FeatureStatistics.read(tmp_path / "file.npz")
