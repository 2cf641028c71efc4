"""Copies of a bucket's objects on a disk: found again, bounded, damaged, shared, killed, and nobody else's files."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.disk_cache import FOLDER, DiskCache
from microdit.pipeline.corpus.records import ObjectRef
from microdit.trainer.data.samples import open_cache, open_samples
from tests.trainer.conftest import build_corpus, build_recipe


def some(number: int, size: int = 1000) -> tuple[ObjectRef, bytes]:
    data = bytes([number]) * size
    return ObjectRef(name=f"x/{number}", size=size, sha256=hashlib.sha256(data).hexdigest()), data


def held(cache: DiskCache, number: int, size: int = 1000) -> bytes | None:
    """A copy's bytes."""
    file = cache.get(some(number, size)[0])
    if file is None:
        return None
    with file:
        return file.read()


def taken(folder: Path) -> int:
    """Bytes on the disk; a file that gets its name while they are counted has two."""
    found = [path.stat() for path in (folder / FOLDER).iterdir()]
    return sum({about.st_ino: about.st_size for about in found}.values())


def test_copies_are_bounded_and_the_one_used_longest_ago_goes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3500)
    for number in range(3):
        cache.put(*some(number))
        os.utime(cache.folder / some(number)[0].sha256, (number + 1, number + 1))
    assert held(cache, 0) == some(0)[1]  # used now
    cache.put(*some(3))
    assert [held(cache, number) is not None for number in range(4)] == [True, False, True, True]
    cache.put(*some(4, 5000))  # more than all of it
    assert held(cache, 4, 5000) is None and taken(tmp_path) == 3000


def test_only_its_own_files_are_ever_removed(tmp_path: Path) -> None:
    name = some(0)[0].sha256
    (tmp_path / name).write_text("mine")  # beside its folder
    cache = DiskCache(tmp_path, 1500)
    (cache.folder / "notes.txt").write_text("mine")
    (cache.folder / ("a" * 64)).symlink_to(tmp_path / name)
    for number in range(5):
        cache.put(*some(number))
    assert (tmp_path / name).read_text() == "mine" and (cache.folder / "notes.txt").read_text() == "mine"
    assert (cache.folder / ("a" * 64)).is_symlink()


def test_what_a_kill_left_is_counted_and_later_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2500)
    left = cache.folder / f"{'b' * 64}#17"
    left.write_bytes(b"x" * 1000)
    cache.put(*some(1))
    cache.put(*some(2))
    assert left.exists() and held(cache, 1) is None and held(cache, 2) is not None
    os.utime(left, (1, 1))
    cache.put(*some(3))
    assert not left.exists() and held(cache, 2) is not None and held(cache, 3) is not None


def test_many_at_once_stay_within_the_bound_and_kills_leave_whole_copies(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.pipeline.corpus.test_disk_cache import some, DiskCache\n"
        "cache = DiskCache(Path(sys.argv[1]), 350_000)\nprint(1, flush=True)\n"
        "while True:\n    for n in range(20): cache.put(*some(n, 100_000))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        cache = DiskCache(tmp_path, 350_000)
        end, most = time.monotonic() + 1.5, 0
        while time.monotonic() < end:
            with suppress(FileNotFoundError), cache._locked():  # else a copy that went is counted with its successor
                most = max(most, taken(tmp_path))
        assert 0 < most <= 350_000
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    found = [held(cache, n, 100_000) for n in range(20)]
    assert all(data in (None, some(n, 100_000)[1]) for n, data in enumerate(found))


def test_a_full_or_forbidden_folder_stops_nothing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for path in cache.folder.iterdir():
        path.unlink()
    cache.folder.rmdir()
    cache.put(*some(1))
    assert held(cache, 1) is None


def test_a_corpus_on_a_bucket_is_read_once_and_a_damaged_copy_is_fetched_again(s3_url: str, tmp_path: Path) -> None:
    corpus = build_corpus(s3_url, units=1)
    recipe = build_recipe(corpus, tmp_path / "run", cache_folder=str(tmp_path / "copies"), cache_gb=1)
    samples = open_samples(recipe)
    shard = samples.legs[0].shards[0]

    def read(expected: int) -> np.ndarray:
        asked: list[str] = []
        store = samples.corpus.store
        real = store.get_buffer
        store.get_buffer = lambda name: (asked.append(name), real(name))[1]  # type: ignore[method-assign]
        try:
            with closing(open_cache(recipe, samples)) as cache:
                latent = np.array(cache.field("latents/demo-32", shard, 2))
        finally:
            del store.get_buffer
        assert len(asked) == expected, asked
        return latent

    first = read(2)  # object and sidecar
    assert np.array_equal(read(0), first)
    name = samples.columns["latents/demo-32"][shard].object.sha256
    copy = tmp_path / "copies" / FOLDER / name
    data = copy.read_bytes()
    copy.write_bytes(data[:-1] + b"x")
    assert np.array_equal(read(1), first) and copy.read_bytes() == data
    copy.write_bytes(data[:100])
    assert np.array_equal(read(1), first) and copy.read_bytes() == data
    assert Corpus.open(s3_url).commits("images")
