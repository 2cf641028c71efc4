"""Latents when memory, disk, a model or a picture fails, and threads that wait for each other."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.stages import latents as latents_stage
from microdit.pipeline.stages.batch_line import WRITING
from microdit.pipeline.stages.stage import Task
from tests.pipeline.helpers.small_corpus import write_images
from tests.pipeline.helpers.small_latents import (
    FAILED,
    REF,
    ROWS,
    arrays,
    columns,
    corpus,
    decoded,
    one,
    run,
    stage_of,
    start,
    two,
)

ROOT = Path(__file__).parents[3]
__all__ = ["corpus", "decoded", "one", "two"]


def test_memory_that_one_column_lacks_halves_its_batches_alone(corpus: Corpus, one: str, tmp_path: Path) -> None:
    asked = columns(a=(one, 64), b=(one, 32))
    whole = {column: arrays(corpus, commit) for column, commit in run(stage_of(corpus, asked), corpus).items()}
    other = start(tmp_path / "other")
    stage = stage_of(other, asked)
    sizes = []

    class LittleRoom:
        def __init__(self, model: Any):
            self.model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)

        def encode(self, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
            sizes.append(len(pixels))
            if len(pixels) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.model.encode(pixels, **options)

    stage.models["latents/a"] = LittleRoom(stage.models["latents/a"])
    made = run(stage, other)
    assert sizes == [4] + [2] * 14
    assert (made["latents/a"].timings["batch"], made["latents/b"].timings["batch"]) == (2, 4)
    for column, commit in made.items():
        for key, latent in arrays(other, commit).items():
            assert np.abs(latent - whole[column][key]).max() <= 4e-3 * np.abs(whole[column][key]).max()


@pytest.mark.parametrize("where", ["reading", "encoding", "writing"])
def test_an_error_anywhere_ends_the_shard_and_leaves_nothing(
    where: str, corpus: Corpus, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(corpus, columns(a=(one, 32)))
    count = 0

    def broken(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > (ROWS // 2 if where == "writing" else 2):
            raise OSError("the disk is full")
        return working(*arguments, **options)

    if where == "reading":
        [images] = corpus.commits("images")
        path = Path(corpus.url, images.object.name)
        path.write_bytes(path.read_bytes()[: images.object.size // 2])
    elif where == "encoding":
        working: Any = stage.models["latents/a"].encode
        monkeypatch.setattr(stage.models["latents/a"], "encode", broken)
    else:
        working = latents_stage.array_bytes
        monkeypatch.setattr(latents_stage, "array_bytes", broken)
    before = threading.active_count()
    with pytest.raises(Exception, match=r"disk is full|unexpected end of data"):
        run(stage, corpus)
    assert threading.active_count() == before
    assert corpus.committed("latents/a") == {}
    assert not list(corpus.store.unfinished()) and not list(corpus.store.names("latents"))


def test_a_model_that_is_faster_than_the_disk_does_not_fill_the_memory(
    corpus: Corpus, one: str, decoded: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, free, written = stage_of(corpus, columns(a=(one, 32)), latents_batch=2), threading.Event(), 0

    def slow(array: np.ndarray) -> bytes:
        nonlocal written
        free.wait()
        written += 1
        return working(array)

    working = latents_stage.array_bytes
    monkeypatch.setattr(latents_stage, "array_bytes", slow)
    worker = threading.Thread(target=run, args=(stage, corpus))
    worker.start()
    before = -1
    while len(decoded) != before or not decoded:
        before = len(decoded)
        time.sleep(0.3)
    # batches that wait to be written, the one that is written, the one that has no place, those that are decoded ahead
    assert len(decoded) <= 2 * (WRITING + 2) + (2 + 2 * 2) < ROWS - len(FAILED)
    assert written == 0
    free.set()
    worker.join()
    assert written == ROWS - len(FAILED) == len(decoded)
    assert len(corpus.committed("latents/a")) == 1


def test_the_next_shard_is_decoded_while_the_last_of_one_is_encoded(
    corpus: Corpus, one: str, decoded: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, refs = columns(a=(one, 32), b=(one, 64)), [REF, REF.model_copy(update={"shard": "demo-000000-01"})]
    roots = [corpus, start(tmp_path / "alone")]
    for root in roots:
        write_images(root, refs[1], FAILED, rows=ROWS)
    stage, gate, encoding = stage_of(corpus, asked), threading.Event(), []

    def slow(*arguments: Any, **options: Any) -> Any:
        encoding.append(threading.get_ident())
        if len(encoding) == 12:  # of 14: seven batches for each column
            gate.wait()
        return working(*arguments, **options)

    working = stage.models["latents/a"].encode
    monkeypatch.setattr(stage.models["latents/a"], "encode", slow)
    found: list[Commit] = []

    def work(ref: ShardRef) -> None:
        found.extend(stage.run(corpus, Task(ref, dict.fromkeys(asked, 0))))

    workers = [threading.Thread(target=work, args=(ref,)) for ref in refs]
    workers[0].start()
    while not encoding:  # the first one is the first
        time.sleep(0.01)
    workers[1].start()
    deadline = time.monotonic() + 60
    while (len(encoding) < 12 or len(decoded) < ROWS - len(FAILED) + 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(encoding) == 12 and len(decoded) >= ROWS - len(FAILED) + 4
    assert corpus.committed("latents/a") == {}
    gate.set()
    for worker in workers:
        worker.join()
    assert len(encoding) == 28 and len(set(encoding[:14])) == len(set(encoding[14:])) == 1  # one after the other
    monkeypatch.undo()
    other = stage_of(roots[1], asked)
    alone = [commit for ref in refs for commit in other.run(roots[1], Task(ref, dict.fromkeys(asked, 0)))]
    bytes_of = [{(c.column, c.shard): c.object.sha256 for c in commits} for commits in (found, alone)]
    assert len(bytes_of[0]) == 4 and bytes_of[0] == bytes_of[1]


HANG = """
import sys, time
import torch
import microdit.pipeline.stages.latents as stage
from microdit.pipeline.content import crop
from microdit.pipeline.config.encoders import LatentsColumn
from microdit.pipeline.config.build import Resources
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.content.images import decode
from microdit.pipeline.stages.stage import Task
from microdit.pipeline.stages.encoding import Batches
from microdit.pipeline.base.liveness import watched
class Flat:
    device, deterministic = torch.device("cpu"), True
    def encode(self, pixels, **options):
        return torch.zeros(len(pixels), 4, 8, 8)
count = 0
def hanging(data, max_pixels, shrink_to=None):
    global count
    count += 1
    if count == 20:
        time.sleep(600)
    return decode(data, max_pixels, shrink_to)
crop.decode = hanging
corpus = Corpus.open(sys.argv[1])
[images] = corpus.commits("images")
made = stage.Latents({"latents/a": LatentsColumn(autoencoder="demo", resolution=64)}, 10**8, Resources(latents_batch=4))
corpus.declare_column("latents/a", made.columns["latents/a"].stage, {"absmax": "float32"})
made.models, made._batches = {"latents/a": Flat()}, {"latents/a": Batches(4)}
with watched(4.0):
    made.run(corpus, Task(images.ref, {"latents/a": 0}))
"""


def test_an_image_that_hangs_the_decoder_ends_the_process(corpus: Corpus) -> None:
    """The threads that wait for it keep nothing alive."""
    command = [sys.executable, "-c", HANG, corpus.url]
    found = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert found.returncode == 1 and "in hanging" in found.stderr, found.stderr
    assert corpus.committed("latents/a") == {}
