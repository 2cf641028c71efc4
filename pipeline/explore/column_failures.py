"""Rows that failed in other columns than the images, from commits and their sidecars."""

from typing import Any

import pyarrow.compute as pc

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.corpus.reasons import UPSTREAM
from microdit.pipeline.explore.rows import cursor, place
from microdit.pipeline.tables.commit_table import commit_table, newest_lines
from microdit.pipeline.tables.corpus_totals import corpus_totals

MOST_SHARDS = 256  # whose sidecars are read for one page
LONGEST = 2000  # characters of a detail


def column_reasons(corpus: Corpus) -> list[dict[str, Any]]:
    """Count failed rows by column and reason; those that had failed before, in an input, are left out."""
    reasons: dict[tuple[str, str], int] = {}
    for (column, _), total in corpus_totals(corpus).items():
        for reason, count in total.reasons.items():
            if column not in (IMAGES, UNITS) and reason != UPSTREAM:
                reasons[column, reason] = reasons.get((column, reason), 0) + count
    return [
        {"column": column, "reason": reason, "rows": count, "example": None}
        for (column, reason), count in sorted(reasons.items(), key=lambda one: (one[0][0], -one[1], one[0][1]))
    ]


def column_failed_rows(corpus: Corpus, column: str, reason: str, after: str, limit: int) -> dict[str, Any]:
    """List rows that failed in a column for a reason, by source, shard and row."""
    lines = newest_lines(commit_table(corpus))
    lines = lines.filter(pc.equal(lines["column"], column)).sort_by([("source", "ascending"), ("shard", "ascending")])
    start = place(after) if after else None
    rows: list[dict[str, Any]] = []
    read, more = 0, False
    for line in lines.select(["source", "shard", "generation", "reasons"]).to_pylist():
        if start is not None and (line["source"], line["shard"]) < start[:2]:
            continue
        if reason not in {one["reason"] for one in line["reasons"] or ()}:
            continue
        if len(rows) > limit or read >= MOST_SHARDS:
            more = True
            break
        read += 1
        commit = corpus.commit(column, line["source"], line["shard"], line["generation"])
        sidecar = corpus.sidecar(commit, ["row", "key", "reason", "detail"])
        for row in sidecar.filter(pc.equal(sidecar["reason"], reason)).to_pylist():
            at = (line["source"], line["shard"], row["row"])
            if start is None or at > start:
                about = {"source": at[0], "shard": at[1], "row": at[2], "key": row["key"]}
                rows.append(about | {"detail": (row["detail"] or "")[:LONGEST], "picture": True})
    more, rows = more or len(rows) > limit, rows[:limit]
    return {"rows": rows, "next": cursor(rows[-1]) if rows and more else None}
