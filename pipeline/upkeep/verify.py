"""`microdit verify`: read all that is committed and say what is not as docs/corpus.md promises."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, UNITS, column_kind, commit_name
from microdit.pipeline.corpus.records import Declaration, UnitCommit
from microdit.pipeline.selection.selections import load_selection
from microdit.pipeline.tables.published import Table
from microdit.pipeline.upkeep.verify_shard import Findings, Hashing, ShardCheck, Where


def verify(corpus: Corpus, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Check every newest commit: objects and checksums, rows, counts, members, keys, lineage, fingerprints, units.

    Every byte of the corpus is read. A build may go on meanwhile: what it adds is left for the next time.

    Args:
        progress: called with the number of shards that are done, and of all.

    Returns:
        dict: `ok`; `problems`, each with `kind`, `what` (an object of the corpus) and `detail`; `totals`: `shards`,
        `commits`, `units`, `open_units` (begun and not complete: no problem), `bytes`, and `samples` by column: `in`,
        `out`, `failed`.
    """
    whole = Findings()
    columns, sources = (_declarations(corpus, folder, whole) for folder in ("columns", "sources"))
    shards: dict[Where, dict[str, int]] = {}
    units: dict[Where, int] = {}
    for item in corpus.store.list("commits"):
        match = COMMIT.fullmatch(item.name)
        if not match or (match[1] not in columns and match[1] != UNITS) or match[2] not in sources:
            whole.problem("stray", item.name, "it is no commit of a declared column and source")
            continue
        newest = units if match[1] == UNITS else shards.setdefault((match[2], match[3]), {})
        slot: Any = (match[2], match[3]) if match[1] == UNITS else match[1]
        newest[slot] = max(newest.get(slot, 0), int(match[4]))

    def check(where: Where) -> tuple[Where, Findings]:
        return where, ShardCheck(corpus, where, shards[where], columns, sources).run()

    found: dict[Where, Findings] = {}
    for number, (where, shard) in enumerate(threaded(check, sorted(shards)), 1):
        found[where] = shard
        whole.problems += shard.problems
        whole.bytes += shard.bytes
        whole.commits += shard.commits
        for column, counts in shard.samples.items():
            whole.samples.setdefault(column, Counter()).update(counts)
        if progress:
            progress(number, len(shards))
    complete = _check_units(corpus, units, found, sources, whole)
    _check_keys(found, whole)
    _check_tables(corpus, whole)
    return {
        "corpus": corpus.url,
        "ok": not whole.problems,
        "problems": whole.problems,
        "totals": {
            "shards": sum("images" in generations for generations in shards.values()),
            "commits": whole.commits,
            "units": len(units),
            "open_units": len({(where[0], shard.unit) for where, shard in found.items() if shard.unit} - complete),
            "bytes": whole.bytes,
            "samples": {
                column: {name: counts[name] for name in ("in", "out", "failed")}
                for column, counts in sorted(whole.samples.items())
            },
        },
    }


def _declarations(corpus: Corpus, folder: str, whole: Findings) -> dict[str, Declaration | None]:
    """All declarations of columns or sources; None for one that is damaged."""
    found: dict[str, Declaration | None] = {}
    for item in corpus.store.list(folder):
        name = item.name.removeprefix(f"{folder}/").removesuffix(".json")
        try:
            declaration = corpus.column(name) if folder == "columns" else corpus.source(name)
            kind = column_kind(name) if folder == "columns" else "source"
            if (declaration.name, declaration.kind) != (name, kind):
                raise RequestError(f"it declares {declaration.name!r} of kind {declaration.kind!r}, expected {kind!r}")
        except RequestError as error:
            found[name] = None
            whole.problem("declaration", item.name, str(error))
        else:
            found[name] = declaration
    return found


def _check_units(
    corpus: Corpus,
    units: Mapping[Where, int],
    found: Mapping[Where, Findings],
    sources: Mapping[str, Declaration | None],
    whole: Findings,
) -> set[Where]:
    """The units that are complete."""
    shards: dict[Where, set[str]] = {}
    for (source, shard), findings in found.items():
        shards.setdefault((source, findings.unit), set()).add(shard)
    for (source, unit), generation in sorted(units.items()):
        name = commit_name(UNITS, source, unit, generation)
        try:
            record = UnitCommit.parse(corpus.store.get(name))
            if (record.source, record.unit, record.generation) != (source, unit, generation):
                raise ValueError(f"it is the commit of unit {record.unit!r} of {record.source!r}")
        except (ValueError, OSError, BaseError) as error:
            whole.problem("unit", name, first_line(error))
            continue
        declaration = sources[source]
        if declaration is not None and record.fingerprint != declaration.fingerprint:
            whole.problem("fingerprint", name, f"{record.fingerprint}, declared is {declaration.fingerprint}")
        there = shards.get((source, unit), set())
        missing = [shard for shard in record.shards if shard not in there]
        if any(corpus.store.exists(commit_name("images", source, shard, 0)) for shard in missing):
            continue  # completed since the listing
        extra = sorted(there.difference(record.shards))
        total = sum(found[source, shard].inputs for shard in record.shards if shard in there)
        if missing or extra:
            whole.problem("unit", name, f"shards that are not committed: {missing}; that it does not name: {extra}")
        elif total != record.inputs and set(record.shards) == there:
            whole.problem("unit", name, f"its shards have {total} inputs, it says {record.inputs}")
    return set(units)


def _check_keys(found: Mapping[Where, Findings], whole: Findings) -> None:
    """A key is there once among the images of a source that are ok."""
    by_source: dict[str, dict[str, pa.Array]] = {}
    for (source, shard), findings in found.items():
        if findings.keys is not None:
            by_source.setdefault(source, {})[shard] = findings.keys
            findings.keys = None
    for source, keys in by_source.items():
        counted = pc.value_counts(pa.chunked_array(list(keys.values()), pa.string()))
        double = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
        for key in double.to_pylist():
            where = [shard for shard, there in keys.items() if pc.index(there, key).as_py() >= 0]
            whole.problem("keys", f"images/{source}", f"key {key!r} is in the shards {where}")


def _check_tables(corpus: Corpus, whole: Findings) -> None:
    """The cached tables and the selections."""
    for item in corpus.store.list("tables"):
        if not item.name.endswith(".json"):
            continue
        try:
            table = Table.parse(corpus.store.get(item.name))
            if not table.object.name.startswith(item.name.removesuffix("json")):
                raise ValueError(f"it names {table.object.name!r}")
            with corpus.store.open(table.object.name) as file:
                hashing = Hashing(file)
                hashing.drain()
            if hashing.digest.hexdigest() != table.object.sha256:
                raise ValueError(f"{table.object.name} has another checksum")
        except FileNotFoundError:
            continue  # a cache: what is gone is made again
        except (ValueError, OSError, BaseError) as error:
            whole.problem("table", item.name, f"{first_line(error)}; remove the folder tables, it is made again")
    for item in corpus.store.list("selections"):
        try:
            load_selection(corpus, item.name.removeprefix("selections/").removesuffix(".parquet"))
        except RequestError as error:
            whole.problem("selection", item.name, str(error))
