"""Show what to choose by: the ends of scores, what filters would drop, duplicates, selections' funnels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from microdit.pipeline.report import charts
from microdit.pipeline.report.filters import Filters, filters
from microdit.pipeline.report.histograms import NUMERIC, SIZE_SCALARS
from microdit.pipeline.report.sample_view import OK, PICTURE, SampleView
from microdit.pipeline.report.selection_funnel import SelectionFunnel, selection_funnel
from microdit.pipeline.report.stored import Thumbnail
from microdit.pipeline.selection.selections import Selection
from microdit.pipeline.tables.sample_table import TableField

SCORES = 16  # so many scores are shown with examples, the first ones
ENDS = {"low": 0.01, "middle": 0.5, "high": 0.99}  # quantiles, because the outermost are often broken
EXAMPLES = 3  # pictures of each end of a score
GROUPS = 3  # groups of duplicates that are the largest, and as many drawn of the others
MEMBERS = 5  # pictures of a group

LINKS = {  # kinds of groups: the number that says how near, and its words
    "duplicate": ("duplicate_distance", lambda value: f"{value} bit{'' if value == 1 else 's'} apart"),
    "semantic": ("semantic_similarity", lambda value: f"similarity {charts.format_number(round(value, 3))}"),
}


@dataclass(frozen=True)
class Curation:
    """Data of the page's section on choosing."""

    scores: list["ScoreEnds"]
    filters: "Filters"
    groups: list["DuplicateGroups"]
    funnels: list["SelectionFunnel"]


def curation(
    view: SampleView, fields: Sequence[TableField], complete: Sequence[str], selections: Sequence[Selection]
) -> Curation:
    """Ask for scores' ends, filters, duplicates and selections' funnels.

    Args:
        complete: SQL conditions of a sample that has every column.
    """
    columns = {row["column_name"] for row in view.rows("DESCRIBE samples")}
    kinds = [kind for kind in LINKS if f"{kind}_group" in columns]
    return Curation(
        scores=scores(view, fields),
        filters=filters(view, columns),
        groups=[shown for kind in kinds if (shown := groups(view, kind)) is not None],
        funnels=[selection_funnel(view.corpus, view.table, selection, complete) for selection in selections],
    )


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


def scores(view: SampleView, fields: Sequence[TableField]) -> list[ScoreEnds]:
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


def _ends(view: SampleView, x: str, quantiles: Sequence[float]) -> list[ScoreEnd]:
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


def groups(view: SampleView, kind: str) -> DuplicateGroups | None:
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
