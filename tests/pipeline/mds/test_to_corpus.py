"""MDS folders become a corpus: of files that MosaicML Streaming wrote, and of worse ones."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.model.loading import Part, trained_part
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.mds.columns import Naming, plan_conversion
from microdit.pipeline.mds.format import INDEX, MdsWriter, read_index
from microdit.pipeline.mds.to_corpus import to_corpus
from microdit.pipeline.selection.broken_samples import NotingShardCache
from microdit.pipeline.selection.view import query
from microdit.pipeline.stages.scores.pixels import basic_score_stage
from microdit.pipeline.stages.stage import Task
from microdit.pipeline.upkeep.verify import verify
from microdit.trainer.data.batches import LegData
from microdit.trainer.data.samples import open_samples
from microdit.trainer.recipe import Recipe
from tests.data.mds import make
from tests.pipeline.helpers.mds_folders import (
    COLUMNS,
    OFFICIAL,
    ROOT,
    SMALL,
    TEXT,
    WORKERS,
    Sample,
    all_samples,
    arrays,
    microdit,
    small,
    tree,
    write,
)
from tests.pipeline.helpers.small_corpus import hashes

__all__ = ["small"]


def test_official_files_become_a_corpus(tmp_path: Path) -> None:
    found = to_corpus(OFFICIAL, str(tmp_path / "corpus"), Naming("cc12m"))
    corpus, wanted = Corpus.open(tmp_path / "corpus"), all_samples("official")
    assert (found.exit_status, found.inputs, found.unread, found.left_out) == (0, 3, 0, [])
    assert {name: (c.inputs, c.out, c.failed) for name, c in found.columns.items()} == dict.fromkeys(
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
    assert verify(corpus).problems == []


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
    assert len(small.units("small")) == small.source("small").made_by["units"] == 5
    assert verify(small).problems == []


def test_what_reads_pictures_says_that_there_are_none(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    stage = basic_score_stage("scores/basic", ImageOptions().max_pixels)
    corpus.declare_column("scores/basic", stage.columns["scores/basic"].stage, stage.columns["scores/basic"].scalars)
    ref = corpus.commits(IMAGES)[0].ref
    (commit,) = stage.run(corpus, Task(ref, {"scores/basic": 0}))
    assert commit.reasons == {"no_picture": commit.counts["in"]}

    from microdit.pipeline.report.page import write_report

    page = write_report(corpus, tmp_path / "report.html").read_text()
    assert "latents/sdxl-64" in page


def test_declarations_name_the_models_and_claim_no_more(small: Corpus) -> None:
    """What `generate` reads of them is a named autoencoder and text encoder, and nothing to compare them with."""
    latents, text = small.column("latents/sdxl-64").made_by, small.column(TEXT).made_by
    assert (latents["stage"], latents["resolution"], latents["posterior"]) == ("mds", 64, "sample")
    assert (latents["shape"], text["shape"], text["captions"]) == ([4, 8, 8], [77, 8], "captions/source")
    assert trained_part(latents, "autoencoder") == Part("sdxl", "sdxl", {"revision": None})
    assert trained_part(text, "encoder") == Part("dfn-clip-h", "dfn-clip-h", {"revision": None})


def test_as_built_a_build_can_add_to_the_columns(tmp_path: Path) -> None:
    from microdit.pipeline.config.build import Resources
    from microdit.pipeline.config.captions import CaptionsColumn
    from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
    from microdit.pipeline.stages.captions.given import GivenCaptions
    from microdit.pipeline.stages.latents import Latents
    from microdit.pipeline.stages.text import Text

    naming = Naming("small", "source", "demo", "minilm", (77, 8), as_built=True)
    to_corpus(WORKERS, str(tmp_path / "corpus"), naming)
    corpus = Corpus.open(tmp_path / "corpus")
    options = {f"latents/demo-{r}": LatentsColumn(autoencoder="demo", resolution=r) for r in (64, 128)}
    stages: list[Any] = [
        Latents(options, ImageOptions().max_pixels, Resources()),
        Text("text/minilm@source", TextColumn(encoder="minilm"), 32),
        GivenCaptions("captions/source", CaptionsColumn()),
    ]
    for stage in stages:
        for column, spec in stage.columns.items():
            assert corpus.declare_column(column, spec.stage, spec.scalars).made_by == spec.stage


def test_the_same_again_writes_nothing(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    before = tree(tmp_path / "corpus")
    found = to_corpus(WORKERS, str(tmp_path / "corpus"), SMALL)
    assert (found.written, found.exit_status, found.columns[TEXT].out) == (0, 0, 8)
    assert tree(tmp_path / "corpus").items() >= before.items()
    assert {
        name for name in tree(tmp_path / "corpus").keys() - before.keys() if not name.startswith("tables/")
    } == set()


def test_shards_are_cut_where_the_corpus_cuts_them(tmp_path: Path) -> None:
    corpus = Corpus.create(tmp_path / "corpus", "made", shard_samples=2)
    write(tmp_path / "mds", all_samples("workers"))
    found = to_corpus(tmp_path / "mds", corpus.url, SMALL)
    assert found.columns[TEXT].to_json() == {"in": 8, "out": 8, "failed": 0, "reasons": {}}
    assert sorted(shard for _, shard in corpus.committed(TEXT)) == [f"small-000000-{i:02}" for i in range(4)]
    assert [a.tobytes() for a in arrays(corpus, TEXT)] == [
        s["caption_latents"].tobytes() for s in all_samples("workers")
    ]
    assert verify(corpus).problems == []


def test_other_captions_and_a_second_source_are_added(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    to_corpus(WORKERS, corpus.url, Naming("small", captions="raw", text_shape=(77, 8)))
    to_corpus(WORKERS / "1", corpus.url, Naming("second", text_shape=(77, 8)))
    assert {c.counts["in"] for c in corpus.commits(IMAGES, "small")} == {1, 2}
    assert sum(c.counts["out"] for c in corpus.commits("text/dfn-clip-h@raw")) == 8
    assert sum(c.counts["out"] for c in corpus.commits(TEXT)) == 11
    assert verify(corpus).problems == []


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
    reasons = {name: column.reasons for name, column in found.columns.items()}
    assert reasons == {
        IMAGES: {"not_text": 1},
        "captions/source": {"upstream": 1, "no_caption": 1},
        TEXT: {"upstream": 2, "not_finite": 1, "wrong_size": 1},
        "latents/sdxl-64": {"upstream": 1, "not_finite": 1},
        "latents/sdxl-128": {"upstream": 1, "wrong_size": 1},
    }
    for column in found.columns.values():
        assert column.inputs == 8 == column.out + column.failed
        assert sum(column.reasons.values()) == column.failed
    assert found.exit_status == 1  # more than a tenth of a column
    corpus = Corpus.open(tmp_path / "corpus")
    details = [line["detail"] for line in corpus.sidecar(corpus.commits(TEXT)[0]).to_pylist()]
    assert details[6] == "caption_latents: 0 bytes; float16 (77, 8) has 1232"
    assert verify(corpus).problems == []


def test_pictures_that_cannot_be_read_fail(tmp_path: Path) -> None:
    jpegs = [make.jpeg("a"), make.jpeg("b")[:200], b"", make.jpeg("d")]
    samples = [s | {"jpg": jpeg} for s, jpeg in zip(all_samples("workers"), jpegs, strict=False)]
    found = to_corpus(write(tmp_path / "mds", samples, jpg="jpeg"), str(tmp_path / "corpus"), SMALL)
    assert found.columns[IMAGES].reasons == {"truncated": 1, "not_an_image": 1}
    assert found.columns[TEXT].reasons == {"upstream": 2}
    assert verify(Corpus.open(tmp_path / "corpus")).problems == []


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
    from microdit.pipeline.upkeep.status import status

    corpus = Corpus.open(tmp_path / "corpus")
    assert [record.shard for record in status(corpus).set_aside] == ["small-000001"]

    broken.write_bytes(whole)
    again = microdit(tmp_path / "mds", tmp_path / "corpus", "--source", "small", "--text-shape", "77x8")
    assert again.exit_code == 0, again.output
    assert hashes(corpus, COLUMNS) == hashes(small, COLUMNS)
    assert status(corpus).set_aside == []


def test_what_is_damaged_is_made_again(tmp_path: Path, small: Corpus) -> None:
    """Images, and so all that hangs on them; latents alone; a commit; a unit's commit. Other shards are left alone."""
    shutil.copytree(small.url, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    images, latents, text = (corpus.commits(c)[i] for i, c in enumerate((IMAGES, "latents/sdxl-64", TEXT)))
    for name in (images.object.name, latents.object.name, text.name, "commits/units/small/small-000003.0.json"):
        flip = bytearray((tmp_path / "corpus" / name).read_bytes())
        flip[10] ^= 0xFF
        (tmp_path / "corpus" / name).write_bytes(flip)
    damaged = len(verify(corpus).problems)
    assert damaged >= 4
    arguments = [WORKERS, corpus.url, "--source", "small", "--text-shape", "77x8"]
    microdit(*arguments)
    assert len(verify(corpus).problems) == damaged  # nobody has asked for it
    result = microdit(*arguments, "--repair")
    assert result.exit_code == 0, result.output
    assert verify(corpus).problems == []
    assert hashes(corpus, COLUMNS) == hashes(small, COLUMNS)
    again = {(c.column, c.shard) for column in COLUMNS for c in corpus.commits(column) if c.generation}
    assert again == {(c, images.shard) for c in COLUMNS} | {(latents.column, latents.shard), (text.column, text.shard)}
    assert microdit(*arguments, "--repair").stdout.startswith("nothing to do")


def test_merging_the_indexes_later_changes_nothing(tmp_path: Path, small: Corpus) -> None:
    shutil.copytree(small.url, tmp_path / "corpus")
    shutil.copytree(WORKERS, tmp_path / "mds")
    (tmp_path / "mds" / INDEX).unlink()
    assert to_corpus(tmp_path / "mds", str(tmp_path / "corpus"), SMALL).written == 0


@pytest.mark.parametrize("point", ["written:8", "committing-unit:3"])
def test_killed_it_goes_on(tmp_path: Path, small: Corpus, point: str) -> None:
    command = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", "convert", str(WORKERS)]
    command += [str(tmp_path / "corpus"), "--source", "small", "--text-shape", "77x8"]
    killed = subprocess.run(
        command, env=os.environ | {"MICRODIT_FAIL_POINT": point}, cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    corpus = Corpus.open(tmp_path / "corpus")
    assert verify(corpus).problems == []
    there = hashes(corpus, [column for column in COLUMNS if column in corpus.columns()])
    to_corpus(WORKERS, corpus.url, SMALL)
    assert hashes(corpus, COLUMNS) == hashes(small, COLUMNS)
    assert hashes(corpus, COLUMNS).items() >= there.items()
    assert verify(corpus).problems == []


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
    cache = NotingShardCache(samples.corpus, samples.columns, 1 << 26)
    data = LegData(recipe, recipe.stages[0], samples.legs[0], cache, patch_size=2)
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
        plan_conversion(tmp_path / "bare", SMALL)
    write(tmp_path / "mixed/a", wanted[:2])
    write(tmp_path / "mixed/b", [s | {"jpg": b"1"} for s in wanted[2:4]], jpg="jpeg")
    with pytest.raises(RequestError, match="convert such folders one by one"):
        plan_conversion(tmp_path / "mixed", SMALL)
    write(tmp_path / "odd", [s | {"latents_64": b"123"} for s in wanted])
    with pytest.raises(RequestError, match="latents_64 has 3 bytes, which is no float16"):
        plan_conversion(tmp_path / "odd", SMALL)
    write(tmp_path / "eight", [s | {"latents_64": bytes(8 * 8 * 8 * 2)} for s in wanted])
    with pytest.raises(RequestError, match="latents_64 has 8 channels; name the --autoencoder"):
        plan_conversion(tmp_path / "eight", SMALL)
    write(tmp_path / "empty", [])
    with pytest.raises(RequestError, match="there is no sample in its 0 shards"):
        plan_conversion(tmp_path / "empty", SMALL)


def test_columns_that_are_not_taken_are_told(tmp_path: Path) -> None:
    """One that is pickled, too: it is never looked at."""
    write(tmp_path / "mds", [s | {"note": b"cos\nsystem\n"} for s in all_samples("workers")], note="pkl")
    result = microdit(tmp_path / "mds", tmp_path / "corpus", "--source", "small", "--text-shape", "77x8")
    assert result.exit_code == 0
    assert "columns that were not taken: note" in result.stdout


def test_sixteen_channels_are_ostris(tmp_path: Path) -> None:
    latents = {"latents_64": bytes(16 * 8 * 8 * 2), "latents_128": bytes(16 * 16 * 16 * 2)}
    write(tmp_path / "mds", [s | latents for s in all_samples("workers")])
    assert list(plan_conversion(tmp_path / "mds", SMALL).arrays) == [TEXT, "latents/ostris-64", "latents/ostris-128"]
