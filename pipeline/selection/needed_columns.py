"""Find out which columns of the view `samples` a query reads: the parts of no others are made, fetched or opened."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation.job import CONTAMINATED, DUPLICATES, SEMANTIC
from microdit.pipeline.selection.queries import EXPECTED, parse
from microdit.pipeline.selection.running import EXPLAINED
from microdit.pipeline.tables.part_specs import ROWS, FieldGroup
from microdit.pipeline.tables.sample_table import ViewColumn, view_columns

DESCRIBES = re.compile(r"\s*(?:describe|desc|show)\b", re.I)  # what a view has, but none of its rows


class Needed(NamedTuple):
    """Columns and folders of table jobs that a query needs."""

    columns: list[ViewColumn]
    jobs: list[str]
    whole: bool
    """It may read columns that it does not name."""

    @property
    def groups(self) -> list[FieldGroup]:
        """The groups of fields that the columns are made of; first the one that says which rows there are."""
        return [ROWS, *sorted({group for column in self.columns for group in column.groups} - {ROWS})]


def needed(sql: str, columns: Sequence[ViewColumn], jobs: Mapping[str, str], rows_only: bool) -> Needed:
    """Find what a query needs: what it names, or all if it may read what it does not name.

    Args:
        columns: all of the view.
        jobs: by folder of each table job, the SQL that tells which samples it is about.
        rows_only: nothing but `source`, `shard`, `row` and `weight` is taken of its result.
    """
    explained = EXPLAINED.fullmatch(sql)
    try:
        whole = parse(explained[2] if explained else sql).reads_unnamed(rows_only)
    except RequestError as error:
        whole = str(error).endswith(EXPECTED)  # PIVOT and SUMMARIZE; what is wrong needs nothing
    whole = whole and not DESCRIBES.match(sql)
    folders = list(jobs) if whole else [folder for folder in asked_jobs(sql) if folder in jobs]
    text = " ".join([sql, *(jobs[folder] for folder in folders)])
    named = {*_named(text, columns)}
    return Needed([c for c in columns if whole or c.groups == (ROWS,) or c in named], folders, whole)


def named_groups(corpus: Corpus, sql: str) -> list[FieldGroup]:
    """List the groups of fields that stand in SQL."""
    return [group for column in _named(sql, view_columns(corpus.columns())) for group in column.groups]


def _named(sql: str, columns: Sequence[ViewColumn]) -> list[ViewColumn]:
    text = sql.lower()
    words = {*re.findall(r"\w+", text)}
    return [
        column
        for column in columns
        if (name := column.name.lower()) in words or (name in text and not re.fullmatch(r"\w+", name))
    ]


def asked_jobs(sql: str) -> list[str]:
    """Find the folders of the table jobs whose columns the SQL names."""
    folders = (DUPLICATES, SEMANTIC, CONTAMINATED)
    return [folder for folder in folders if folder.removeprefix("tables/").removesuffix("s") in sql.lower()]
