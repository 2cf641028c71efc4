"""Disks that fill up in the middle of a shard: no partial object is left, and with room again the build resumes."""

import errno
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.small_corpus import hashes, named_objects
from tests.pipeline.helpers.small_disks import grow, small_disk
from tests.pipeline.helpers.whole_build import COLUMNS, SHARDS, build_whole

ROOT = Path(__file__).parents[3]
LIMITED = "import sys; from tests.pipeline.helpers.whole_build import build_whole; build_whole(sys.argv[1])"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "128k") as disk:
        yield disk


def check_then_go_on(url: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(url)
    assert verify(corpus).problems == []
    made = sum(len(corpus.committed(column)) for column in COLUMNS)
    assert made < SHARDS * len(COLUMNS)
    assert not list(corpus.store.unfinished())
    if url.parent.name == "disk":
        grow(url.parent, "8m")
    assert build_whole(url) == SHARDS * len(COLUMNS) - made
    build_whole(tmp_path / "undisturbed")
    assert hashes(corpus, COLUMNS) == hashes(Corpus.open(tmp_path / "undisturbed"), COLUMNS)
    assert verify(corpus).problems == []
    # the objects of an attempt that could not be committed for want of room are orphans, which gc removes
    assert named_objects(corpus, COLUMNS) <= {item.name for item in corpus.store.list()}


def test_a_disk_that_is_full(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        build_whole(disk / "corpus")
    assert error.value.errno == errno.ENOSPC
    check_then_go_on(disk / "corpus", tmp_path)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "corpus")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=250,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000)),
    )
    assert "File too large" in found.stderr, "the fault did not fire"
    check_then_go_on(tmp_path / "corpus", tmp_path)
