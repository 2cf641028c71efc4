"""Choose prompts by their lengths, a blocklist and duplicates, and bring them into their order."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.prompts import PromptsConfig
from microdit.pipeline.content.caption_faults import WORD
from microdit.pipeline.sources.synthesis.prompt_duplicates import (
    EXACT_FIELDS,
    MEMORY,
    NEAR_FIELDS,
    exact_columns,
    first_ones,
    near_columns,
)
from microdit.pipeline.sources.synthesis.prompt_table import SCHEMA
from microdit.pipeline.sources.synthesis.prompt_tally import LeftOut, RawPrompt, RawPrompts, shown
from microdit.pipeline.sources.synthesis.prompt_templates import mix
from microdit.pipeline.tables.database import connect

BATCH = 16_384
LEAST = 8192  # candidates that are read before duplicates are looked for


class Blocklist:
    """Words and phrases that no prompt may have, whatever their case.

    Raises:
        RequestError: an entry has no word.
    """

    def __init__(self, entries: Iterable[str], what: str):
        self.entries = sorted(set(entries))
        self._by_first: dict[str, list[list[str]]] = defaultdict(list)
        for entry in self.entries:
            words = WORD.findall(entry.casefold())
            if not words:
                raise RequestError(f"{what}.blocklist: {entry!r} has no word; expected words or phrases")
            self._by_first[words[0]].append(words)

    def find(self, text: str) -> str | None:
        """Return the first entry that a prompt has."""
        if not self._by_first:
            return None
        words = WORD.findall(text.casefold())
        for at, word in enumerate(words):
            for phrase in self._by_first.get(word, ()):
                if words[at : at + len(phrase)] == phrase:
                    return " ".join(phrase)
        return None


def accepted(prompts: RawPrompts, config: PromptsConfig, blocklist: Blocklist, left: LeftOut) -> RawPrompts:
    """Yield the prompts that lengths and the blocklist allow."""
    for prompt in prompts:
        words = len(WORD.findall(prompt.text)) or 1
        if len(prompt.text) > config.max_characters:
            what = f"{len(prompt.text):,} characters, at most {config.max_characters:,} are taken (max_characters)"
            left.add("too_long", f"{prompt.place}: {what}")
        elif config.max_words is not None and words > config.max_words:
            left.add("too_long", f"{prompt.place}: {words:,} words, at most {config.max_words:,} are taken (max_words)")
        elif words < config.min_words:
            left.add("too_short", f"{prompt.place}: {shown(prompt.text)}, at least {config.min_words} words are taken")
        elif (entry := blocklist.find(prompt.text)) is not None:
            left.add("blocked", f"{prompt.place}: {shown(prompt.text)} has {entry!r}")
        else:
            yield prompt


class Candidates:
    """Accepted prompts in Parquet files, with the hashes that duplicates are found by."""

    def __init__(self, config: PromptsConfig, folder: Path):
        self._folder, self._config = folder, config
        self.parts: list[Path] = []
        self.count = 0
        hashes = {"keep": [], "exact": EXACT_FIELDS, "near": [*EXACT_FIELDS, *NEAR_FIELDS]}[config.duplicates]
        self._schema = pa.schema([pa.field("number", pa.int64()), *SCHEMA, *hashes])

    def add(self, prompts: RawPrompts, most: int | None) -> int:
        """Write the next prompts, at most so many, as one more file; returns how many there were."""
        path, before = self._folder / f"candidates-{len(self.parts)}.parquet", self.count
        with pq.ParquetWriter(path, self._schema, compression="zstd") as writer:
            for some in chunks(islice(prompts, most), BATCH):
                alive()
                writer.write_batch(self._batch(some))
                self.count += len(some)
        self.parts.append(path)
        return self.count - before

    def _batch(self, some: list[RawPrompt]) -> pa.RecordBatch:
        texts = [prompt.text for prompt in some]
        columns: dict[str, pa.Array] = {
            "number": pa.array(range(self.count, self.count + len(some)), pa.int64()),
            "row": pa.array([prompt.row for prompt in some], pa.int64()),
            "text": pa.array(texts, pa.string()),
            "fields": pa.array([json.dumps(prompt.fields, ensure_ascii=False) for prompt in some], pa.string()),
        }
        columns |= exact_columns(texts) if self._config.duplicates != "keep" else {}
        columns |= near_columns(texts) if self._config.duplicates == "near" else {}
        return pa.RecordBatch.from_arrays([columns[name] for name in self._schema.names], schema=self._schema)

    def read(self, keep: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Read those of the prompts that are to be kept, in order."""
        at = 0
        for path in self.parts:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH, columns=SCHEMA.names, use_threads=False):
                    alive()
                    yield batch.filter(pa.array(keep[at : at + len(batch)])).cast(SCHEMA)
                    at += len(batch)


def choose(prompts: RawPrompts, config: PromptsConfig, folder: Path, left: LeftOut) -> Iterator[pa.RecordBatch]:
    """Drop duplicates, and give the prompts in their order up to the limit, as batches of `SCHEMA`.

    With a limit no more prompts are read than are needed: twice as many each time, until enough are left.

    Args:
        folder: for temporary files.
        left: receives the counts of duplicates, before the first batch.
    """
    candidates, limit = Candidates(config, folder), config.limit
    sort = config.shuffle is not None and config.origin != "templates"  # combinations come shuffled
    while True:
        most = None if limit is None or sort else max(limit, LEAST, candidates.count)
        ended = candidates.add(prompts, most) == 0 or most is None
        equal = similar = np.zeros(candidates.count, bool)
        if config.duplicates != "keep":
            equal, similar = first_ones(candidates.parts, candidates.count, config.duplicates == "near", folder)
        keep = ~(equal | similar)
        if ended or (limit is not None and keep.sum() >= limit):
            break
    if limit is not None and not sort and keep.sum() > limit:
        last = int(np.flatnonzero(keep)[limit - 1]) + 1
        keep[last:] = equal[last:] = similar[last:] = False
    for reason, repeated in (("duplicate", equal), ("near_duplicate", similar)):
        if count := int(repeated.sum()):
            left.counts[reason] += count
    chosen = candidates.read(keep)
    return _shuffled(chosen, int(config.shuffle or 0), limit, folder) if sort else chosen


def _shuffled(
    batches: Iterable[pa.RecordBatch], seed: int, limit: int | None, folder: Path
) -> Iterator[pa.RecordBatch]:
    """Sort prompts by hashes of their rows and the seed; what does not fit into memory goes to the folder."""
    path = folder / "sorted.parquet"
    start = mix(np.array([seed % (1 << 64)], np.uint64))
    with pq.ParquetWriter(path, SCHEMA.append(pa.field("place", pa.uint64())), compression="zstd") as writer:
        for batch in batches:
            place = mix(batch["row"].to_numpy().astype(np.uint64) ^ start)
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, pa.array(place)], schema=writer.schema))
    with connect(memory_limit=MEMORY, temp_directory=str(folder), threads=2) as database:
        some = "" if limit is None else f" LIMIT {limit}"
        file = str(path).replace("'", "''")
        sql = f"SELECT row, text, fields FROM read_parquet('{file}') ORDER BY place, row{some}"
        for batch in database.sql(sql).to_arrow_reader(BATCH):
            alive()
            yield batch.cast(SCHEMA)
