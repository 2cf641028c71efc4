"""Give joined rows to Ray Data: a task reads one shard after the other and yields its rows."""

import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ray.data

from microdit.pipeline.access.joined import JoinedShard, read_joined
from microdit.pipeline.corpus.corpus import Corpus

MOST_TASKS = 1000


def ray_dataset(corpus: Corpus, shards: Sequence[JoinedShard]) -> ray.data.Dataset:
    """Make a lazy dataset of all rows: `id`, `source`, `shard`, `row`, `key`, `weight`, and by column its value."""
    items = [{"shard": pickle.dumps(shard)} for shard in shards]
    described = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_TASKS))
    return described.flat_map(partial(_rows, corpus))


def _rows(corpus: Corpus, item: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    for row in read_joined(corpus, pickle.loads(item["shard"])):
        where = {"source": row.source, "shard": row.shard, "row": row.row, "key": row.key}
        yield {"id": row.id, **where, "weight": row.weight} | {column: row[column] for column in row.lines}
