"""What is in a corpus and how far it is, and what a killed writer left in it: status, ls, gc, verify."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import failures, read_failure
from microdit.pipeline.corpus.names import UNITS
from microdit.pipeline.tables.commit_table import Totals, commit_table, totals


# -- status ----------------------------------------------------------------------------------------------------------
def status(corpus: Corpus) -> dict[str, Any]:
    """How far a corpus is, for people and as JSON.

    `sources`, by name: `units` (how many its declaration says, None if it does not), `units_done`, `inputs` (of them).
    `columns`, by name and source: `done`, `left`, `set_aside` and `stale` (shards; `left` of the images is None while
    units are missing, because nobody knows yet how many shards they have), `in`, `out`, `failed` (samples), `reasons`,
    `bytes`, `seconds` (of work), `rate` (samples a second of one worker). `set_aside`: what was given up, and why.
    """
    declared = sorted(corpus.columns())
    table = commit_table(corpus)
    found = totals(table)
    sources = {}
    for name in sorted(corpus.sources()):
        units, expected = found.get((UNITS, name), Totals()), corpus.source(name).made_by.get("units")
        sources[name] = {
            "units": expected if isinstance(expected, int) else None,
            "units_done": units.done,
            "inputs": units.inputs,
        }
    aside = [record for column in [*declared, UNITS] for record in _set_aside(corpus, column, table)]
    given_up = Counter((record["column"], record["source"]) for record in aside)
    columns: dict[str, dict[str, Any]] = {column: {} for column in declared}
    for column, source in dict.fromkeys([*((c, s) for c in declared for s in sources), *found, *given_up]):
        if column not in columns:
            continue
        there = found.get((column, source), Totals())
        images = found.get(("images", source), Totals()).done
        complete = source in sources and sources[source]["units"] == sources[source]["units_done"]
        columns[column][source] = {
            "done": there.done,
            "left": images - there.done if column != "images" else 0 if complete else None,
            "set_aside": given_up[column, source],
            "stale": there.stale,
            "in": there.inputs,
            "out": there.out,
            "failed": there.failed,
            "bytes": there.bytes,
            "seconds": round(there.seconds, 3),
            "rate": round(there.inputs / there.seconds, 3) if there.seconds else None,
            "reasons": dict(sorted(there.reasons.items())),
        }
    return {
        "corpus": corpus.url,
        "name": corpus.name,
        "shard_samples": corpus.shard_samples,
        "sources": sources,
        "columns": columns,
        "set_aside": aside,
    }


def _set_aside(corpus: Corpus, column: str, table: pa.Table) -> Iterator[dict[str, Any]]:
    if not (recorded := failures(corpus, column)):
        return
    there = table.filter(pc.equal(table["column"], column))
    done = set(zip(there["source"].to_pylist(), there["shard"].to_pylist(), strict=True))
    for (source, shard), number in sorted(recorded.items()):
        if (source, shard) not in done:
            yield read_failure(corpus, column, source, shard, number).model_dump(exclude={"traceback", "version"})


# -- committed objects -----------------------------------------------------------------------------------------------
def ls(corpus: Corpus, column: str) -> Iterator[str]:
    """Paths or URLs of the committed objects of a column, by source and shard, for any library that reads them.

    Shards without a sample are left out: `datasets` takes the features from the first one.

    Raises:
        RequestError: there is no such column.
    """
    corpus.column(column)
    for commit in corpus.commits(column):
        if commit.counts["out"]:
            yield f"{corpus.url}/{commit.object.name}"
