"""Every stage on a small corpus: what it writes, what it passes on, and what it does with what it cannot use."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps

from model.autoencoder import load_autoencoder
from model.text import load_text_encoder
from pipeline.config import BuildConfig
from pipeline.corpus import Commit, Corpus
from pipeline.errors import RequestError
from pipeline.images import decode, resize
from pipeline.joins import build
from pipeline.shards import array_from_bytes, read_tar
from pipeline.sources import Input
from pipeline.stages import Stage, Task, UnitTask, latest, read_rows, stages_of
from pipeline.stages.captions import Captions
from pipeline.stages.ingest import SCALARS, ingest_unit
from pipeline.stages.latents import seed_of, square
from pipeline.stages.models import Batches, autoencoder_identity
from pipeline.stages.scores import basic_scores, perceptual_hash

SHARD = 8
CAPTIONS = [
    "a red apple",
    "",
    "two  words",
    "a much longer caption with a good many words in it",
    "five",
    "x",
    "y",
    "z",
]


def photo(seed: int, size: tuple[int, int] = (72, 64)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


class Photos:
    """Twelve photos, the third one of them missing and the fifth one broken."""

    name = "photos"
    terms = "made for a test"

    def read(self, unit: str, wanted) -> Generator[Input]:
        for i in range(12):
            data: bytes | None = saved(photo(i, (72 + i, 64 + 3 * i)))
            if i == 4:
                data = b"broken"
            reason = "http_404" if i == 2 else None
            caption = CAPTIONS[i % len(CAPTIONS)]
            fields = {0: {}, 1: {"long": f"a long one of {i}"}, 2: {"long": i}}[i % 3]
            yield Input(i, f"k{i}", None if reason else data, f"http://x/{i}.jpg", caption, "", fields, reason)

    def stage(self) -> dict:
        return {"adapter": "photos"}

    def units(self) -> list[str]:
        return ["photos-000000"]

    def running(self, corpus, say):
        return nullcontext()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    """A random autoencoder of the real class, f8 with 4 channels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return str(folder)


def config(root: Path, columns: dict, **more) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "name": "tried",
            "corpus": str(root),
            "shard_samples": SHARD,
            "sources": {"photos": {"adapter": "urls", "list": "not read"}},
            "images": {"min_side": 32, "format": "png"},
            "columns": columns,
            **more,
        }
    )


def start(root: Path) -> Corpus:
    corpus = Corpus.create(root, "tried", SHARD)
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("photos", {"adapter": "photos"})
    ingest_unit(corpus, Photos(), UnitTask("photos-000000"), config(root, {}))
    return corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return start(tmp_path / "corpus")


def make(corpus: Corpus, columns: dict, **more) -> dict[str, list[Commit]]:
    """Declare and run the columns' stages in the order of the config; the commits by column."""
    made: dict[str, list[Commit]] = {}
    for stage in stages_of(config(Path(corpus.url), columns, **more)):
        for column, spec in stage.columns.items():
            corpus.declare_column(column, spec.stage, spec.scalars)
        if isinstance(stage, Captions) and stage.table is not None:
            build(corpus, stage.table, Path(corpus.url) / "scratch", print)
        worker: Stage = pickle.loads(pickle.dumps(stage))  # as it comes to a worker
        worker.load()
        for images in corpus.commits("images"):
            for commit in worker.run(corpus, Task(images.ref, dict.fromkeys(stage.columns, 0))):
                made.setdefault(commit.column, []).append(commit)
    return made


def lines(corpus: Corpus, commits: list[Commit]) -> list[dict]:
    return [line for commit in commits for line in corpus.sidecar(commit).to_pylist()]


def arrays(corpus: Corpus, commits: list[Commit]) -> dict[str, np.ndarray]:
    found = {}
    for commit in commits:
        with corpus.open_object(commit) as file:
            found |= {key: array_from_bytes(members["npy"]) for key, members in read_tar(file)}
    return found


def check_rows(corpus: Corpus, commits: list[Commit], inputs: str) -> None:
    """Every row is there, those that failed in the input with `upstream`, and the lineage is the input's."""
    assert [c.shard for c in commits] == ["photos-000000-00", "photos-000000-01"]
    before = lines(corpus, [latest(corpus, inputs, c.ref) for c in commits])
    after = lines(corpus, commits)
    assert [(line["row"], line["key"]) for line in after] == [(line["row"], line["key"]) for line in before]
    for old, new in zip(before, after, strict=True):
        assert (new["reason"] == "upstream") is (old["status"] == "failed")
        if old["status"] == "failed":
            assert inputs in new["detail"] and old["reason"] in new["detail"]
    for commit in commits:
        assert commit.inputs == [latest(corpus, inputs, commit.ref).as_input()]
        assert commit.fingerprint == corpus.column(commit.column).fingerprint
        assert commit.counts["in"] == commit.counts["out"] + commit.counts["failed"]


# -- captions --------------------------------------------------------------------------------------------------------


def test_the_caption_that_came_with_the_image(corpus: Corpus):
    made = make(corpus, {"captions/source": {}})["captions/source"]
    check_rows(corpus, made, "images")
    found = {line["key"]: line for line in lines(corpus, made)}
    assert (found["k0"]["caption"], found["k0"]["tokens"]) == ("a red apple", 3)
    assert (found["k10"]["caption"], found["k10"]["tokens"]) == ("two  words", 2)
    assert (found["k1"]["reason"], found["k1"]["caption"]) == ("no_caption", None)


def test_a_field_as_the_caption_and_the_caption_in_its_place(corpus: Corpus):
    columns = {"captions/long": {"field": "long"}, "captions/any": {"field": "long", "fallback": True}}
    made = make(corpus, columns)
    check_rows(corpus, made["captions/long"], "images")
    found, either = ({line["key"]: line for line in lines(corpus, made[name])} for name in columns)
    assert found["k1"]["caption"] == either["k1"]["caption"] == "a long one of 1"
    assert {found[key]["reason"] for key in ("k0", "k5", "k8")} == {"no_caption"}  # no field, or no text in it
    assert either["k0"]["caption"] == "a red apple"
    stages = stages_of(config(Path(corpus.url), {**columns, "captions/source": {}}))
    assert len({str(stage.columns[stage.name].stage) for stage in stages}) == 3


@pytest.mark.parametrize("by", ["key", "origin"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_captions_from_a_table(tmp_path: Path, corpus: Corpus, by: str, kind: str):
    name = {"key": "key", "origin": "url"}[by]
    rows = [
        {name: f"k{i}" if by == "key" else f"http://x/{i}.jpg", "caption": f"long {i}", "more": i} for i in range(6)
    ]
    rows += [{name: rows[0][name], "caption": "a second one", "more": 0}, {name: "unknown", "caption": "no", "more": 0}]
    rows[1]["caption"] = "  "
    table = tmp_path / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = make(corpus, {"captions/long": {"join": str(table), "by": by}})["captions/long"]
    check_rows(corpus, made, "images")
    found = {line["key"]: line for line in lines(corpus, made)}
    assert {key: line["caption"] for key, line in found.items() if line["status"] == "ok"} == {
        "k0": "long 0", "k3": "long 3", "k5": "long 5",
    }  # fmt: skip
    assert {key for key, line in found.items() if line["reason"] == "no_caption"} == {
        "k1", "k6", "k7", "k8", "k9", "k10", "k11",
    }  # fmt: skip


def test_another_table_is_another_column(tmp_path: Path, corpus: Corpus):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"key": "k0", "caption": name}))
    stages = [
        stages_of(config(tmp_path, {"captions/x": {"join": str(tmp_path / f"{name}.jsonl"), "by": "key"}}))[0]
        for name in ("a", "b")
    ]
    assert stages[0].columns["captions/x"].stage != stages[1].columns["captions/x"].stage
    # where the table lies, and what it is called, is no part of what it says
    (tmp_path / "c.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    moved = stages_of(config(tmp_path, {"captions/x": {"join": str(tmp_path / "c.jsonl"), "by": "key"}}))[0]
    assert moved.columns == stages[0].columns


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.jsonl", b'{"key": "k0", "text": "x"}\n', "there is no column 'caption'; it has key, text"),
        ("t.jsonl", b"no json\n", r"columns\.captions/x\.join: nothing in t\.jsonl can be read; no_json: line 1"),
        ("t.jsonl", b"\xff\xfe\n", r"columns\.captions/x\.join: nothing in t\.jsonl can be read; no_json: line 1"),
        ("t.jsonl", b"[" * 100_000, r"columns\.captions/x\.join: nothing in t\.jsonl can be read; no_json: line 1"),
        ("t.parquet", b"no parquet", "cannot be read as Parquet"),
        ("t.csv", b"key,caption", r"t\.csv is no table; expected one of \.parquet, \.jsonl"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, corpus: Corpus, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=words):
        make(corpus, {"captions/x": {"join": str(tmp_path / name), "by": "key"}})


def test_a_parquet_table_without_the_columns(tmp_path: Path, corpus: Corpus):
    pq.write_table(pa.table({"id": ["k0"], "about": [{"text": "x"}]}), tmp_path / "t.parquet")
    join = {"join": str(tmp_path / "t.parquet")}
    with pytest.raises(RequestError, match="there is no column 'url'; it has id, about"):
        make(corpus, {"captions/x": join})
    made = make(corpus, {"captions/y": {**join, "by": "key", "key": "id", "column": "about.text"}})["captions/y"]
    assert {line["key"]: line["caption"] for line in lines(corpus, made) if line["status"] == "ok"} == {"k0": "x"}


def test_a_table_that_changed_after_the_declaration(tmp_path: Path, corpus: Corpus):
    table = tmp_path / "t.jsonl"
    table.write_text('{"key": "k0", "caption": "one"}\n')
    make(corpus, columns := {"captions/x": {"join": str(table), "by": "key"}})
    table.write_text('{"key": "k0", "caption": "two"}\n')
    with pytest.raises(RequestError, match="captions/x"):
        make(corpus, columns)


def test_a_caption_is_cleaned_where_that_is_asked_for(corpus: Corpus):
    made = make(corpus, {"captions/clean": {"clean": "paper"}})["captions/clean"]
    found = {line["key"]: line for line in lines(corpus, made)}
    assert found["k10"]["caption"] == "two words"
    assert found["k1"]["reason"] == "no_caption"


def test_a_table_that_is_not_there(tmp_path: Path):
    with pytest.raises(RequestError, match=r"columns\.captions/x\.join = .*none\.jsonl"):
        stages_of(config(tmp_path, {"captions/x": {"join": str(tmp_path / "none.jsonl")}}))
    with pytest.raises(RequestError, match="no source with the adapter openmoji"):
        stages_of(config(tmp_path, {"captions/x": {"join": "openmoji"}}))


# -- scores ----------------------------------------------------------------------------------------------------------


def test_scores_of_a_corpus(corpus: Corpus):
    made = make(corpus, {"scores/basic": {}})["scores/basic"]
    check_rows(corpus, made, "images")
    found = {line["key"]: line for line in lines(corpus, made)}
    image = photo(3, (75, 73))
    assert (found["k3"]["width"], found["k3"]["height"]) == (75, 73)
    assert found["k3"]["aspect"] == pytest.approx(75 / 73)
    assert found["k3"]["pixels_sha256"] == hashlib.sha256(b"75x73:" + np.asarray(image).tobytes()).hexdigest()
    assert len({line["phash"] for line in found.values() if line["phash"]}) == 10
    assert all(line["sharpness"] > 0 and 0 < line["entropy"] <= 8 for line in found.values() if line["status"] == "ok")


def test_scores_of_known_pictures():
    flat = basic_scores(np.full((40, 60, 3), 77, np.uint8))
    assert (flat["entropy"], flat["sharpness"], flat["aspect"]) == (0.0, 0.0, 1.5)
    assert (flat["red"], flat["green"], flat["blue"]) == (77.0, 77.0, 77.0)
    halves = np.zeros((40, 60, 3), np.uint8)
    halves[:, 30:] = 255
    assert basic_scores(halves)["entropy"] == pytest.approx(1.0)
    # the Laplacian of a checkerboard of single pixels is 4 * 255 with changing sign
    board = np.indices((16, 16)).sum(0) % 2 * 255
    assert basic_scores(np.repeat(board[..., None], 3, 2).astype(np.uint8))["sharpness"] == pytest.approx(1020.0**2)
    assert basic_scores(np.zeros((1, 1, 3), np.uint8))["sharpness"] == 0.0


def test_sharpness_falls_with_blur_and_knows_no_size():
    sharp = photo(0, (600, 450))
    blurred = sharp.resize((60, 45)).resize((600, 450), Image.Resampling.BICUBIC)
    large = photo(0, (1200, 900))
    values = [basic_scores(np.asarray(image))["sharpness"] for image in (sharp, blurred, large)]
    assert values[1] < values[0]
    assert values[2] == pytest.approx(values[0], rel=0.4)  # and not a sixteenth of it


def test_equal_pixels_are_found_in_any_lossless_format():
    image = photo(5)
    found = [basic_scores(decode(data, 10**6).pixels) for data in (
        saved(image), saved(image, "WEBP", lossless=True), saved(image, "BMP"), saved(image, "PNG", compress_level=0)
    )]  # fmt: skip
    assert len({scores["pixels_sha256"] for scores in found}) == 1
    turned = basic_scores(np.asarray(image).transpose(1, 0, 2))
    assert turned["pixels_sha256"] != found[0]["pixels_sha256"]


def hamming(a: str, b: str) -> int:
    assert len(a) == len(b) == 16
    return (int(a, 16) ^ int(b, 16)).bit_count()


def test_the_perceptual_hash_knows_a_picture_again():
    hashes = [perceptual_hash(photo(seed, (300, 200)).convert("L")) for seed in range(20)]
    distances = [hamming(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 10
    assert 26 < np.mean(distances) < 38
    for seed, known in enumerate(hashes):
        image = photo(seed, (300, 200))
        for other in (
            Image.open(io.BytesIO(saved(image, "JPEG", quality=40))),
            image.resize((150, 100), Image.Resampling.BICUBIC),
            image.point(lambda value: int(value * 0.8)),
        ):
            assert hamming(known, perceptual_hash(other.convert("L"))) <= 8
    drawing = ImageOps.mirror(half := photo(9, (150, 200)))
    symmetric = Image.new("RGB", (300, 200))
    symmetric.paste(half, (0, 0))
    symmetric.paste(drawing, (150, 0))
    again = Image.open(io.BytesIO(saved(symmetric, "JPEG", quality=80)))
    assert hamming(*(perceptual_hash(image.convert("L")) for image in (symmetric, again))) <= 1
    flat = [perceptual_hash(Image.new("L", size, 200)) for size in ((64, 64), (300, 10))]
    assert flat[0] == flat[1] == "8000000000000000"


# -- latents ---------------------------------------------------------------------------------------------------------


def test_latents_of_two_resolutions(corpus: Corpus, autoencoder: str):
    columns = {f"latents/tiny-{side}": {"autoencoder": autoencoder, "resolution": side} for side in (32, 64)}
    stages = stages_of(config(Path(corpus.url), columns))
    assert [(s.name, sorted(s.columns), s.device) for s in stages] == [
        ("latents", ["latents/tiny-32", "latents/tiny-64"], "gpu")
    ]
    made = make(corpus, columns, resources={"latents_batch": 4})
    model = load_autoencoder(autoencoder)
    for column, side in (("latents/tiny-32", 32), ("latents/tiny-64", 64)):
        check_rows(corpus, made[column], "images")
        found = arrays(corpus, made[column])
        assert list(found) == [f"k{i}" for i in range(12) if i not in (2, 4)]
        for i in (0, 3, 11):
            pixels = square(np.array(photo(i, (72 + i, 64 + 3 * i))), side)
            assert pixels.shape == (side, side, 3)
            seed = seed_of(column, "photos", f"k{i}")
            wanted = model.encode(pixels[None].copy(), seeds=[seed])[0].numpy()
            assert found[f"k{i}"].dtype == np.float16
            assert found[f"k{i}"].shape == (4, side // 8, side // 8)
            assert np.abs(found[f"k{i}"] - wanted).max() < 2e-3 * np.abs(wanted).max()
        absmax = {line["key"]: line["absmax"] for line in lines(corpus, made[column])}
        assert absmax["k0"] == np.abs(found["k0"]).max()
        assert absmax["k2"] is None
        assert made[column][0].timings["batch"] == 4


def test_one_column_of_a_stage_alone(corpus: Corpus, autoencoder: str):
    columns = {f"latents/tiny-{side}": {"autoencoder": autoencoder, "resolution": side} for side in (32, 64)}
    both = make(corpus, columns)
    other = start(Path(corpus.url).parent / "other")
    [stage] = stages_of(config(Path(other.url), columns))
    for column, spec in stage.columns.items():
        other.declare_column(column, spec.stage, spec.scalars)
    ref = other.commits("images")[0].ref
    [alone] = stage.run(other, Task(ref, {"latents/tiny-64": 0}))
    assert alone.object.sha256 == both["latents/tiny-64"][0].object.sha256  # the same bytes, made again
    assert other.committed("latents/tiny-32") == {}


def test_the_posterior_is_drawn_by_key_and_column(corpus: Corpus, autoencoder: str):
    options = {"autoencoder": autoencoder, "resolution": 32}
    made = make(
        corpus,
        {"latents/a": options, "latents/b": options, "latents/mean": {**options, "posterior": "mode"}},
    )
    a, b, mean = (arrays(corpus, made[f"latents/{name}"])["k0"] for name in ("a", "b", "mean"))
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, mean)
    seeds = {seed_of(c, s, k) for c in ("x", "y") for s in ("s", "t") for k in ("1", "2")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_other_batches_give_the_same_numbers_but_for_the_last_bits(corpus: Corpus, autoencoder: str, tmp_path: Path):
    columns = {"latents/a": {"autoencoder": autoencoder, "resolution": 64}}
    found = []
    for batch in (1, 3, 16):
        root = start(tmp_path / f"batch{batch}")
        found.append(arrays(root, make(root, columns, resources={"latents_batch": batch})["latents/a"]))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for key in found[0]:
        for other in found[1:]:
            assert np.abs(other[key] - found[0][key]).max() <= 4e-3 * np.abs(found[0][key]).max()


def test_latents_that_are_no_numbers_are_not_written(corpus: Corpus, autoencoder: str, tmp_path: Path):
    broken = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        broken.quant_conv.weight.mul_(1e9)
    broken.save_pretrained(tmp_path / "broken")
    columns = {"latents/x": {"autoencoder": str(tmp_path / "broken"), "resolution": 32, "posterior": "mode"}}
    made = make(corpus, columns)["latents/x"]
    check_rows(corpus, made, "images")
    assert {line["reason"] for line in lines(corpus, made)} == {"upstream", "not_finite"}
    assert arrays(corpus, made) == {}


def test_the_demo_autoencoder(corpus: Corpus):
    made = make(corpus, {"latents/demo-64": {"autoencoder": "demo", "resolution": 64}})["latents/demo-64"]
    assert {array.shape for array in arrays(corpus, made).values()} == {(4, 8, 8)}


def test_squares_are_the_middle():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert (square(wide, 20) == 255).all()
    assert (square(wide.transpose(1, 0, 2), 20) == 255).all()
    assert square(photo_array := np.asarray(photo(0, (40, 40))), 40) is not photo_array
    assert (square(photo_array, 40) == photo_array).all()
    assert (square(photo_array, 16) == resize(photo_array, (16, 16))).all()
    assert square(np.zeros((9, 500, 3), np.uint8), 64).shape == (64, 64, 3)


def test_a_model_that_cannot_be_used_is_a_request_error(tmp_path: Path, autoencoder: str):
    for options, words in (
        ({"autoencoder": "no-such-model", "resolution": 64}, r"columns\.latents/x\.autoencoder = 'no-such-model'"),
        ({"autoencoder": str(tmp_path), "resolution": 64}, "config.json"),
        ({"autoencoder": "demo", "resolution": 64, "revision": "main"}, "revision"),
    ):
        with pytest.raises(RequestError, match=words):
            stages_of(config(tmp_path, {"latents/x": options}))
    [stage] = stages_of(config(tmp_path, {"latents/x": {"autoencoder": autoencoder, "resolution": 60}}))
    with pytest.raises(RequestError, match=r"columns\.latents/x\.resolution = 60.*multiples of 8"):
        stage.load()


def test_weights_are_part_of_what_a_column_is_made_by(tmp_path: Path, autoencoder: str):
    def made_by() -> dict:
        autoencoder_identity.cache_clear()
        column = {"latents/x": {"autoencoder": str(tmp_path / "copy"), "resolution": 64}}
        return stages_of(config(tmp_path, column))[0].columns["latents/x"].stage

    model = AutoencoderKL.from_pretrained(autoencoder)
    model.save_pretrained(tmp_path / "copy")
    before = made_by()
    assert before == made_by()
    with torch.no_grad():
        model.quant_conv.bias.add_(1)
    model.save_pretrained(tmp_path / "copy")
    assert {name for name, value in made_by().items() if value != before[name]} == {"model"}


# -- text ------------------------------------------------------------------------------------------------------------


def test_text_of_captions(corpus: Corpus):
    columns = {"captions/source": {}, "text/minilm@source": {"encoder": "minilm"}}
    made = make(corpus, columns, resources={"text_batch": 3})
    check_rows(corpus, made["text/minilm@source"], "captions/source")
    found = arrays(corpus, made["text/minilm@source"])
    encoder = load_text_encoder("minilm")
    keys = [f"k{i}" for i in range(12) if i not in (2, 4) and CAPTIONS[i % SHARD]]
    assert list(found) == keys  # in row order, whatever the batches
    tokens = {line["key"]: line["tokens"] for line in lines(corpus, made["text/minilm@source"])}
    for key in keys:
        embeddings, lengths = encoder.encode([CAPTIONS[int(key[1:]) % SHARD]])
        assert found[key].dtype == np.float16
        assert found[key].shape == (int(lengths[0]), 384) == (tokens[key], 384)
        assert np.abs(found[key] - embeddings[0].numpy()).max() < 5e-3


def test_text_is_the_same_when_made_again(tmp_path: Path):
    columns = {"captions/source": {}, "text/minilm@source": {"encoder": "minilm"}}
    hashes = []
    for name in ("one", "two"):
        corpus = start(tmp_path / name)
        hashes.append([c.object.sha256 for c in make(corpus, columns)["text/minilm@source"]])
    assert hashes[0] == hashes[1]


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_that_the_gpu_has_no_room_for_is_halved_for_good():
    sizes = []

    def encode(samples, size):
        sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * sample for sample in samples]

    batches = Batches(16)
    assert batches.run(encode, list(range(7))) == [0, 10, 20, 30, 40, 50, 60]
    assert sizes == [16, 8, 4, 2, 2, 2, 2]
    assert batches.run(encode, [1]) == [10]
    assert batches.size == 2

    def never(samples, size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        batches.run(never, [1, 2, 3])
    assert batches.size == 1


def test_an_error_in_a_batch_is_the_samples_that_causes_it():
    def encode(samples, size):
        if 5 in samples:
            raise ValueError("five")
        return [-sample for sample in samples]

    found = Batches(4).run(encode, [3, 4, 5, 6, 7])
    assert found[:2] + found[3:] == [-3, -4, -6, -7]
    assert isinstance(found[2], ValueError)

    def broken(samples, size):
        raise ValueError("it is not the samples")

    with pytest.raises(ValueError, match="not the samples"):
        Batches(4).run(broken, [1, 2])


def test_a_trial_of_some_rows_commits_nothing_and_rows_set_aside_fail(corpus: Corpus, autoencoder: str):
    columns = {
        "captions/source": {},
        "scores/basic": {},
        "latents/x": {"autoencoder": autoencoder, "resolution": 32},
        "text/minilm@source": {"encoder": "minilm"},
    }
    made = {}
    ref = corpus.commits("images")[0].ref
    for stage in stages_of(config(Path(corpus.url), columns)):
        for column, spec in stage.columns.items():
            corpus.declare_column(column, spec.stage, spec.scalars)
        wanted = dict.fromkeys(stage.columns, 0)
        assert stage.run(corpus, Task(ref, wanted, rows=range(2, 5))) == []
        assert stage.run(corpus, Task(ref, wanted, rows=range(0))) == []
        for commit in stage.run(corpus, Task(ref, wanted, aside={0: "crash", 3: "stall"})):
            made[commit.column] = commit
    assert made.keys() == columns.keys()
    assert not list(corpus.store.unfinished())
    for column, commit in made.items():
        assert len(list(corpus.store.list(f"{column}/photos"))) == (1 if commit.object == commit.sidecar else 2)
        reasons = [line["reason"] for line in lines(corpus, [commit])]
        inherited = column == "text/minilm@source"
        assert (reasons[0], reasons[3]) == (("upstream", "upstream") if inherited else ("crash", "stall"))
        assert commit.counts["in"] == SHARD


# -- all -------------------------------------------------------------------------------------------------------------


def test_stages_read_the_latest_generation(corpus: Corpus):
    first = corpus.commits("images")[0]
    with corpus.attempt("images", first.ref, generation=1) as attempt:
        for row in read_rows(corpus, first):
            if row.ok and row.row != 0:
                scalars = {name: row.scalars[name] for name in SCALARS}
                attempt.add(row.row, row.key, row.members, **scalars)
            else:
                attempt.fail(row.row, row.key, "gone")
        second = attempt.commit()
    assert latest(corpus, "images", first.ref) == second
    made = make(corpus, {"captions/source": {}})["captions/source"]
    assert made[0].inputs == [second.as_input()]
    assert lines(corpus, made)[0]["reason"] == "upstream"


def test_a_shard_that_is_not_there_yet(corpus: Corpus):
    [stage] = stages_of(config(Path(corpus.url), {"text/minilm@source": {"encoder": "minilm"}, "captions/source": {}}))[
        :1
    ]
    corpus.declare_column("captions/source", {}, {"caption": "string", "tokens": "int32"})
    for column, spec in stage.columns.items():
        corpus.declare_column(column, spec.stage, spec.scalars)
    with pytest.raises(FileNotFoundError):
        stage.run(corpus, Task(corpus.commits("images")[0].ref, dict.fromkeys(stage.columns, 0)))


def test_a_tar_that_is_not_its_sidecars_is_noticed(corpus: Corpus):
    one, two = corpus.commits("images")
    mixed = one.model_copy(update={"object": two.object})
    with pytest.raises(ValueError, match="row 0 is 'k0', the tar has 'k8'"):
        list(read_rows(corpus, mixed))


def test_cheap_stages_come_without_torch_and_a_driver_without_models(tmp_path: Path):
    columns = {
        "captions/source": {},
        "latents/demo-64": {"autoencoder": "demo", "resolution": 64},
        "text/minilm@source": {"encoder": "minilm"},
    }
    probe = (
        "import sys; import pipeline.stages.ingest, pipeline.stages.captions, pipeline.stages.scores, "
        "pipeline.stages.latents, pipeline.stages.text, pipeline.sources.openmoji, pipeline.stages\n"
        "assert not {'torch', 'ray', 'diffusers', 'transformers'} & sys.modules.keys()\n"
        "from pipeline.config import BuildConfig\n"
        "stages = pipeline.stages.stages_of(BuildConfig.model_validate_json(sys.argv[1]))\n"
        "assert len(stages) == 3 and not {'ray', 'diffusers', 'transformers'} & sys.modules.keys()\n"
    )
    asked = config(tmp_path, columns).model_dump_json()
    found = subprocess.run([sys.executable, "-c", probe, asked], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
