"""Every stage on a small corpus: what it writes, what it passes on, and what it does with what it cannot use."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.content.images import decode
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.rows import latest, read_rows
from microdit.pipeline.stages.ingest import SCALARS
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.scores.pixels import basic_scores, perceptual_hash
from microdit.pipeline.stages.stage import Task
from tests.pipeline.helpers.stage_outputs import check_rows, config, corpus, lines, make, photo, saved

__all__ = ["corpus"]


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
        "k3": "long 3", "k5": "long 5",
    }  # fmt: skip
    assert found["k0"]["reason"] == "ambiguous_key"  # the table has two captions for it
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


# -- all -------------------------------------------------------------------------------------------------------------
def test_stages_read_the_latest_generation(corpus: Corpus):
    first = corpus.commits("images")[0]
    with begin_attempt(corpus, "images", first.ref, generation=1) as attempt:
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
        "import sys; import microdit.pipeline.stages.ingest, microdit.pipeline.stages.captions.given, "
        "microdit.pipeline.stages.scores.pixels, "
        "microdit.pipeline.stages.latents, microdit.pipeline.stages.text, microdit.pipeline.sources.openmoji.source\n"
        "assert not {'torch', 'ray', 'diffusers', 'transformers'} & sys.modules.keys()\n"
        "from microdit.pipeline.config.build import BuildConfig\n"
        "from microdit.pipeline.stages.registry import stages_of\n"
        "stages = stages_of(BuildConfig.model_validate_json(sys.argv[1]))\n"
        "assert len(stages) == 3 and not {'ray', 'diffusers', 'transformers'} & sys.modules.keys()\n"
    )
    asked = config(tmp_path, columns).model_dump_json()
    found = subprocess.run([sys.executable, "-c", probe, asked], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
