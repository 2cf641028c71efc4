"""Tell from the commits what the shards of each column were worked on: which GPUs, and how many, or CPUs."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.errors import DamagedError
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.corpus.records import Commit

MOST = 64  # commits of a column that are read, evenly spaced

Devices = dict[str, int]
"""By name of a GPU how many of them; for `cpu` how many machines."""


def devices(corpus: Corpus, table: pa.Table) -> dict[str, Devices]:
    """Count the devices of each column of which a shard was worked on with a model, out of a commit table."""
    found: dict[str, Devices] = {}
    for column in sorted(set(table["column"].to_pylist()) - {IMAGES, UNITS}):
        lines = table.filter(pc.equal(table["column"], column)).select(["source", "shard", "generation"])
        step = max(1, -(-len(lines) // MOST))

        def read(line: dict[str, str | int], column: str = column) -> Commit | None:
            try:
                return corpus.commit(column, str(line["source"]), str(line["shard"]), int(line["generation"]))
            except (FileNotFoundError, DamagedError):
                return None

        commits = [commit for commit in threaded(read, lines[::step].to_pylist()) if commit is not None]
        with_model = [c for c in commits if c.device and (c.device != "cpu" or "encode_seconds" in c.timings)]
        if with_model:
            each = {(c.device, c.host if c.device == "cpu" else c.gpu or c.host) for c in with_model}
            found[column] = dict(sorted(Counter(device for device, _ in each).items()))
    return found
