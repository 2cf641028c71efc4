"""A small corpus written through the public interface: real JPEGs, captions, scores, latents and text embeddings."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, ShardRef

IMAGE_SCALARS = {
    "caption": "string",
    "origin": "string",
    "license": "string",
    "fields": "string",
    "width": "int32",
    "height": "int32",
    "original_width": "int32",
    "original_height": "int32",
    "format": "string",
    "sha256": "string",
    "bytes": "int64",
}

COLUMNS = ("captions/source", "scores/basic", "latents/demo-64", "text/minilm@source")
SOURCE = "demo"
SHARD_SAMPLES = 6
Hashes = dict[tuple[str, str], tuple[str, str]]
FAILED = (2,)  # rows of every shard whose image cannot be had
UNIT = unit_name(SOURCE, 0)
REF = ShardRef(source=SOURCE, unit=UNIT, shard=shard_name(UNIT, 0))
NEXT = ShardRef(source=SOURCE, unit=UNIT, shard=shard_name(UNIT, 1))
LATENTS = "latents/demo-64"


def make_corpus(url: str | Path) -> Corpus:
    """An empty corpus with one source and five declared columns."""
    corpus = Corpus.create(url, "made", shard_samples=SHARD_SAMPLES)
    corpus.declare_source(SOURCE, {"adapter": "made", "code": 1})
    corpus.declare_column("images", {"stage": "images", "code": 1}, IMAGE_SCALARS)
    corpus.declare_column("captions/source", {"stage": "captions/source"}, {"caption": "string", "tokens": "int32"})
    corpus.declare_column("scores/basic", {"stage": "scores"}, {"sharpness": "float32"})
    corpus.declare_column("latents/demo-64", {"stage": "latents", "resolution": 64})
    corpus.declare_column("text/minilm@source", {"stage": "text"}, {"tokens": "int32"})
    return corpus


def fill(corpus: Corpus, units: int = 1, shards: int = 2, columns: Sequence[str] = COLUMNS) -> None:
    """Write whole units: every shard of `images` and of `columns`, then the unit commit."""
    for unit in (unit_name(SOURCE, number) for number in range(units)):
        names = [shard_name(unit, number) for number in range(shards)]
        for name in names:
            ref = ShardRef(source=SOURCE, unit=unit, shard=name)
            newest = {"images": write_images(corpus, ref)}
            for column in columns:
                newest[column] = write_column(corpus, column, newest)
        commit_unit(corpus, SOURCE, unit, SHARD_SAMPLES * shards, names)


def keys_of(ref: ShardRef, rows: int = SHARD_SAMPLES) -> list[str]:
    return [f"{ref.shard}-{row}" for row in range(rows)]


def write_images(
    corpus: Corpus,
    ref: ShardRef,
    failed: Iterable[int] = FAILED,
    generation: int = 0,
    quality: int = 80,
    rows: int = SHARD_SAMPLES,
    keys: Sequence[str] | None = None,
) -> Commit:
    """One shard of images; the captions of even rows are empty."""
    with begin_attempt(corpus, "images", ref, generation=generation) as attempt:
        for row, key in enumerate(keys or keys_of(ref, rows)):
            if row in failed:
                attempt.fail(row, key, "http_404", "the server said 404")
                continue
            side = 64 + row
            pixels = np.random.default_rng(row).integers(0, 255, (side, side, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
            data = buffer.getvalue()
            about = {
                "caption": f"picture {row} — é" if row % 2 else "",
                "origin": f"https://example.org/{key}.jpg",
                "license": "",
                "fields": "",
                "width": side,
                "height": side,
                "original_width": side,
                "original_height": side,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            meta = json.dumps({"key": key, "source": ref.source, **about}).encode()
            attempt.add(row, key, {"jpg": data, "json": meta}, **about, format="jpeg", bytes=len(data))
        return attempt.commit()


def write_column(corpus: Corpus, column: str, newest: dict[str, Commit], generation: int = 0) -> Commit:
    """One shard of a computed column, from the images' sidecar alone; failed rows are inherited."""
    images = newest["images"]
    inputs = [newest[name] for name in ("images", "captions/source") if name in newest and name != column]
    with begin_attempt(corpus, column, images.ref, inputs, generation) as attempt:
        for line in corpus.sidecar(images).to_pylist():
            row, key = line["row"], line["key"]
            if line["status"] == "failed":
                attempt.fail(row, key, "upstream", "images: http_404")
            elif column.startswith("captions/"):
                attempt.add(row, key, caption=line["caption"], tokens=len(line["caption"].split()))
            elif column.startswith("scores/"):
                attempt.add(row, key, sharpness=row / 10)
            elif column.startswith("latents/"):
                attempt.add(row, key, {"npy": array_bytes(np.full((4, 8, 8), row, np.float16))})
            else:
                tokens = len(line["caption"].split())
                attempt.add(row, key, {"npy": array_bytes(np.full((tokens, 8), row, np.float16))}, tokens=tokens)
        return attempt.commit()


def latents(corpus: Corpus) -> Commit:
    """The first commit of latents."""
    return corpus.commit(LATENTS, SOURCE, REF.shard, 0)


def replace(corpus: Corpus, name: str, data: bytes | None) -> None:
    """Damage an object, which only a test does."""
    corpus.store.delete([name])
    if data is not None:
        corpus.store.create(name, data)


def problems(corpus: Corpus) -> list[tuple[str, str]]:
    """What `verify` finds: kind and place."""
    from microdit.pipeline.upkeep.verify import verify  # not for those that write a corpus alone: it needs duckdb

    found = verify(corpus)
    assert found.ok == (not found.problems)
    json.dumps(found.to_dict())
    return [(problem.kind, problem.what) for problem in found.problems]


def hashes(corpus: Corpus, columns: Iterable[str]) -> Hashes:
    """By column and shard, the hashes of the committed data object and its sidecar."""
    return {
        (column, commit.shard): (commit.object.sha256, commit.sidecar.sha256)
        for column in columns
        for commit in corpus.commits(column)
    }


def named_objects(corpus: Corpus, columns: Iterable[str]) -> set[str]:
    """The objects that the newest commits name."""
    commits = [commit for column in columns for commit in corpus.commits(column)]
    return {ref.name for commit in commits for ref in (commit.object, commit.sidecar)}
