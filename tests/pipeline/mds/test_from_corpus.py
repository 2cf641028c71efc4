"""A corpus goes back into MDS folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.mds.columns import Naming
from microdit.pipeline.mds.format import INDEX, read_index
from microdit.pipeline.mds.from_corpus import plan_export, to_mds
from microdit.pipeline.mds.to_corpus import to_corpus
from microdit.pipeline.selection.selections import select
from microdit.pipeline.selection.view import query
from tests.data.mds import make
from tests.pipeline.helpers.mds_folders import (
    ROOT,
    SMALL,
    TEXT,
    WORKERS,
    Sample,
    all_samples,
    arrays,
    microdit,
    read_mds,
    small,
    tree,
    write,
)

__all__ = ["small"]


def test_there_and_back_again(tmp_path: Path, corpus_url: str, small: Corpus) -> None:
    to_corpus(WORKERS, corpus_url, SMALL)
    found = to_mds(plan_export(Corpus.open(corpus_url), text_shape=(77, 8)), tmp_path / "mds")
    assert read_mds(tmp_path / "mds") == [make.encoded(sample) for sample in all_samples("workers")]
    assert (found.inputs, found.out, found.left_out, found.exit_status) == (8, 8, {}, 0)
    assert found.columns == {
        "caption": "captions/source",
        "caption_latents": TEXT,
        "latents_64": "latents/sdxl-64",
        "latents_128": "latents/sdxl-128",
    }
    again = to_corpus(tmp_path / "mds", str(tmp_path / "again"), SMALL)
    assert again.columns[TEXT].out == 8
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
    with pytest.raises(RequestError, match="has weights, which MDS cannot hold"):
        plan_export(corpus, selection="heavy", text_shape=(77, 8))


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
    found = to_mds(plan_export(corpus, text_shape=(77, 8)), tmp_path / "back")
    assert found.left_out == {
        "latents/sdxl-64: not_finite": 1,
        "images: not_text": 1,
        f"{TEXT}: wrong_size": 1,
        "latents/sdxl-128: not_made": missing.counts["in"],
    }
    assert found.inputs == 8 == found.out + sum(found.left_out.values())
    kept = [i for i in range(8 - missing.counts["in"]) if i not in changes]
    assert read_mds(tmp_path / "back") == [make.encoded(wanted[i]) for i in kept]


@pytest.mark.parametrize("point", ["moving:3", "indexing:1"])
def test_back_it_goes_on_after_a_kill(tmp_path: Path, small: Corpus, point: str) -> None:
    """There is no index before all is there; then it is the same as of an undisturbed run, and nothing else is left."""
    to_mds(plan_export(small, text_shape=(77, 8)), tmp_path / "undisturbed")
    command = [
        sys.executable,
        "-c",
        "from microdit.pipeline.cli.app import main; main()",
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
    found = to_mds(plan_export(small, text_shape=(77, 8)), tmp_path / "mds")
    assert found.out == 8
    assert {name: data for name, data in tree(tmp_path / "mds").items() if "#" not in name} == tree(
        tmp_path / "undisturbed"
    )
    assert tree(tmp_path / "mds").items() >= there.items()
    assert to_mds(plan_export(small, text_shape=(77, 8)), tmp_path / "mds").written == 0


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, small: Corpus) -> None:
    export = plan_export(small, text_shape=(77, 8))
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
    other = plan_export(small, text_shape=(77, 8), latents=["latents/sdxl-64"])
    with pytest.raises(RequestError, match="was begun with other samples, columns or options"):
        to_mds(other, tmp_path / "mds")
    assert tree(tmp_path / "mds") == before


def test_two_at_a_time_do_not_write_to_one_folder(tmp_path: Path, small: Corpus) -> None:
    import fcntl

    export = plan_export(small, text_shape=(77, 8))
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
            plan_export(corpus, **options)  # type: ignore[arg-type]
    to_corpus(WORKERS, corpus.url, Naming("small", captions="raw", autoencoder="sdxl-fp16-fix", text_shape=(77, 8)))
    with pytest.raises(RequestError, match="--text: say which text the samples get; the corpus has text/dfn"):
        plan_export(corpus, text_shape=(77, 8))
    with pytest.raises(RequestError, match="--latents: say which latents the samples get"):
        plan_export(corpus, text="text/dfn-clip-h@raw", text_shape=(77, 8))
    chosen = plan_export(corpus, text="text/dfn-clip-h@raw", latents=["latents/sdxl-fp16-fix-128"], text_shape=(77, 8))
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
        to_mds(plan_export(corpus, text_shape=(77, 8)), tmp_path / "mds")
    assert not (tmp_path / "mds" / INDEX).exists()
