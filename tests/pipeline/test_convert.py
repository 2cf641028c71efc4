"""`microdit convert`, both ways, on files that MosaicML Streaming wrote and on worse ones."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from model.loading import Part, trained_part
from pipeline.check import verify
from pipeline.cli import app
from pipeline.config import ImageOptions
from pipeline.corpus import Corpus
from pipeline.errors import RequestError
from pipeline.from_mds import to_corpus
from pipeline.mds import INDEX, MdsWriter, open_shard, read_index
from pipeline.mds_columns import Naming, look
from pipeline.samples import query
from pipeline.selections import select
from pipeline.shards import array_from_bytes
from pipeline.stages import IMAGES, Task, read_rows
from pipeline.stages.scores import BasicScores
from pipeline.to_mds import look as look_at_corpus
from pipeline.to_mds import to_mds
from tests.data.mds import make
from tests.pipeline.made import hashes
from trainer.data import ShardCache, StageData
from trainer.recipe import Recipe
from trainer.samples import open_samples

ROOT = Path(__file__).parent.parent.parent
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


# -- to a corpus -----------------------------------------------------------------------------------------------------


def test_official_files_become_a_corpus(tmp_path: Path) -> None:
    found = to_corpus(OFFICIAL, str(tmp_path / "corpus"), Naming("cc12m"))
    corpus, wanted = Corpus.open(tmp_path / "corpus"), all_samples("official")
    assert (found["exit_status"], found["inputs"], found["unread"], found["left_out"]) == (0, 3, 0, [])
    assert {name: (c["in"], c["out"], c["failed"]) for name, c in found["columns"].items()} == dict.fromkeys(
        [IMAGES, "captions/source", TEXT, "latents/sdxl-256", "latents/sdxl-512"], (3, 3, 0)
    )
    for column, field in (
        (TEXT, "caption_latents"),
        ("latents/sdxl-256", "latents_256"),
        ("latents/sdxl-512", "latents_512"),
    ):
        for array, sample in zip(arrays(corpus, column), wanted, strict=True):
            assert array.dtype == np.float16
            assert array.tobytes() == sample[field].tobytes()
            assert array.shape == sample[field].shape[-array.ndim :]  # the text without its first axis of one
    lines = query(corpus, "SELECT * FROM samples ORDER BY shard, row").to_pylist()
    assert [line["caption_source"] for line in lines] == [sample["caption"] for sample in wanted]
    assert [line["key"] for line in lines] == ["000000-000000", "000000-000001", "000000-000002"]
    assert [line["origin"] for line in lines] == [f"shard.00000.mds#{i}" for i in range(3)]
    assert {
        (line["width"], line["height"], line["format"], line["text_dfn_clip_h_source_tokens"]) for line in lines
    } == {(96, 64, "jpeg", 77)}
    for row in read_rows(corpus, corpus.commits(IMAGES)[0]):
        assert Image.open(io.BytesIO(row.members["jpg"])).size == (96, 64)
        assert hashlib.sha256(row.members["jpg"]).hexdigest() == row.scalars["sha256"]  # as it came
    assert verify(corpus)["problems"] == []


def test_folders_of_workers_become_one_source_without_pictures(small: Corpus) -> None:
    wanted = all_samples("workers")
    for column, field in (
        (TEXT, "caption_latents"),
        ("latents/sdxl-64", "latents_64"),
        ("latents/sdxl-128", "latents_128"),
    ):
        assert [a.tobytes() for a in arrays(small, column)] == [sample[field].tobytes() for sample in wanted]
    lines = query(small, "SELECT * FROM samples ORDER BY shard, row").to_pylist()
    assert [line["caption"] for line in lines] == [sample["caption"] for sample in wanted]
    assert len({line["id"] for line in lines}) == 8
    assert {line["origin"].partition("#")[0] for line in lines} == {s.raw_data.basename for s in read_index(WORKERS)}
    for name in ("width", "height", "original_width", "original_height", "format", "sha256", "bytes"):
        assert {line[name] for line in lines} == {None}
    notes = [json.loads(row.members["json"]) for c in small.commits(IMAGES) for row in read_rows(small, c)]
    assert [note["caption"] for note in notes] == [sample["caption"] for sample in wanted]
    assert {tuple(row.members) for c in small.commits(IMAGES) for row in read_rows(small, c)} == {("json",)}
    assert {(note["width"], note["original_height"], note["sha256"]) for note in notes} == {(0, 0, "")}
    assert len(small.units("small")) == small.source("small").stage["units"] == 5
    assert verify(small)["problems"] == []


def test_what_reads_pictures_says_that_there_are_none(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    stage = BasicScores("scores/basic", ImageOptions().max_pixels)
    corpus.declare_column("scores/basic", stage.columns["scores/basic"].stage, stage.columns["scores/basic"].scalars)
    ref = corpus.commits(IMAGES)[0].ref
    (commit,) = stage.run(corpus, Task(ref, {"scores/basic": 0}))
    assert commit.reasons == {"no_picture": commit.counts["in"]}

    from pipeline.report import write_report

    page = write_report(corpus, tmp_path / "report.html").read_text()
    assert "latents/sdxl-64" in page


def test_declarations_name_the_models_and_claim_no_more(small: Corpus) -> None:
    """What `generate` reads of them is a named autoencoder and text encoder, and nothing to compare them with."""
    latents, text = small.column("latents/sdxl-64").stage, small.column(TEXT).stage
    assert (latents["stage"], latents["resolution"], latents["posterior"]) == ("mds", 64, "sample")
    assert (latents["shape"], text["shape"], text["captions"]) == ([4, 8, 8], [77, 8], "captions/source")
    assert trained_part(latents, "autoencoder") == Part("sdxl", "sdxl", {"revision": None})
    assert trained_part(text, "encoder") == Part("dfn-clip-h", "dfn-clip-h", {"revision": None})


def test_as_built_a_build_can_add_to_the_columns(tmp_path: Path) -> None:
    from pipeline.config import CaptionsColumn, LatentsColumn, Resources, TextColumn
    from pipeline.stages.captions import Captions
    from pipeline.stages.latents import Latents
    from pipeline.stages.text import Text

    naming = Naming("small", "source", "demo", "minilm", (77, 8), as_built=True)
    to_corpus(WORKERS, str(tmp_path / "corpus"), naming)
    corpus = Corpus.open(tmp_path / "corpus")
    options = {f"latents/demo-{r}": LatentsColumn(autoencoder="demo", resolution=r) for r in (64, 128)}
    stages: list[Any] = [
        Latents(options, ImageOptions().max_pixels, Resources()),
        Text("text/minilm@source", TextColumn(encoder="minilm"), 32),
        Captions("captions/source", CaptionsColumn()),
    ]
    for stage in stages:
        for column, spec in stage.columns.items():
            assert corpus.declare_column(column, spec.stage, spec.scalars).stage == spec.stage


def test_the_same_again_writes_nothing(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    before = tree(tmp_path / "corpus")
    found = to_corpus(WORKERS, str(tmp_path / "corpus"), SMALL)
    assert (found["written"], found["exit_status"], found["columns"][TEXT]["out"]) == (0, 0, 8)
    assert tree(tmp_path / "corpus").items() >= before.items()
    assert {
        name for name in tree(tmp_path / "corpus").keys() - before.keys() if not name.startswith("tables/")
    } == set()


def test_shards_are_cut_where_the_corpus_cuts_them(tmp_path: Path) -> None:
    corpus = Corpus.create(tmp_path / "corpus", "made", shard_samples=2)
    write(tmp_path / "mds", all_samples("workers"))
    found = to_corpus(tmp_path / "mds", corpus.url, SMALL)
    assert found["columns"][TEXT] == {"in": 8, "out": 8, "failed": 0, "reasons": {}}
    assert sorted(shard for _, shard in corpus.committed(TEXT)) == [f"small-000000-{i:02}" for i in range(4)]
    assert [a.tobytes() for a in arrays(corpus, TEXT)] == [
        s["caption_latents"].tobytes() for s in all_samples("workers")
    ]
    assert verify(corpus)["problems"] == []


def test_other_captions_and_a_second_source_are_added(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    to_corpus(WORKERS, corpus.url, Naming("small", captions="raw", text_shape=(77, 8)))
    to_corpus(WORKERS / "1", corpus.url, Naming("second", text_shape=(77, 8)))
    assert {c.counts["in"] for c in corpus.commits(IMAGES, "small")} == {1, 2}
    assert sum(c.counts["out"] for c in corpus.commits("text/dfn-clip-h@raw")) == 8
    assert sum(c.counts["out"] for c in corpus.commits(TEXT)) == 11
    assert verify(corpus)["problems"] == []


def test_bad_samples_fail_with_a_reason_and_no_others(tmp_path: Path) -> None:
    wanted = all_samples("workers")
    nan = wanted[1]["latents_64"].copy()
    nan[0, 0, 0] = np.nan
    infinite = wanted[2]["caption_latents"].copy()
    infinite[0, 5] = np.inf
    changes: dict[int, Sample] = {
        1: {"latents_64": nan},
        2: {"caption_latents": infinite},
        3: {"latents_128": wanted[3]["latents_128"].tobytes()[:-2]},
        4: {"caption": b"caf\xe9"},
        5: {"caption": " "},
        6: {"caption_latents": b""},
    }
    samples = [sample | changes.get(i, {}) for i, sample in enumerate(wanted)]
    found = to_corpus(write(tmp_path / "mds", samples), str(tmp_path / "corpus"), SMALL)
    reasons = {name: column["reasons"] for name, column in found["columns"].items()}
    assert reasons == {
        IMAGES: {"not_text": 1},
        "captions/source": {"upstream": 1, "no_caption": 1},
        TEXT: {"upstream": 2, "not_finite": 1, "wrong_size": 1},
        "latents/sdxl-64": {"upstream": 1, "not_finite": 1},
        "latents/sdxl-128": {"upstream": 1, "wrong_size": 1},
    }
    for column in found["columns"].values():
        assert column["in"] == 8 == column["out"] + column["failed"]
        assert sum(column["reasons"].values()) == column["failed"]
    assert found["exit_status"] == 1  # more than a tenth of a column
    corpus = Corpus.open(tmp_path / "corpus")
    details = [line["detail"] for line in corpus.sidecar(corpus.commits(TEXT)[0]).to_pylist()]
    assert details[6] == "caption_latents: 0 bytes; float16 (77, 8) has 1232"
    assert verify(corpus)["problems"] == []


def test_pictures_that_cannot_be_read_fail(tmp_path: Path) -> None:
    jpegs = [make.jpeg("a"), make.jpeg("b")[:200], b"", make.jpeg("d")]
    samples = [s | {"jpg": jpeg} for s, jpeg in zip(all_samples("workers"), jpegs, strict=False)]
    found = to_corpus(write(tmp_path / "mds", samples, jpg="jpeg"), str(tmp_path / "corpus"), SMALL)
    assert found["columns"][IMAGES]["reasons"] == {"truncated": 1, "not_an_image": 1}
    assert found["columns"][TEXT]["reasons"] == {"upstream": 2}
    assert verify(Corpus.open(tmp_path / "corpus"))["problems"] == []


def test_a_damaged_shard_is_set_aside_and_taken_when_it_is_mended(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(WORKERS, tmp_path / "mds")
    broken = tmp_path / "mds/0/shard.00001.mds"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-5])
    result = microdit(tmp_path / "mds", tmp_path / "corpus", "--source", "small", "--text-shape", "77x8", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["exit_status"]) == (1, 1)
    assert found["units"] == {"total": 5, "read": 4, "set_aside": 1}
    assert (found["inputs"], found["unread"], found["columns"][IMAGES]["in"]) == (8, 2, 6)
    (entry,) = found["set_aside"]
    assert entry["samples"] == 2
    assert entry["message"] == f"0/shard.00001.mds: it has {len(whole) - 5} bytes, the index says {len(whole)}"
    from pipeline.check import status

    corpus = Corpus.open(tmp_path / "corpus")
    assert [record["shard"] for record in status(corpus)["set_aside"]] == ["small-000001"]

    broken.write_bytes(whole)
    again = microdit(tmp_path / "mds", tmp_path / "corpus", "--source", "small", "--text-shape", "77x8")
    assert again.exit_code == 0, again.output
    assert hashes(corpus, COLUMNS) == hashes(small, COLUMNS)
    assert status(corpus)["set_aside"] == []


def test_what_is_damaged_is_made_again(tmp_path: Path, small: Corpus) -> None:
    """Images, and so all that hangs on them; latents alone; a commit; a unit's commit. Other shards are left alone."""
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    images, latents, text = (corpus.commits(c)[i] for i, c in enumerate((IMAGES, "latents/sdxl-64", TEXT)))
    for name in (images.object.name, latents.object.name, text.name, "commits/units/small/small-000003.0.json"):
        flip = bytearray((tmp_path / "corpus" / name).read_bytes())
        flip[10] ^= 0xFF
        (tmp_path / "corpus" / name).write_bytes(flip)
    damaged = len(verify(corpus)["problems"])
    assert damaged >= 4
    arguments = [WORKERS, corpus.url, "--source", "small", "--text-shape", "77x8"]
    microdit(*arguments)
    assert len(verify(corpus)["problems"]) == damaged  # nobody has asked for it
    result = microdit(*arguments, "--repair")
    assert result.exit_code == 0, result.output
    assert verify(corpus)["problems"] == []
    assert hashes(corpus, COLUMNS) == hashes(small, COLUMNS)
    again = {(c.column, c.shard) for column in COLUMNS for c in corpus.commits(column) if c.generation}
    assert again == {(c, images.shard) for c in COLUMNS} | {(latents.column, latents.shard), (text.column, text.shard)}
    assert microdit(*arguments, "--repair").stdout.startswith("nothing to do")


def test_merging_the_indexes_later_changes_nothing(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    shutil.copytree(WORKERS, tmp_path / "mds")
    (tmp_path / "mds" / INDEX).unlink()
    assert to_corpus(tmp_path / "mds", str(tmp_path / "corpus"), SMALL)["written"] == 0


@pytest.mark.parametrize("point", ["written:8", "committing-unit:3"])
def test_killed_it_goes_on(tmp_path: Path, small: Corpus, point: str) -> None:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "convert", str(WORKERS)]
    command += [str(tmp_path / "corpus"), "--source", "small", "--text-shape", "77x8"]
    killed = subprocess.run(
        command, env=os.environ | {"MICRODIT_FAIL_POINT": point}, cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    corpus = Corpus.open(tmp_path / "corpus")
    assert verify(corpus)["problems"] == []
    there = hashes(corpus, [column for column in COLUMNS if column in corpus.columns()])
    to_corpus(WORKERS, corpus.url, SMALL)
    assert hashes(corpus, COLUMNS) == hashes(small, COLUMNS)
    assert hashes(corpus, COLUMNS).items() >= there.items()
    assert verify(corpus)["problems"] == []


def test_the_trainer_reads_it(tmp_path: Path, small: Corpus) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "converted",
            "corpus": small.url,
            "out": tmp_path,
            "text": {TEXT: 1},
            "caption_dropout": 0,
            "lanes": 4,
            "stages": [{"latents": "latents/sdxl-64", "steps": 2, "batch": 8, "learning_rate": 1e-4}],
        }
    )
    samples = open_samples(recipe)
    cache = ShardCache(samples.corpus, samples.columns, 1 << 26)
    data = StageData(recipe, recipe.stages[0], samples.stages[0], cache, patch_size=2)
    (batch,) = data.batches(0, 0, 1)
    cache.close()
    (micro,) = batch.micro_batches
    assert micro.text_mask.all() and micro.text.shape == (8, 77, 8)
    wanted = all_samples("workers")  # the index is in their order
    for position, latent, text in zip(batch.positions.tolist(), micro.latents, micro.text, strict=True):
        assert torch.equal(latent, torch.from_numpy(wanted[position]["latents_64"].copy()))
        assert torch.equal(text, torch.from_numpy(wanted[position]["caption_latents"][0].copy()))


def test_a_folder_that_has_changed_is_another_source(tmp_path: Path) -> None:
    shutil.copytree(WORKERS, tmp_path / "mds")
    (tmp_path / "mds" / INDEX).unlink()
    shutil.move(tmp_path / "mds/1", tmp_path / "later")
    to_corpus(tmp_path / "mds", str(tmp_path / "corpus"), SMALL)
    shutil.move(tmp_path / "later", tmp_path / "mds/1")
    with pytest.raises(RequestError, match=r"source 'small' of corpus .* was made otherwise: .*units"):
        to_corpus(tmp_path / "mds", str(tmp_path / "corpus"), SMALL)


BAD = {
    "pickled": ({"caption_latents": "pkl"}, SMALL, r"column caption_latents of shard\.00000\.mds is pickled"),
    "encoding": ({"latents_64": "str"}, SMALL, "has the encoding 'str', expected bytes"),
    "shape": ({}, Naming("small"), r"--text-shape 77x1024 is 157,696 bytes .* has 1,232"),
    "source": ({}, Naming("Not Good"), "--source 'Not Good'"),
    "autoencoder": (
        {},
        Naming("small", text_shape=(77, 8), autoencoder="ostris"),
        "has 4 channels; name the --autoenc",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, fault: str) -> None:
    encodings, naming, message = BAD[fault]
    write(tmp_path / "mds", all_samples("workers"), **encodings)
    with pytest.raises(RequestError, match=message):
        to_corpus(tmp_path / "mds", str(tmp_path / "corpus"), naming)
    assert not (tmp_path / "corpus").exists()


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    wanted = all_samples("workers")
    no_caption = [{"caption": "x", "x": b"1"}]
    (tmp_path / "bare").mkdir()
    writer = MdsWriter(tmp_path / "bare", {"caption": "str", "x": "pkl"})
    writer.write({name: value if isinstance(value, bytes) else value.encode() for name, value in no_caption[0].items()})
    writer.close()
    with pytest.raises(RequestError, match=r"its columns are \['caption', 'x'\]; expected caption and some of"):
        look(tmp_path / "bare", SMALL)
    write(tmp_path / "mixed/a", wanted[:2])
    write(tmp_path / "mixed/b", [s | {"jpg": b"1"} for s in wanted[2:4]], jpg="jpeg")
    with pytest.raises(RequestError, match="convert such folders one by one"):
        look(tmp_path / "mixed", SMALL)
    write(tmp_path / "odd", [s | {"latents_64": b"123"} for s in wanted])
    with pytest.raises(RequestError, match="latents_64 has 3 bytes, which is no float16"):
        look(tmp_path / "odd", SMALL)
    write(tmp_path / "eight", [s | {"latents_64": bytes(8 * 8 * 8 * 2)} for s in wanted])
    with pytest.raises(RequestError, match="latents_64 has 8 channels; name the --autoencoder"):
        look(tmp_path / "eight", SMALL)
    write(tmp_path / "empty", [])
    with pytest.raises(RequestError, match="there is no sample in its 0 shards"):
        look(tmp_path / "empty", SMALL)


def test_columns_that_are_not_taken_are_told(tmp_path: Path) -> None:
    """One that is pickled, too: it is never looked at."""
    write(tmp_path / "mds", [s | {"note": b"cos\nsystem\n"} for s in all_samples("workers")], note="pkl")
    result = microdit(tmp_path / "mds", tmp_path / "corpus", "--source", "small", "--text-shape", "77x8")
    assert result.exit_code == 0
    assert "columns that were not taken: note" in result.stdout


def test_sixteen_channels_are_ostris(tmp_path: Path) -> None:
    latents = {"latents_64": bytes(16 * 8 * 8 * 2), "latents_128": bytes(16 * 16 * 16 * 2)}
    write(tmp_path / "mds", [s | latents for s in all_samples("workers")])
    assert list(look(tmp_path / "mds", SMALL).arrays) == [TEXT, "latents/ostris-64", "latents/ostris-128"]


# -- and back --------------------------------------------------------------------------------------------------------


def test_there_and_back_again(tmp_path: Path, corpus_url: str, small: Corpus) -> None:
    to_corpus(WORKERS, corpus_url, SMALL)
    found = to_mds(look_at_corpus(Corpus.open(corpus_url), text_shape=(77, 8)), tmp_path / "mds")
    assert read_mds(tmp_path / "mds") == [make.encoded(sample) for sample in all_samples("workers")]
    assert (found["in"], found["out"], found["left_out"], found["exit_status"]) == (8, 8, {}, 0)
    assert found["columns"] == {
        "caption": "captions/source",
        "caption_latents": TEXT,
        "latents_64": "latents/sdxl-64",
        "latents_128": "latents/sdxl-128",
    }
    again = to_corpus(tmp_path / "mds", str(tmp_path / "again"), SMALL)
    assert again["columns"][TEXT]["out"] == 8
    assert [a.tobytes() for a in arrays(Corpus.open(tmp_path / "again"), TEXT)] == [
        a.tobytes() for a in arrays(small, TEXT)
    ]


def test_a_selection_goes_back(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    select(corpus, "odd", "SELECT source, shard, row FROM samples WHERE row = 1")
    result = microdit(
        corpus.url, tmp_path / "mds", "--selection", "odd", "--text-shape", "77x8", "--json", "--compression", "zstd"
    )
    found = json.loads(result.stdout)
    wanted = [make.encoded(s) for s in query_order(corpus, "row = 1")]
    assert (found["in"], found["out"]) == (len(wanted), len(wanted)) == (3, 3)
    assert read_mds(tmp_path / "mds") == wanted
    assert all(info.zip_data is not None for info in read_index(tmp_path / "mds"))
    select(corpus, "heavy", "SELECT source, shard, row, 2.0 AS weight FROM samples")
    with pytest.raises(RequestError, match="has weights, which MDS has no place for"):
        look_at_corpus(corpus, selection="heavy", text_shape=(77, 8))


def query_order(corpus: Corpus, condition: str) -> Iterator[Sample]:
    """The samples that a condition names, by their captions."""
    by_caption = {sample["caption"]: sample for sample in all_samples("workers")}
    for line in query(corpus, f"SELECT caption FROM samples WHERE {condition} ORDER BY shard, row").to_pylist():
        yield by_caption[line["caption"]]


def test_what_is_left_out_adds_up(tmp_path: Path) -> None:
    wanted = all_samples("workers")
    changes: dict[int, Sample] = {
        1: {"latents_64": np.full_like(wanted[1]["latents_64"], np.nan)},
        3: {"caption": b"\xff"},
        5: {"caption_latents": b"12"},
    }
    folder = write(tmp_path / "mds", [s | changes.get(i, {}) for i, s in enumerate(wanted)], size_limit=9_000)
    to_corpus(folder, str(tmp_path / "corpus"), SMALL)
    corpus = Corpus.open(tmp_path / "corpus")
    last = max(corpus.committed("latents/sdxl-128"))
    missing = corpus.commit("latents/sdxl-128", *last, 0)
    (tmp_path / "corpus" / missing.name).unlink()  # a shard of one column that is not made yet
    found = to_mds(look_at_corpus(corpus, text_shape=(77, 8)), tmp_path / "back")
    assert found["left_out"] == {
        "latents/sdxl-64: not_finite": 1,
        "images: not_text": 1,
        f"{TEXT}: wrong_size": 1,
        "latents/sdxl-128: not_made": missing.counts["in"],
    }
    assert found["in"] == 8 == found["out"] + sum(found["left_out"].values())
    kept = [i for i in range(8 - missing.counts["in"]) if i not in changes]
    assert read_mds(tmp_path / "back") == [make.encoded(wanted[i]) for i in kept]


@pytest.mark.parametrize("point", ["moving:3", "indexing:1"])
def test_back_it_goes_on_after_a_kill(tmp_path: Path, small: Corpus, point: str) -> None:
    """There is no index before all is there; then it is the same as of an undisturbed run, and nothing else is left."""
    to_mds(look_at_corpus(small, text_shape=(77, 8)), tmp_path / "undisturbed")
    command = [
        sys.executable,
        "-c",
        "from pipeline.cli import main; main()",
        "convert",
        small.url,
        str(tmp_path / "mds"),
    ]
    command += ["--text-shape", "77x8"]
    killed = subprocess.run(
        command, env=os.environ | {"MICRODIT_FAIL_POINT": point}, cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "mds" / INDEX).exists()
    there = {
        name: data for name, data in tree(tmp_path / "mds").items() if ".unfinished-" not in name and "#" not in name
    }
    found = to_mds(look_at_corpus(small, text_shape=(77, 8)), tmp_path / "mds")
    assert found["out"] == 8
    assert {name: data for name, data in tree(tmp_path / "mds").items() if "#" not in name} == tree(
        tmp_path / "undisturbed"
    )
    assert tree(tmp_path / "mds").items() >= there.items()
    assert to_mds(look_at_corpus(small, text_shape=(77, 8)), tmp_path / "mds")["written"] == 0


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, small: Corpus) -> None:
    export = look_at_corpus(small, text_shape=(77, 8))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"has something in it \(thesis\.txt\)"):
        to_mds(export, tmp_path / "mine")
    assert tree(tmp_path / "mine") == {"thesis.txt": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is no folder"):
        to_mds(export, tmp_path / "file")
    to_mds(export, tmp_path / "mds")
    before = tree(tmp_path / "mds")
    other = look_at_corpus(small, text_shape=(77, 8), latents=["latents/sdxl-64"])
    with pytest.raises(RequestError, match="was begun with other samples, columns or options"):
        to_mds(other, tmp_path / "mds")
    assert tree(tmp_path / "mds") == before


def test_two_at_a_time_do_not_write_to_one_folder(tmp_path: Path, small: Corpus) -> None:
    import fcntl

    export = look_at_corpus(small, text_shape=(77, 8))
    to_mds(export, tmp_path / "mds")
    with (tmp_path / "mds/convert.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RequestError, match="another microdit is writing to it"):
            to_mds(export, tmp_path / "mds")


def test_columns_that_cannot_be_chosen_are_asked_for(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    for options, message in (
        ({"text": "text/none@source"}, "--text text/none@source: there is no such column; the corpus has text/dfn"),
        ({"latents": ["latents/none-64"]}, "--latents latents/none-64: there is no such column"),
        ({"selection": "none", "text_shape": (77, 8)}, "there is no such selection"),
        ({}, r"has texts of \(77, 8\) .* reshapes all of them to \(77, 1024\)"),
    ):
        with pytest.raises(RequestError, match=message):
            look_at_corpus(corpus, **options)  # type: ignore[arg-type]
    to_corpus(WORKERS, corpus.url, Naming("small", captions="raw", autoencoder="sdxl-fp16-fix", text_shape=(77, 8)))
    with pytest.raises(RequestError, match="--text: say which text the samples get; the corpus has text/dfn"):
        look_at_corpus(corpus, text_shape=(77, 8))
    with pytest.raises(RequestError, match="--latents: say which latents the samples get"):
        look_at_corpus(corpus, text="text/dfn-clip-h@raw", text_shape=(77, 8))
    chosen = look_at_corpus(
        corpus, text="text/dfn-clip-h@raw", latents=["latents/sdxl-fp16-fix-128"], text_shape=(77, 8)
    )
    assert chosen.captions == "captions/raw"
    assert chosen.fields == {"caption_latents": "text/dfn-clip-h@raw", "latents_128": "latents/sdxl-fp16-fix-128"}


def test_a_damaged_object_is_told(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    commit = corpus.commits(TEXT)[-1]
    path = tmp_path / "corpus" / commit.object.name
    data = bytearray(path.read_bytes())
    offset = next(line["offset"] for line in corpus.sidecar(commit).to_pylist())
    data[offset : offset + 6] = b"no npy"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"is damaged .*; run `microdit verify`"):
        to_mds(look_at_corpus(corpus, text_shape=(77, 8)), tmp_path / "mds")
    assert not (tmp_path / "mds" / INDEX).exists()


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_finds_out_which_way_it_goes(tmp_path: Path) -> None:
    there = microdit(OFFICIAL, tmp_path / "corpus", "--source", "cc12m", "--json")
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout)["columns"]["latents/sdxl-512"]["out"] == 3
    again = microdit(OFFICIAL, tmp_path / "corpus", "--source", "cc12m")
    assert again.stdout.startswith("nothing to do: all of it is there\n")
    back = microdit(tmp_path / "corpus", tmp_path / "mds")
    assert back.exit_code == 0, back.output
    assert "3 samples in = 3 out + 0 left out" in back.stdout
    assert read_mds(tmp_path / "mds") == [make.encoded(sample) for sample in all_samples("official")]
    with tarfile.open(next((tmp_path / "corpus/images").rglob("*.tar"))) as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["jpg", "json"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{mds}", "{new}"], "--source: name the samples"),
        (["{mds}", "{new}", "--source", "a", "--selection", "b"], "--selection: it is for the other way"),
        (["{corpus}", "{new}", "--source", "a"], "--source: it is for the other way; FROM is a corpus"),
        (["{corpus}", "{new}", "--text-shape", "77"], "--text-shape '77': expected tokens and width"),
        (["{corpus}", "s3://bucket/x"], "MDS is written to a folder of this machine"),
        (["{corpus}", "{new}", "--compression", "br"], "--compression 'br': expected zstd"),
        (["{new}", "{new}"], "there is no such folder; expected MDS shards, or a corpus"),
        (["{empty}", "{new}"], "it is no corpus"),
    ],
)
def test_a_wrong_request_is_told(tmp_path: Path, small: Corpus, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"mds": WORKERS, "corpus": small.url, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    result = microdit(*(argument.format_map(places) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tmp_path / "new").exists()
