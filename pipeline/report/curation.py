"""Show what to choose by: the ends of scores, what filters would drop, duplicates, selections' funnels."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.report import charts
from microdit.pipeline.report.histograms import NUMERIC, SIZE_SCALARS
from microdit.pipeline.report.pictures import Reader, SampleRef, Thumbnail, thumbnail
from microdit.pipeline.selection.queries import Conditions, named_query, parse
from microdit.pipeline.selection.selections import Selection, changed_since, load_selection
from microdit.pipeline.selection.view import connected, makers, run
from microdit.pipeline.tables.database import SqlLimits
from microdit.pipeline.tables.sample_table import TableField, sample_table

SCORES = 16  # so many scores are shown with examples, the first ones
ENDS = {"low": 0.01, "middle": 0.5, "high": 0.99}  # quantiles, because the outermost are often broken
EXAMPLES = 3  # pictures of each end of a score
DROPPED = 5  # pictures of what a filter would drop
GROUPS = 3  # groups of duplicates that are the largest, and as many drawn of the others
MEMBERS = 5  # pictures of a group
OK = "status = 'ok'"
HAS_KEPT, KEPT = "(duplicate_keep IS NOT NULL)", "duplicate_keep"  # `clean` chooses among the rows that are left
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


@dataclass(frozen=True)
class Curation:
    """What the page shows to choose by."""

    scores: list["ScoreEnds"]
    filters: "Filters"
    groups: list["DuplicateGroups"]
    funnels: list["SelectionFunnel"]


def curation(
    corpus: Corpus,
    commits: Mapping[str, Sequence[Commit]],
    fields: Sequence[TableField],
    complete: Sequence[str],
    selections: Sequence[Selection],
) -> Curation:
    """Open the sample table once, and ask it for scores' ends, filters, duplicates and selections' funnels.

    Args:
        commits: by column the newest ones.
        complete: SQL conditions of a sample that has every column.
    """
    with connected(corpus, sample_table(corpus), SqlLimits()) as connection:
        view = _SampleView(corpus, connection, Reader(corpus, commits))
        columns = {row["column_name"] for row in view.rows("DESCRIBE samples")}
        kinds = [kind for kind in LINKS if f"{kind}_group" in columns]
        return Curation(
            scores=scores(view, fields),
            filters=filters(view, columns),
            groups=[shown for kind in kinds if (shown := groups(view, kind)) is not None],
            funnels=[selection_funnel(view, selection, complete) for selection in selections],
        )


@dataclass(frozen=True)
class _SampleView:
    """A corpus, the open view over its samples, and its pictures."""

    corpus: Corpus
    connection: duckdb.DuckDBPyConnection
    reader: Reader

    def rows(self, sql: str) -> list[dict[str, Any]]:
        return run(self.connection, sql).to_pylist()

    def count(self, condition: str, table: str = "samples") -> int:
        (row,) = self.rows(f"SELECT count(*) AS n FROM {table} WHERE {condition}")
        return int(row["n"])

    def thumbnails(self, pictures: Iterable[Mapping[str, Any]]) -> list[Thumbnail]:
        """Read small pictures of samples selected as `PICTURE`, without those that cannot be read."""
        refs = (SampleRef(**picture) for picture in pictures)
        return [picture for ref in refs if (picture := thumbnail(self.reader, ref)) is not None]


# -- scores ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ScoreEnd:
    """Pictures near one quantile of a score: `low`, `middle` or `high`."""

    name: str
    views: list[Thumbnail]


@dataclass(frozen=True)
class ScoreEnds:
    """A score with pictures near its ends and its middle."""

    title: str
    ends: list[ScoreEnd]


def scores(view: _SampleView, fields: Sequence[TableField]) -> list[ScoreEnds]:
    """Show of each score the pictures nearest to a low, the middle and a high quantile."""
    shown = []
    numeric = [one for one in fields if one.column.startswith("scores/") and one.type in NUMERIC]
    for score in [one for one in numeric if one.scalar not in SIZE_SCALARS][:SCORES]:
        x = f'CAST("{score.name}" AS DOUBLE)'
        (row,) = view.rows(
            f"SELECT quantile_disc(x, {list(ENDS.values())}) AS q FROM (SELECT {x} AS x FROM samples WHERE {OK}) "
            "WHERE isfinite(x)"
        )
        if row["q"] is not None and row["q"][0] != row["q"][-1]:
            shown.append(ScoreEnds(f"{score.scalar} ({score.column})", _ends(view, x, row["q"])))
    return shown


def _ends(view: _SampleView, x: str, quantiles: Sequence[float]) -> list[ScoreEnd]:
    """Show the pictures whose score, the SQL expression `x`, is nearest to each of the quantiles of `ENDS`."""
    sql = " UNION ALL ".join(
        f"SELECT * FROM (SELECT {PICTURE} AS picture, {x} AS x, {number} AS number FROM samples WHERE {OK} AND "
        f"isfinite({x}) ORDER BY abs({x} - ({value!r})), md5(id) LIMIT {EXAMPLES})"
        for number, value in enumerate(quantiles)
    )
    rows = sorted(view.rows(sql), key=lambda row: (row["number"], row["x"], row["picture"]["id"]))
    ends = []
    for number, name in enumerate(ENDS):
        nearest = [row for row in rows if row["number"] == number]
        values = {row["picture"]["id"]: charts.format_number(round(row["x"], 4)) for row in nearest}
        views = view.thumbnails(row["picture"] for row in nearest)
        ends.append(ScoreEnd(name, [replace(one, caption=values[one.id]) for one in views]))
    return ends


# -- filters -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Filter:
    """One condition of the query `clean`: how many kept images it would drop, with examples."""

    label: str
    condition: str
    absent: str | None = None
    """What makes the columns that it asks for, if they are not there."""
    drops: int = 0
    alone: int = 0
    """Dropped by no other condition."""
    unknown: int = 0
    """Without the score: dropped too."""
    views: list[Thumbnail] = field(default_factory=list)


@dataclass(frozen=True)
class Filters:
    """What each condition of the query `clean` would drop of the kept images, and all of them together."""

    rows: list[Filter]
    total: int
    dropped: int


def filters(view: _SampleView, columns: set[str]) -> Filters:
    """Count what each condition of the query `clean` would drop of the kept images, and all of them together.

    Args:
        columns: those of the view.
    """
    clean = parse(named_query("clean").sql).conditions()
    texts = [text for text in (clean.each if clean else []) if text != f"({OK})"]
    texts = [KEPT if text == HAS_KEPT else text for text in texts]
    if "semantic_keep" in columns:
        texts.insert(1, "semantic_keep")
    missing = {text: parse(f"SELECT * FROM samples WHERE {text}").columns - columns for text in texts}
    usable = [text for text in texts if not missing[text]]
    counts = _filter_counts(view, usable)
    rows = []
    for text in texts:
        if missing[text]:
            maker = next(iter(makers(missing[text])), f"a column {', '.join(sorted(missing[text]))}")
            rows.append(Filter(_label(text), _bare(text), absent=maker))
            continue
        number = usable.index(text)
        examples = view.rows(
            f"SELECT {PICTURE} AS picture FROM samples WHERE {OK} AND NOT ({text}) ORDER BY md5(id) LIMIT {DROPPED}"
        )
        rows.append(
            Filter(
                label=_label(text),
                condition=_bare(text),
                drops=counts[f"drops_{number}"],
                alone=counts[f"alone_{number}"],
                unknown=counts[f"unknown_{number}"],
                views=view.thumbnails(example["picture"] for example in examples),
            )
        )
    return Filters(rows, counts["total"], counts["dropped"])


def _filter_counts(view: _SampleView, conditions: Sequence[str]) -> dict[str, int]:
    """Count by one query `total` and `dropped`, and by number of the condition `drops_`, `alone_` and `unknown_`."""
    passed = [f"coalesce({text}, false)" for text in conditions]
    parts = ["count(*) AS total", f"count(*) FILTER (NOT ({' AND '.join(passed) or 'true'})) AS dropped"]
    for number, text in enumerate(conditions):
        others = " AND ".join(passed[:number] + passed[number + 1 :]) or "true"
        parts += [
            f"count(*) FILTER (NOT {passed[number]}) AS drops_{number}",
            f"count(*) FILTER (NOT {passed[number]} AND {others}) AS alone_{number}",
            f"count(*) FILTER (({text}) IS NULL) AS unknown_{number}",
        ]
    (counts,) = view.rows(f"SELECT {', '.join(parts)} FROM samples WHERE {OK}")
    return counts


def _label(condition: str) -> str:
    """Name a condition in words, or by itself."""
    if "greatest(" in condition:
        return "Long and narrow"
    columns = parse(f"SELECT * FROM samples WHERE {condition}").columns
    return next((words for name, words in WORDS.items() if name in columns), condition)


def _bare(condition: str) -> str:
    """Remove the parentheses that DuckDB puts around a whole condition."""
    inner = condition[1:-1] if condition.startswith("(") and condition.endswith(")") else condition
    try:
        parse(f"SELECT {inner}")
    except RequestError:  # the first parenthesis ends elsewhere
        return condition
    return inner


# -- duplicates --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DuplicateGroup:
    """One group of duplicates: how many images, and pictures of some, the kept one first."""

    size: int
    views: list[Thumbnail]


@dataclass(frozen=True)
class DuplicateGroups:
    """All groups of one kind (`duplicate` or `semantic`): how many, with how many members; and some of them."""

    kind: str
    count: int
    members: int
    shown: list[DuplicateGroup]


def groups(view: _SampleView, kind: str) -> DuplicateGroups | None:
    """Show the largest groups of duplicates and some others; None if there are none."""
    group, (distance, words) = f"{kind}_group", LINKS[kind]
    (count,) = view.rows(f"SELECT count(DISTINCT {group}) AS n, count({group}) AS members FROM samples WHERE {OK}")
    if not count["n"]:
        return None
    sql = (
        f"WITH sizes AS (SELECT {group} AS g, count(*) AS n FROM samples WHERE {group} IS NOT NULL GROUP BY 1), "
        "ranked AS (SELECT g, n, row_number() OVER (ORDER BY n DESC, g) AS rank FROM sizes), "
        f"drawn AS (SELECT * FROM ranked ORDER BY rank > {GROUPS}, "
        f"CASE WHEN rank > {GROUPS} THEN md5(g) END, rank LIMIT {2 * GROUPS}) "
        f"SELECT rank, n, {PICTURE} AS picture, {kind}_keep AS keep, {distance} AS far FROM samples JOIN drawn "
        f"ON {group} = g QUALIFY row_number() OVER (PARTITION BY g ORDER BY {kind}_keep DESC, id) <= {MEMBERS} "
        f"ORDER BY rank, {kind}_keep DESC, id"
    )
    shown: dict[int, DuplicateGroup] = {}
    for row in view.rows(sql):
        of_group = shown.setdefault(row["rank"], DuplicateGroup(row["n"], []))
        caption = "kept" if row["keep"] else words(row["far"])
        for picture in view.thumbnails([row["picture"]]):
            of_group.views.append(replace(picture, keep=row["keep"], caption=caption))
    return DuplicateGroups(kind, count["n"], count["members"], list(shown.values()))


# -- selections --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SelectionStep:
    """How many samples are left after a condition of a selection's query; `code` writes the label as code."""

    label: str
    count: int
    unknown: int = 0
    """For how many the condition is neither true nor false."""
    code: bool = False


@dataclass(frozen=True)
class SelectionFunnel:
    """From all inputs to the rows of a selection, condition by condition."""

    name: str
    hash: str
    steps: list[SelectionStep]
    problem: str | None
    """Why conditions are not shown."""
    changed: list[str]
    """The columns that have other commits now than when the selection was made."""


def selection_funnel(view: _SampleView, selection: Selection, complete: Sequence[str]) -> SelectionFunnel:
    """Count what each condition of a selection's query leaves, in the corpus as it is now."""
    full = f"{selection.name}@{selection.hash}"
    steps = [SelectionStep("every input", view.count("true")), SelectionStep("kept", view.count(OK))]
    problem = None
    try:
        conditions = parse(selection.query).conditions()
        if conditions is None:
            problem = "Its query is more than conditions on single rows: only what it began and ended with is shown."
        else:
            for step in _condition_steps(view, conditions):
                steps.append(step)  # one by one: those before an error are shown
        steps.append(SelectionStep("selected", selection.rows))
        view.connection.register("chosen", load_selection(view.corpus, full))
        joined = "samples JOIN chosen USING (source, shard, row)"
        steps.append(SelectionStep("and in every column", view.count(" AND ".join(["true", *complete]), joined)))
    except RequestError as error:  # the corpus no longer has a column, or the selection is damaged
        problem = str(error)
    return SelectionFunnel(selection.name, selection.hash, steps, problem, changed_since(view.corpus, full))


def _condition_steps(view: _SampleView, conditions: Conditions) -> Iterator[SelectionStep]:
    passed = [OK]
    for text in [text for text in conditions.each if text != f"({OK})"]:
        unknown = view.count(" AND ".join([*passed, f"({text}) IS NULL"]), conditions.table)
        passed.append(text)
        yield SelectionStep(_bare(text), view.count(" AND ".join(passed), conditions.table), unknown, code=True)
    for number in range(len(conditions.qualify)):
        clause = " AND ".join(conditions.qualify[: number + 1])
        left = f"(SELECT 1 FROM {conditions.table} WHERE {' AND '.join(passed)} QUALIFY {clause})"
        yield SelectionStep(_bare(conditions.qualify[number]), view.count("true", left), code=True)
