"""`microdit convert MDS CORPUS`: latents and text that the official micro_diffusion code has made, as a corpus.

`pipeline.mds.columns` says which column becomes which. Each MDS shard is a unit. What is committed is not written
again, so the same call goes on where one was stopped.
"""

import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from microdit.pipeline.base.progress import Progress, Snapshot
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.corpus.presence import presence
from microdit.pipeline.corpus.records import canonical
from microdit.pipeline.mds.columns import PICTURES, Conversion, Naming, last, plan_conversion
from microdit.pipeline.mds.convert_unit import Redo, convert_unit, shards_of
from microdit.pipeline.mds.format import hasher
from microdit.pipeline.mds.progress import ConversionProgress
from microdit.pipeline.mds.summary import ImportSummary, MdsColumnCounts, MdsUnitCounts, UnreadShard
from microdit.pipeline.stages.ingest import SCALARS, ingest_stage
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.tables.commit_table import Totals, commit_table, totals
from microdit.pipeline.upkeep.damage import damage


def to_corpus(
    folder: Path,
    url: str,
    naming: Naming,
    threads: int = 4,
    progress: Progress | None = None,
    repair: bool = False,
) -> ImportSummary:
    """Convert an MDS folder, or go on with it. The corpus is made if there is none.

    A shard that cannot be read is set aside (`failures/units/...`), and the rest goes on; the same call tries it again.

    Args:
        threads: MDS shards at a time.
        repair: read all that is committed in the corpus first (`verify`), and make again what is damaged, lost or
            stale of this source, and what hangs on it.

    Raises:
        RequestError: the folder, a name or the corpus does not fit.
    """
    began = time.monotonic()
    conversion = plan_conversion(folder, naming)
    corpus = _open_or_create(url)
    declare(corpus, conversion)
    redo: Redo = {}
    if repair:
        redo, notes = _damaged(corpus, conversion)
        if progress is not None:
            progress(Snapshot(time.monotonic() - began, [], notes))
    todo = _incomplete(corpus, conversion, redo)
    total = len(conversion.shards)
    reporter = ConversionProgress(progress, began, total, total - len(todo), threads)
    reporter.begin()
    aside: list[UnreadShard] = []
    with presence(corpus) if todo else nullcontext():  # so that no cleaner takes what it holds
        for unit in threaded(partial(convert_unit, corpus, conversion, redo=redo), todo, threads):
            if unit.message:
                aside.append(UnreadShard(conversion.shards[unit.number].samples, unit.message))
            reporter.add(unit.samples, unit.failed, unit.bytes, aside=bool(unit.message))
    return _summary(corpus, conversion, aside, reporter.samples, time.monotonic() - began)


def _open_or_create(url: str) -> Corpus:
    if open_store(url).exists("corpus.json"):
        return Corpus.open(url)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", last(url)).lstrip("-._") or "converted"
    return Corpus.create(url, name)


def declare(corpus: Corpus, conversion: Conversion) -> None:
    """Declare the source and the columns.

    Raises:
        RequestError: one is there and was made of something else.
    """
    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    digest = hashlib.sha256()
    for shard in conversion.shards:
        digest.update(canonical({"samples": shard.samples, **shard.raw_data.model_dump()}) + b"\n")
    made_by = {
        "adapter": "mds",
        "version": 1,
        "files": {"sha256": digest.hexdigest()},
        "units": len(conversion.shards),
        "images": ingest_stage(PICTURES) if conversion.pictures else None,
    }
    corpus.declare_source(conversion.naming.source, made_by)
    for column, spec in conversion.specs.items():
        corpus.declare_column(column, spec.stage, spec.scalars)


def _damaged(corpus: Corpus, conversion: Conversion) -> tuple[Redo, list[str]]:
    """Find what must be made again of the source; returns it, and notes about it for people."""
    found, source = damage(corpus), conversion.naming.source
    redo: Redo = {
        column: {shard for where, shard in found.redo.get(column, ()) if where == source}
        for column in (*conversion.columns, UNITS)
    }
    for column, spec in conversion.specs.items():  # captions before the text that hangs on them
        redo[column].update(*(redo[upstream] for upstream in spec.inputs))
    notes = [f"repair: {column}/{source}/{shard} is made again" for column in redo for shard in sorted(redo[column])]
    for problem in found.beyond:
        notes.append(f"repair: beyond its power: {problem}")
    return redo, notes


def _incomplete(corpus: Corpus, conversion: Conversion, redo: Redo) -> list[int]:
    """List the MDS shards of which something is not committed, or is made again."""
    source = conversion.naming.source
    committed = {
        column: {shard for _, shard in corpus.committed(column, source)} - redo.get(column, set())
        for column in (*conversion.columns, UNITS)
    }

    def complete(number: int) -> bool:
        unit, names = shards_of(corpus, conversion, number)
        return unit in committed[UNITS] and all(committed[column].issuperset(names) for column in conversion.columns)

    return [number for number in range(len(conversion.shards)) if not complete(number)]


def _summary(
    corpus: Corpus, conversion: Conversion, aside: Sequence[UnreadShard], written: int, seconds: float
) -> ImportSummary:
    source, counted = conversion.naming.source, totals(commit_table(corpus))
    columns = {column: MdsColumnCounts.of(counted.get((column, source), Totals())) for column in conversion.columns}
    inputs = sum(shard.samples for shard in conversion.shards)
    hashes = {name for shard in conversion.shards for name in shard.raw_data.hashes}
    committed_units = counted.get((UNITS, source), Totals()).done
    return ImportSummary(
        corpus=corpus.url,
        source=source,
        units=MdsUnitCounts(total=len(conversion.shards), read=committed_units, set_aside=len(aside)),
        inputs=inputs,
        unread=inputs - columns[IMAGES].inputs,
        columns=columns,
        set_aside=list(aside),
        left_out=conversion.left_out,
        unchecked=sorted(name for name in hashes if hasher(name) is None),
        written=written,
        seconds=round(seconds, 3),
    )
