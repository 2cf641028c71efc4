"""Pages of samples in the order of the table, counts, and samples drawn at random; called in workers."""

import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.names import COMMIT, IMAGES, SHARD, SOURCE, ShardId
from microdit.pipeline.explore.columns import caption_column
from microdit.pipeline.explore.condition import Condition, both, checked
from microdit.pipeline.explore.worker import WorkerView
from microdit.pipeline.tables.part_specs import runs_of

Row = dict[str, Any]
Place = tuple[str, str, int]  # source, shard, row
CURSOR = re.compile(rf"({SOURCE.pattern})/({SHARD.pattern})/(0|[1-9][0-9]{{0,9}})")
CAPTION = 600  # characters of a caption in a row
FIRST_RUNS = 1  # parts that are asked first; twice as many each time that they do not fill the page
MOST_RUNS = 64
DRAWN_ROWS = 1_000_000  # of the parts from which rows are drawn


def cursor(row: Row) -> str:
    """Write a row's place as a cursor."""
    return f"{row['source']}/{row['shard']}/{row['row']}"


def place(text: str) -> Place:
    """Read a cursor; raises RequestError if it is none."""
    match = CURSOR.fullmatch(text)
    if match is None:
        raise RequestError(f"cursor {text[:80]!r}: expected one that a page gave, such as demo/demo-000000-00/7")
    return match[1], match[2], int(match[3])


def literal(value: str) -> str:
    """Write a SQL string."""
    return "'" + value.replace("'", "''") + "'"


def shown(view: WorkerView) -> str:
    """Write the SQL of the columns of a row on the page."""
    declared = view.corpus.columns()
    size = [name if name in declared[IMAGES].scalars else f"NULL AS {name}" for name in ("width", "height")]
    caption = f"left({quoted(caption_column(declared))}, {CAPTION}) AS caption"
    return ", ".join(["source", "key", "shard", "row", "status", "reason", *size, caption])


def quoted(name: str) -> str:
    """Write a SQL name."""
    return '"' + name.replace('"', '""') + '"'


def run_bounds(view: WorkerView) -> list[tuple[ShardId, ShardId]]:
    """List the first and the last shard of each part of the table, in order."""
    matches = (COMMIT.fullmatch(name) for name in view.view.table.names if name.startswith(f"commits/{IMAGES}/"))
    runs = runs_of((match[2], match[3]) for match in matches if match and match[1] == IMAGES)
    return [(run[0], run[-1]) for run in runs]


def page(view: WorkerView, condition: Condition, after: str, before: str, limit: int) -> dict[str, Any]:
    """Read the rows that come after a place, or before one, in the order of source, shard and row.

    Parts of the table that cannot have any are not read, and of the others no more than the page needs: the view joins
    its columns row by row before it filters them, so that captions are read when it is known whose.
    """
    start = place(after or before) if after or before else None
    backwards = bool(before) and not after
    places: list[Place] = []
    for runs in _windows(view, condition, start, backwards):
        sql = _page_sql(condition, start, backwards, limit + 1 - len(places))
        places += [(row["source"], row["shard"], row["row"]) for row in view.rows(sql, runs)]
        if len(places) > limit:
            break
    more, places = len(places) > limit, places[:limit]
    rows = rows_at(view, places[::-1] if backwards else places)
    ahead, behind = (bool(rows), more) if backwards else (more, start is not None and bool(rows))
    return {
        "rows": rows,
        "next": cursor(rows[-1]) if rows and ahead else None,
        "previous": cursor(rows[0]) if rows and behind else None,
    }


def last(view: WorkerView, limit: int) -> list[Row]:
    """Read the last good rows of the table, the last one first: of a source that grows these are the newest."""
    condition, places = checked("status = 'ok'"), list[Place]()
    for runs in _windows(view, condition, None, backwards=True):
        found = view.rows(_page_sql(condition, None, True, limit - len(places)), runs)
        places += [(row["source"], row["shard"], row["row"]) for row in found]
        if len(places) >= limit:
            break
    return rows_at(view, places)


def _windows(
    view: WorkerView, condition: Condition, start: Place | None, backwards: bool
) -> Iterator[Sequence[int] | None]:
    """Give the parts to ask in turn; None is all at once."""
    if not condition.by_row:
        yield None
        return
    bounds = run_bounds(view)
    numbers = list(range(len(bounds)))
    if start is not None:
        shard = start[:2]
        numbers = [n for n in numbers if (bounds[n][0] <= shard if backwards else bounds[n][1] >= shard)]
    if backwards:
        numbers.reverse()
    many = FIRST_RUNS
    while numbers:
        yield sorted(numbers[:many])
        numbers, many = numbers[many:], min(2 * many, MOST_RUNS)


def _page_sql(condition: Condition, start: Place | None, backwards: bool, limit: int) -> str:
    way, sign = ("DESC", "<") if backwards else ("ASC", ">")
    only = ""
    if start is not None:
        source, shard, row = literal(start[0]), literal(start[1]), start[2]
        only = (
            f"WHERE source {sign}= {source} AND (source {sign} {source} OR shard {sign} {shard} "
            f"OR (shard = {shard} AND row {sign} {row}))"
        )
    order = ", ".join(f"{name} {way}" for name in ("source", "shard", "row"))
    chosen = condition.choose("source, shard, row")
    return f"SELECT * FROM (\n{chosen}) AS chosen {only} ORDER BY {order} LIMIT {limit}"


def drawn(view: WorkerView, condition: Condition, limit: int, seed: str) -> list[Row]:
    """Draw rows at random; the same seed draws the same ones.

    Of a large table they are drawn from some of its parts, which are drawn first, if these have as many.
    """
    sql = (
        f"SELECT source, shard, row FROM (\n{condition.choose('source, shard, row')}) AS chosen "
        f"ORDER BY hash(source, shard, row, {literal(seed)}) LIMIT {limit}"
    )
    best: list[Row] = []
    if condition.by_row:
        best = view.rows(sql, _drawn_runs(view, seed))
    if len(best) < limit:
        best = view.rows(sql)
    return rows_at(view, [(row["source"], row["shard"], row["row"]) for row in best])


def _drawn_runs(view: WorkerView, seed: str) -> list[int]:
    """Draw parts of the table that have `DRAWN_ROWS` rows together."""
    rows = view.view.files.rows()
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    taken, count = [], 0
    for number in order:
        if count >= DRAWN_ROWS:
            break
        taken.append(number)
        count += rows[number]
    return sorted(taken)


def rows_at(view: WorkerView, places: Sequence[Place]) -> list[Row]:
    """Read rows by their places, in that order; those that are not there are left out."""
    if not places:
        return []
    bounds = run_bounds(view)
    runs = [n for n, (first, last) in enumerate(bounds) if any(first <= at[:2] <= last for at in places)]
    wanted = ", ".join(f"({literal(source)}, {literal(shard)}, {row})" for source, shard, row in places)
    sql = f"SELECT {shown(view)} FROM samples WHERE (source, shard, row) IN ({wanted})"
    found = {(row["source"], row["shard"], row["row"]): row for row in view.rows(sql, runs)} if runs else {}
    return [found[at] for at in places if at in found]


def count(view: WorkerView, condition: Condition) -> int:
    """Count the rows that a condition chooses."""
    (row,) = view.rows(f"SELECT count(*) AS n FROM (\n{condition.choose('source')}) AS chosen")
    return int(row["n"])


def count_both(view: WorkerView, a: Condition, b: Condition) -> int:
    """Count the rows that two conditions choose both."""
    if a.by_row and b.by_row:
        return count(view, both(a, b))
    chosen = [one.choose("source, shard, row") for one in (a, b)]
    (row,) = view.rows(
        f"SELECT count(*) AS n FROM (\n{chosen[0]}) AS a SEMI JOIN (\n{chosen[1]}) AS b USING (source, shard, row)"
    )
    return int(row["n"])


def has_pictures(view: WorkerView) -> bool:
    """Tell whether any sample has a picture: `microdit convert` makes some that have latents alone."""
    if "width" not in view.corpus.columns()[IMAGES].scalars:
        return True
    (row,) = view.rows("SELECT count(width) AS n FROM samples")
    return int(row["n"]) > 0


def count_sources(view: WorkerView) -> list[dict[str, Any]]:
    """Count the rows of each source."""
    rows = view.rows("SELECT source AS name, count(*) AS rows FROM samples GROUP BY 1 ORDER BY 1")
    return [{"name": row["name"], "rows": int(row["rows"])} for row in rows]


def find(view: WorkerView, source: str, key: str) -> Place | None:
    """Find the place of a sample by its key; of rows that repeat it, the one that is ok."""
    where = f"source = {literal(source)} AND key = {literal(key)}"
    rows = view.rows(f"SELECT shard, row FROM samples WHERE {where} ORDER BY status = 'ok' DESC, shard, row LIMIT 1")
    return (source, str(rows[0]["shard"]), int(rows[0]["row"])) if rows else None


def plain(value: Any) -> Any:
    """Make a value one that JSON has: NaN and infinity become null, and what it has no kind for a text."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
