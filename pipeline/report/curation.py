"""What the report shows to choose by: the ends of scores, what filters would drop, duplicates, selections' funnels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.report import charts
from microdit.pipeline.report.facts import NUMERIC, SIZE_SCALARS
from microdit.pipeline.report.pictures import Reader, thumbnail
from microdit.pipeline.selection.queries import named_query, parse
from microdit.pipeline.selection.selections import Selection, changed_since, load_selection
from microdit.pipeline.selection.view import connected, makers, run
from microdit.pipeline.tables.sample_table import TableField, sample_table

SCORES = 16  # so many scores are shown with examples, the first ones
ENDS = {"low": 0.01, "middle": 0.5, "high": 0.99}  # quantiles, because the outermost are often broken
EXAMPLES = 3  # pictures of each end of a score
DROPPED = 5  # pictures of what a filter would drop
GROUPS = 3  # groups of duplicates that are the largest, and as many drawn of the others
MEMBERS = 5  # pictures of a group
OK = "status = 'ok'"
PICTURE = "{'id': id, 'source': source, 'shard': shard, 'row': \"row\"}"

WORDS = {  # the conditions of `clean`, by a column in them
    "duplicate_keep": "Nearly the same as another",
    "semantic_keep": "Of the same content as another",
    "contaminated": "Near an evaluation set",
    "nsfw": "Not safe for work",
    "text_area": "Much text",
    "width": "Small",
    "basic_sharpness": "Blurred",
}

LINKS = {  # kinds of groups: the number that says how near, and its words
    "duplicate": ("duplicate_distance", lambda value: f"{value} bit{'' if value == 1 else 's'} apart"),
    "semantic": ("semantic_similarity", lambda value: f"similarity {charts.format_number(round(value, 3))}"),
}


def curation(
    corpus: Corpus,
    commits: Mapping[str, Sequence[Commit]],
    fields: Sequence[TableField],
    complete: Sequence[str],
    selections: Sequence[Selection],
) -> dict[str, Any]:
    """`scores`, `filters`, `groups` and `funnels`; the sample table is opened once.

    Args:
        complete: SQL conditions of a sample that has every column.
    """
    with connected(corpus, sample_table(corpus)) as connection:
        asked = _Asked(corpus, connection, Reader(corpus, commits))
        there = {row["column_name"] for row in asked.rows("DESCRIBE samples")}
        return {
            "scores": scores(asked, fields),
            "filters": filters(asked, there),
            "groups": [found for kind in LINKS if f"{kind}_group" in there and (found := groups(asked, kind))],
            "funnels": [selection_funnel(asked, selection, complete) for selection in selections],
        }


@dataclass(frozen=True)
class _Asked:
    """The corpus, its view, and its pictures."""

    corpus: Corpus
    connection: duckdb.DuckDBPyConnection
    reader: Reader

    def rows(self, sql: str) -> list[dict[str, Any]]:
        return run(self.connection, sql).to_pylist()

    def pictures(self, found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Small pictures of samples given as `PICTURE`, without those that cannot be read."""
        return [view for place in found if (view := thumbnail(self.reader, place)) is not None]


# -- scores ------------------------------------------------------------------------------------------------------------
def scores(asked: _Asked, fields: Sequence[TableField]) -> list[dict[str, Any]]:
    """Of each score the pictures nearest to a low, the middle and a high quantile: `title`, `ends`."""
    found = []
    numeric = [field for field in fields if field.column.startswith("scores/") and field.type in NUMERIC]
    for field in [field for field in numeric if field.scalar not in SIZE_SCALARS][:SCORES]:
        x = f'CAST("{field.name}" AS DOUBLE)'
        (places,) = asked.rows(
            f"SELECT quantile_disc(x, {list(ENDS.values())}) AS q FROM (SELECT {x} AS x FROM samples WHERE {OK}) "
            "WHERE isfinite(x)"
        )
        if places["q"] is None or places["q"][0] == places["q"][-1]:
            continue
        sql = " UNION ALL ".join(
            f"SELECT * FROM (SELECT {PICTURE} AS picture, {x} AS x, {number} AS place FROM samples WHERE {OK} AND "
            f"isfinite({x}) ORDER BY abs({x} - ({value!r})), md5(id) LIMIT {EXAMPLES})"
            for number, value in enumerate(places["q"])
        )
        rows = sorted(asked.rows(sql), key=lambda row: (row["place"], row["x"], row["picture"]["id"]))
        ends = []
        for number, name in enumerate(ENDS):
            of = [row for row in rows if row["place"] == number]
            values = {row["picture"]["id"]: row["x"] for row in of}
            views = asked.pictures([row["picture"] for row in of])
            for view in views:
                view["says"] = charts.format_number(round(values[view["id"]], 4))
            ends.append({"name": name, "views": views})
        found.append({"title": f"{field.scalar} ({field.column})", "name": field.name, "ends": ends})
    return found


# -- filters -----------------------------------------------------------------------------------------------------------
def filters(asked: _Asked, there: set[str]) -> dict[str, Any]:
    """What each condition of the query `clean` would drop of the kept images, and all of them together.

    `rows`: `label`, `condition`, and `drops`, `alone` (dropped by no other), `unknown` (without the score: dropped too)
    and `views`, or `absent`: what makes the columns that it asks for.
    """
    clean = parse(named_query("clean").sql).conditions()
    texts = [text for text in (clean.each if clean else []) if text != f"({OK})"]
    if "semantic_keep" in there:
        texts.insert(1, "semantic_keep")
    needs = {text: parse(f"SELECT * FROM samples WHERE {text}").columns - there for text in texts}
    usable = [text for text in texts if not needs[text]]
    passed = [f"coalesce({text}, false)" for text in usable]
    parts = ["count(*) AS total", f"count(*) FILTER (NOT ({' AND '.join(passed) or 'true'})) AS dropped"]
    for number, text in enumerate(usable):
        others = " AND ".join(passed[:number] + passed[number + 1 :]) or "true"
        parts += [
            f"count(*) FILTER (NOT {passed[number]}) AS drops_{number}",
            f"count(*) FILTER (NOT {passed[number]} AND {others}) AS alone_{number}",
            f"count(*) FILTER (({text}) IS NULL) AS unknown_{number}",
        ]
    (counts,) = asked.rows(f"SELECT {', '.join(parts)} FROM samples WHERE {OK}")
    rows = []
    for text in texts:
        row: dict[str, Any] = {"label": _label(text), "condition": _bare(text), "absent": None, "views": []}
        if needs[text]:
            row["absent"] = next(iter(makers(needs[text])), f"a column {', '.join(sorted(needs[text]))}")
        else:
            number = usable.index(text)
            row |= {name: counts[f"{name}_{number}"] for name in ("drops", "alone", "unknown")}
            examples = asked.rows(
                f"SELECT {PICTURE} AS picture FROM samples WHERE {OK} AND NOT ({text}) ORDER BY md5(id) LIMIT {DROPPED}"
            )
            row["views"] = asked.pictures([example["picture"] for example in examples])
        rows.append(row)
    return {"rows": rows, "total": counts["total"], "dropped": counts["dropped"]}


def _label(condition: str) -> str:
    if "greatest(" in condition:
        return "Long and narrow"
    columns = parse(f"SELECT * FROM samples WHERE {condition}").columns
    return next((words for name, words in WORDS.items() if name in columns), condition)


def _bare(condition: str) -> str:
    """Without the parentheses that DuckDB puts around a whole condition."""
    inner = condition[1:-1] if condition.startswith("(") and condition.endswith(")") else condition
    try:
        parse(f"SELECT {inner}")
    except RequestError:  # the first parenthesis ends elsewhere
        return condition
    return inner


# -- duplicates --------------------------------------------------------------------------------------------------------
def groups(asked: _Asked, kind: str) -> dict[str, Any] | None:
    """The largest groups of duplicates and some others: `count` of all, and `shown` with `size` and pictures."""
    group, (number, words) = f"{kind}_group", LINKS[kind]
    (count,) = asked.rows(f"SELECT count(DISTINCT {group}) AS n, count({group}) AS members FROM samples WHERE {OK}")
    if not count["n"]:
        return None
    sql = (
        f"WITH sizes AS (SELECT {group} AS g, count(*) AS n FROM samples WHERE {group} IS NOT NULL GROUP BY 1), "
        "placed AS (SELECT g, n, row_number() OVER (ORDER BY n DESC, g) AS place FROM sizes), "
        f"drawn AS (SELECT * FROM placed ORDER BY place > {GROUPS}, "
        f"CASE WHEN place > {GROUPS} THEN md5(g) END, place LIMIT {2 * GROUPS}) "
        f"SELECT place, n, {PICTURE} AS picture, {kind}_keep AS keep, {number} AS far FROM samples JOIN drawn "
        f"ON {group} = g QUALIFY row_number() OVER (PARTITION BY g ORDER BY {kind}_keep DESC, id) <= {MEMBERS} "
        f"ORDER BY place, {kind}_keep DESC, id"
    )
    shown: dict[int, dict[str, Any]] = {}
    for row in asked.rows(sql):
        entry = shown.setdefault(row["place"], {"size": row["n"], "views": []})
        for view in asked.pictures([row["picture"]]):
            entry["views"].append(view | {"keep": row["keep"], "says": "kept" if row["keep"] else words(row["far"])})
    return {"kind": kind, "count": count["n"], "members": count["members"], "shown": list(shown.values())}


# -- selections --------------------------------------------------------------------------------------------------------
def selection_funnel(asked: _Asked, selection: Selection, complete: Sequence[str]) -> dict[str, Any]:
    """From all inputs to the rows of a selection, condition by condition: `steps` with `label`, `count` and `unknown`.

    Counted in the corpus as it is now; `changed` are the columns that were others when the selection was made, and
    `problem` says why conditions are not shown.
    """

    def count(condition: str, table: str = "samples") -> int:
        (row,) = asked.rows(f"SELECT count(*) AS n FROM {table} WHERE {condition}")
        return int(row["n"])

    def step(label: str, count: int, unknown: int = 0, code: bool = False) -> dict[str, Any]:
        return {"label": label, "count": count, "unknown": unknown, "code": code}

    full = f"{selection.name}@{selection.hash}"
    steps = [step("every input", count("true")), step("kept", count(OK))]
    problem = None
    try:
        conditions = parse(selection.query).conditions()
        if conditions is None:
            problem = "Its query is more than conditions on single rows: only what it began and ended with is shown."
        else:
            passed = [OK]
            for text in [text for text in conditions.each if text != f"({OK})"]:
                unknown = count(" AND ".join([*passed, f"({text}) IS NULL"]), conditions.table)
                passed.append(text)
                steps.append(step(_bare(text), count(" AND ".join(passed), conditions.table), unknown, code=True))
        steps.append(step("selected", selection.rows))
        asked.connection.register("chosen", load_selection(asked.corpus, full))
        joined = "samples JOIN chosen USING (source, shard, row)"
        steps.append(step("and in every column", count(" AND ".join(["true", *complete]), joined)))
    except RequestError as error:  # the corpus no longer has a column, or the selection is damaged
        problem = str(error)
    return {
        "name": selection.name,
        "hash": selection.hash,
        "steps": steps,
        "problem": problem,
        "changed": changed_since(asked.corpus, full),
    }
