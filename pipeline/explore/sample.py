"""All that the corpus knows of one sample, groups of near pictures, and what failed; called in workers."""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.curation.job import CONTAMINATED, DUPLICATES, SEMANTIC
from microdit.pipeline.explore.condition import Condition, checked
from microdit.pipeline.explore.histograms import SHARES
from microdit.pipeline.explore.rows import Place, cursor, literal, page, place, plain, rows_at, run_bounds
from microdit.pipeline.explore.worker import WorkerView
from microdit.pipeline.tables.sample_table import view_columns

KINDS = {"duplicates": DUPLICATES, "semantic": SEMANTIC, "contaminated": CONTAMINATED}
MEMBERS = 24  # of a group that are shown
PROVENANCE = {
    *("origin", "license", "unit", "shard", "row", "sha256", "format", "bytes"),
    *("original_width", "original_height"),
}


def whole_row(view: WorkerView, at: Place) -> dict[str, Any]:
    """Read all columns of a row of the view; empty if there is none."""
    bounds = run_bounds(view)
    runs = [number for number, (first, last) in enumerate(bounds) if first <= at[:2] <= last]
    where = f"source = {literal(at[0])} AND shard = {literal(at[1])} AND row = {at[2]}"
    rows = view.rows(f"SELECT * FROM samples WHERE {where}", runs) if runs else []
    return rows[0] if rows else {}


def sample(view: WorkerView, at: Place) -> dict[str, Any]:
    """Describe one sample.

    Raises:
        RequestError: there is no such row.
    """
    row = whole_row(view, at)
    if not row:
        raise RequestError(f"row {at[2]} of shard {at[1]}, source {at[0]}: the corpus has none")
    declared, columns = view.corpus.columns(), view_columns(view.corpus.columns())
    captions = [one for one in columns if one.column.startswith("captions/") and one.sql == "caption"]
    numbers = [
        one for one in columns if one.column.startswith("scores/") and isinstance(row.get(one.name), int | float)
    ]
    latents = [one.column for one in columns if one.column.startswith("latents/") and one.sql == "ok" and row[one.name]]
    shown = {one.name for one in [*captions, *numbers]} | {"id", "source", "key", "status", "reason", "detail"}
    about = {
        one.name: row[one.name]
        for one in columns
        if one.column == IMAGES and one.name in (*PROVENANCE, "original_height")
    }
    fields = {
        name: value
        for name, value in row.items()
        if name not in shown and name not in about and value is not None and not name.startswith("has_")
    }
    fields["fields"] = _parsed(row.get("fields"))
    described: dict[str, Any] = plain(
        {
            **{name: row.get(name) for name in ("source", "key", "shard", "row", "width", "height", "status")},
            "captions": [
                {
                    "column": one.column,
                    "text": row[one.name],
                    "captioner": str(declared[one.column].made_by.get("captioner") or ""),
                }
                for one in captions
            ],
            "scores": [
                {"name": one.name, "column": one.name, "value": row[one.name]}
                for one in numbers
                if not isinstance(row[one.name], bool)
            ],
            "fields": {name: value for name, value in fields.items() if value not in (None, "", {})},
            "provenance": about,
            "latents": latents,
            "groups": _groups_of(view, row),
        }
    )
    return described


def _parsed(text: object) -> Any:
    """Read the JSON that the data set said of a sample, as far as it is any."""
    try:
        return json.loads(text) if isinstance(text, str) and text else None
    except (ValueError, RecursionError):
        return text


def percentile(value: float, quantiles: Sequence[float]) -> float | None:
    """Estimate which percentage of all values is at most this one."""
    if not quantiles:
        return None
    at = bisect_right(quantiles, value)
    if at == 0:
        return 0.0
    if at == len(quantiles):
        return 100.0
    low, high = quantiles[at - 1], quantiles[at]
    share = SHARES[at - 1] + (SHARES[at] - SHARES[at - 1]) * (value - low) / (high - low)
    return round(100 * share, 1)


# -- groups ------------------------------------------------------------------------------------------------------------
def _job(view: WorkerView, kind: str) -> str | None:
    """Name the table of a table job in SQL; None if it was not run on this corpus as it is."""
    folders = list(view.view.jobs)
    return f"job_{folders.index(KINDS[kind])}" if KINDS[kind] in folders else None


def _groups_of(view: WorkerView, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the groups that a sample is in."""
    groups = []
    for kind, name in (("duplicates", "duplicate"), ("semantic", "semantic")):
        job, group = _job(view, kind), row.get(f"{name}_group")
        if job is None or group is None:
            continue
        (count,) = view.rows(f"SELECT count(*) AS n FROM {job} WHERE {name}_group = {literal(group)}")
        where = f"{name}_group = {literal(group)}"
        groups.append({"kind": kind, "id": group, "rows": int(count["n"]), "kept": row[f"{name}_keep"], "where": where})
    if row.get("contaminated_by") is not None:
        where = f"contaminated_by = {literal(row['contaminated_by'])}"
        groups.append({"kind": "contaminated", "id": row["contaminated_by"], "rows": 1, "kept": False, "where": where})
    return groups


def groups(view: WorkerView, kind: str, condition: Condition, after: str, limit: int) -> dict[str, Any]:
    """List groups of near pictures, by their names."""
    job = _job(view, kind)
    if job is None:
        command = {"duplicates": "dedup", "semantic": "dedup --semantic", "contaminated": "decontaminate"}[kind]
        note = f"no groups of this kind yet: `microdit {command} {view.corpus.url}` finds them"
        return {"groups": [], "next": None, "note": note}
    group = {"duplicates": "duplicate_group", "semantic": "semantic_group", "contaminated": "contaminated_by"}[kind]
    keep = {"duplicates": "duplicate_keep", "semantic": "semantic_keep", "contaminated": "false"}[kind]
    only = ""
    if condition.text:
        chosen = condition.choose("source, shard, row")
        only = f"AND {group} IN (SELECT {group} FROM {job} SEMI JOIN (\n{chosen}) AS c USING (source, shard, row))"
    names = view.rows(
        f"SELECT {group} AS id, count(*) AS n FROM {job} WHERE {group} > {literal(after)} {only} "
        f"GROUP BY 1 ORDER BY 1 LIMIT {limit + 1}"
    )
    more, names = len(names) > limit, names[:limit]
    wanted = ", ".join(literal(one["id"]) for one in names)
    members = view.rows(
        f"SELECT {group} AS id, source, shard, row, {keep} AS kept FROM {job} WHERE {group} IN ({wanted or 'NULL'}) "
        f"QUALIFY row_number() OVER (PARTITION BY {group} ORDER BY {keep} DESC, source, shard, row) <= {MEMBERS} "
        f"ORDER BY 1, {keep} DESC, source, shard, row"
    )
    places = [(one["source"], one["shard"], int(one["row"])) for one in members]
    by_place = {(row["source"], row["shard"], row["row"]): row for row in rows_at(view, places)}
    found: dict[str, list[dict[str, Any]]] = {one["id"]: [] for one in names}
    for one, at in zip(members, places, strict=True):
        if at in by_place:
            found[one["id"]].append(by_place[at] | {"kept": bool(one["kept"])})
    counts = {one["id"]: int(one["n"]) for one in names}
    return {
        "groups": [{"id": id, "rows": rows, "count": counts[id]} for id, rows in found.items()],
        "next": names[-1]["id"] if more else None,
        "note": None,
    }


# -- failures ----------------------------------------------------------------------------------------------------------
def failures(view: WorkerView, condition: Condition) -> list[dict[str, Any]]:
    """Count the images that failed, by reason, with one example of the detail."""
    rows = view.rows(
        f"SELECT reason, count(*) AS n, min(detail) AS example FROM (\n"
        f"{condition.choose('status, reason, left(detail, 300) AS detail')}) AS chosen "
        "WHERE status = 'failed' GROUP BY 1 ORDER BY n DESC, reason"
    )
    return [
        {"column": IMAGES, "reason": row["reason"] or "", "rows": int(row["n"]), "example": row["example"]}
        for row in rows
    ]


def failed_rows(view: WorkerView, reason: str, after: str, limit: int) -> dict[str, Any]:
    """List images that failed for a reason, in the order of the table."""
    found = page(view, checked(f"status = 'failed' AND coalesce(reason, '') = {literal(reason)}"), after, "", limit)
    bounds = run_bounds(view)
    places = [place(cursor(row)) for row in found["rows"]]
    runs = [n for n, (first, last) in enumerate(bounds) if any(first <= at[:2] <= last for at in places)]
    wanted = ", ".join(f"({literal(source)}, {literal(shard)}, {row})" for source, shard, row in places)
    details = {}
    if places:
        sql = f"SELECT source, shard, row, detail FROM samples WHERE (source, shard, row) IN ({wanted})"
        details = {(one["source"], one["shard"], one["row"]): one["detail"] for one in view.rows(sql, runs)}
    rows = [row | {"detail": details.get(at), "picture": False} for row, at in zip(found["rows"], places, strict=True)]
    return {"rows": rows, "next": found["next"]}
