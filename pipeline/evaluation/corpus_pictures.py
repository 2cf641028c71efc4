"""Read the pictures of a corpus to evaluate, or to compare with: of a source, of a selection, or COCO's 30,000."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.images import PILLOW_MAX_PIXELS
from microdit.pipeline.content.crop import square
from microdit.pipeline.content.images import BadImage, decode
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import ShardId
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.evaluation.picture_sets import PictureSet, StoredPicture
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.sample_index import SampleIndex, index_samples
from microdit.pipeline.sources.adapters.coco import choose, image_id
from microdit.pipeline.stages.rows import image_bytes
from microdit.pipeline.storage.bucket import SCHEMES
from microdit.pipeline.storage.store import open_store

COCO_COUNT, COCO_SEED = 30_000, 2014  # of `coco-30k`, as the source `coco` chooses


@dataclass(frozen=True)
class Subset:
    """Choose a part of a corpus: the samples of a source, of a selection, or of both."""

    source: str | None = None
    selection: str | None = None
    coco: bool = False
    """Keep the 30,000 images of COCO 2014 val that the rule of the source `coco` chooses."""

    def __bool__(self) -> bool:
        return self != Subset()


def is_corpus(where: str) -> bool:
    """Check for the root of a corpus: a bucket, or a folder with corpus.json."""
    scheme, separator, _ = where.partition("://")
    return (scheme in SCHEMES or not separator) and open_store(where).exists("corpus.json")


def open_corpus_pictures(where: str, subset: Subset, size: int | None = None) -> PictureSet:
    """Open the pictures of a corpus, in the order of its shards; the caption is the one that came with the picture.

    Raises:
        RequestError: there is no such corpus, source or selection, or no picture in it.
    """
    corpus = Corpus.open(where)
    commits = newest_commits(corpus, ["images"])
    index, _ = index_samples(corpus, commits, subset.selection)
    if subset.source is not None:
        sources = sorted({source for source, _ in index.shards})
        index = index.take(np.array([source == subset.source for source, _ in index.shards])[index.shard])
        if not len(index):
            raise RequestError(f"corpus {where}: source {subset.source!r} has no pictures; there are {sources}")
    if subset.coco:
        index = _coco(corpus, index, where)

    def stream() -> Iterator[StoredPicture]:
        for shard, rows in index.by_shard().items():
            wanted = set(rows)
            for line in read_rows(corpus, commits["images"][shard]):
                if line.row not in wanted:
                    continue
                try:
                    data = image_bytes(line.members)
                except BadImage as error:
                    raise RequestError(f"sample {line.key} of {where}: {error}; select those that have one") from None
                yield StoredPicture(line.key, data, str(line.scalars.get("caption") or ""))

    return PictureSet(where, len(index), stream, size, on_white=True)


def _coco(corpus: Corpus, index: SampleIndex, where: str) -> SampleIndex:
    """Keep the images that the rule of the source `coco` chooses, by the numbers in their keys."""
    commits = newest_commits(corpus, ["images"])["images"]
    numbers: list[int | None] = []
    for shard, rows in index.by_shard().items():
        keys = corpus.sidecar(commits[shard])["key"].to_pylist()
        numbers += [image_id(keys[row]) for row in rows]
    known = {number for number in numbers if number is not None}
    if len(known) < COCO_COUNT:
        raise RequestError(
            f"corpus {where}: {len(known):,} images of COCO, and coco-30k is chosen of all 40,504; build it whole with "
            "`microdit build configs/coco-val.yaml`"
        )
    chosen = choose(known, COCO_COUNT, COCO_SEED)
    return index.take(np.array([number in chosen for number in numbers]))


def read_images(corpus: Corpus, index: SampleIndex, side: int) -> dict[str, np.ndarray]:
    """Read the images of samples, uint8 (side, side, 3), by sample name in the index' order.

    Raises:
        RequestError: a sample has no picture.
    """

    def read(shard: ShardId, rows: list[int]) -> Iterator[tuple[str, np.ndarray]]:
        wanted = set(rows)
        for line in read_rows(corpus, commits[shard]):
            if line.row in wanted:
                name = f"{shard[0]}/{shard[1]}/{line.row}"
                try:
                    data = image_bytes(line.members)
                except BadImage as error:
                    raise RequestError(f"sample {name} cannot be compared with: {error}") from error
                yield name, square(decode(data, PILLOW_MAX_PIXELS, shrink_to=side).pixels, side)

    commits = newest_commits(corpus, ["images"])["images"]
    rows = index.by_shard()
    with ThreadPoolExecutor(2) as pool:
        return dict(pair for pairs in pool.map(lambda item: list(read(*item)), rows.items()) for pair in pairs)
