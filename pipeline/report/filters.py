"""Show what each condition of the query `clean` would drop."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.report.sample_view import OK, PICTURE, SampleView
from microdit.pipeline.report.stored import Thumbnail
from microdit.pipeline.selection.queries import named_query, parse
from microdit.pipeline.selection.view import makers

DROPPED = 5  # pictures of what a filter would drop
COMPARED = ["(duplicate_keep IS NOT NULL)"]  # of `clean`: was a row compared? By the groups of its QUALIFY

WORDS = {  # the conditions of `clean`, by a column in them
    "duplicate_keep": "Nearly the same as another",
    "semantic_keep": "Of the same content as another",
    "contaminated": "Near an evaluation set",
    "nsfw": "Not safe for work",
    "text_area": "Much text",
    "width": "Small",
    "basic_sharpness": "Blurred",
}


@dataclass(frozen=True)
class Filter:
    """One condition of the query `clean`: how many kept images it would drop, with examples."""

    label: str
    condition: str
    absent: str | None = None
    """Commands that make the columns it asks for, if they are missing."""
    drops: int = 0
    alone: int = 0
    """Dropped by no other condition."""
    unknown: int = 0
    """Without the score: dropped too."""
    views: list[Thumbnail] = field(default_factory=list)


@dataclass(frozen=True)
class Filters:
    """Kept images that each condition of the query `clean` would drop, and all of them together."""

    rows: list[Filter]
    total: int
    dropped: int


def filters(view: SampleView, columns: set[str]) -> Filters:
    """Count what each condition of the query `clean` would drop of the kept images, and all of them together.

    Args:
        columns: those of the view.
    """
    criteria = _criteria("semantic_keep" in columns)
    missing = {
        one.condition: parse(f"SELECT * FROM samples WHERE {one.condition}").columns - columns for one in criteria
    }
    usable = [one for one in criteria if not missing[one.condition]]
    total, left = _left(view, []), _left(view, usable)
    rows = []
    for one in criteria:
        if missing[one.condition]:
            maker = next(iter(makers(missing[one.condition])), f"a column {', '.join(sorted(missing[one.condition]))}")
            rows.append(Filter(_label(one), bare(one.text), absent=maker))
            continue
        rows.append(
            Filter(
                label=_label(one),
                condition=bare(one.text),
                drops=total - _left(view, [one]),
                alone=_left(view, [other for other in usable if other != one]) - left,
                unknown=view.count(f"{OK} AND {one.unknown}"),
                views=view.thumbnails(example["picture"] for example in view.rows(_dropped(one))),
            )
        )
    return Filters(rows, total, total - left)


@dataclass(frozen=True)
class _Criterion:
    """A condition of single rows; with a group, what of each group is left is one row."""

    condition: str
    group: str | None = None

    @property
    def text(self) -> str:
        return self.condition if self.group is None else self.group

    @property
    def unknown(self) -> str:
        """Write the SQL of rows whose value is not known."""
        return f"({self.condition}) IS NULL" if self.group is None else f"NOT ({self.condition})"


def _criteria(semantic: bool) -> list[_Criterion]:
    """List the conditions of the query `clean`, and one on content if `semantic`.

    Each condition of its QUALIFY goes with that of its WHERE which asks whether a row was compared.
    """
    clean = parse(named_query("clean").sql).conditions()
    assert clean is not None
    criteria = [_Criterion(text) for text in clean.each if text != f"({OK})" and text not in COMPARED]
    groups = [(text, group) for text, group in zip(COMPARED, clean.qualify, strict=True) if text in clean.each]
    groups += [("(semantic_keep IS NOT NULL)", "one_per_group(semantic_group)")] if semantic else []
    return [*(_Criterion(text, group) for text, group in groups), *criteria]


def _left(view: SampleView, criteria: Sequence[_Criterion]) -> int:
    """Count the kept images that a query of these criteria would choose."""
    where = " AND ".join([OK, *(one.condition for one in criteria)])
    groups = " AND ".join(one.group for one in criteria if one.group is not None)
    return view.count("true", f"(SELECT 1 FROM samples WHERE {where}{f' QUALIFY {groups}' if groups else ''})")


def _dropped(one: _Criterion) -> str:
    """Write the SQL of some pictures that a criterion would drop."""
    kept = f"{one.condition} QUALIFY NOT {one.group}" if one.group is not None else f"NOT ({one.condition})"
    return f"SELECT {PICTURE} AS picture FROM samples WHERE {OK} AND {kept} ORDER BY md5(id) LIMIT {DROPPED}"


def _label(one: _Criterion) -> str:
    """Name a condition in words, or by itself."""
    if "greatest(" in one.condition:
        return "Long and narrow"
    return next((words for name, words in WORDS.items() if name in _columns(one)), one.condition)


def _columns(one: _Criterion) -> set[str]:
    return parse(f"SELECT * FROM samples WHERE {one.condition}").columns


def bare(condition: str) -> str:
    """Remove the parentheses that DuckDB puts around a whole condition."""
    inner = condition[1:-1] if condition.startswith("(") and condition.endswith(")") else condition
    try:
        parse(f"SELECT {inner}")
    except RequestError:  # the first parenthesis ends elsewhere
        return condition
    return inner
