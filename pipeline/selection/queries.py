"""Queries that choose samples: the named ones (configs/queries/), and the analysis of one by DuckDB's parser."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import duckdb

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.yaml import HOME
from microdit.pipeline.tables.database import MOST_DEPTH, connect

FOLDER = HOME / "configs/queries"
NOW = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}  # may stand without ()
STEADY = {"error"}  # DuckDB calls it volatile, so that it is not left out
EXPECTED = "expected one SELECT over the view samples"
TOO_DEEP = f"SQL: it is nested too deeply; expected at most {MOST_DEPTH} levels"
Node = dict[str, Any]  # an object of a syntax tree


# -- named queries -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class NamedQuery:
    """A query of configs/queries: the comment at its head, and its SQL."""

    name: str
    about: str
    sql: str


def named_queries() -> list[NamedQuery]:
    """Read all named queries, in the order of their names."""
    paths = sorted(FOLDER.glob("*.sql"), key=lambda path: path.stem)
    return [_read(path.stem, path.read_text(encoding="utf-8")) for path in paths]


def named_query(name: str) -> NamedQuery:
    """Read one named query.

    Raises:
        RequestError: there is none of that name; the message lists them.
    """
    known = {query.name: query for query in named_queries()}
    if name not in known:
        lines = "".join(f"\n  {query.name}: {query.about}" for query in known.values())
        raise RequestError(f"there is no query named {name!r}; give SQL behind the name, or take one of these:{lines}")
    return known[name]


def _read(name: str, text: str) -> NamedQuery:
    lines = text.strip().splitlines()
    head = next(number for number, line in enumerate(lines) if not line.startswith("--"))
    about = " ".join(line.removeprefix("--").strip() for line in lines[:head])
    return NamedQuery(name, about, "\n".join(lines[head:]))


# -- analysing a query -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Parsed:
    """The syntax tree of a SELECT, from DuckDB's parser (`json_serialize_sql`)."""

    tree: Node

    @cached_property
    def columns(self) -> set[str]:
        """Names, in lower case, that are read as columns; also aliases, and columns of tables made in the query."""
        return {
            str(part["column_names"][-1]).lower() for part in _parts(self.tree) if part.get("class") == "COLUMN_REF"
        }

    @cached_property
    def star(self) -> bool:
        """All columns are read: `*`, or COLUMNS(...)."""
        return any(part.get("class") == "STAR" for part in _parts(self.tree))

    def reads_unnamed(self, rows_only: bool = False) -> bool:
        """Tell whether columns may be read that the text does not name.

        All of them, a row as a whole, by their place, or by a NATURAL join.

        Args:
            rows_only: nothing but `source`, `shard`, `row` and `weight` is taken of the result, so that a `*` that
                stands for the samples as they are says no more than these.
        """
        node = self.tree["statements"][0]["node"]
        if rows_only and self._plain and _stars(node):
            left_out = [] if _orders_by_place(node) else _stars(node)
        else:
            left_out = _orders(node)  # ORDER BY ALL is by what the list names
        parts = [part for part in _parts(self.tree) if not any(part is star for star in left_out)]
        tables = {str(part.get(name, "")).lower() for part in parts if "table_name" in part or "ref_type" in part
                  for name in ("alias", "table_name")}  # fmt: skip
        rows = self.columns & (tables - {""})
        unnamed = any(part.get("class") in ("STAR", "POSITIONAL_REFERENCE") for part in parts)
        return unnamed or bool(rows) or any(part.get("ref_type") == "NATURAL" for part in parts)

    @property
    def _plain(self) -> bool:
        """Whether it is a SELECT from `samples` by conditions, and no more."""
        node = self.tree["statements"][0]["node"]
        table = node.get("from_table") or {}
        return (
            node["type"] == "SELECT_NODE"
            and (table.get("type"), str(table.get("table_name")).lower()) == ("BASE_TABLE", "samples")
            and not any(node[part] for part in ("group_expressions", "having", "sample"))
            and not (table.get("sample") or node["cte_map"]["map"])
        )

    def unsteady(self) -> str | None:
        """Name what may give other rows on another day; None if there is nothing."""
        with _parser().cursor() as connection:
            functions = connection.sql("SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'")
            names = {name for (name,) in functions.fetchall()} - STEADY
        for part in _parts(self.tree):
            name = str(part.get("function_name", "")).lower()
            if part.get("class") == "FUNCTION" and name in names:
                return f"{name}()"
            sample = part.get("sample")
            if isinstance(sample, dict) and sample.get("seed") == -1:
                return "SAMPLE without REPEATABLE"
        return next(iter(sorted(self.columns & NOW)), None)

    def conditions(self) -> "Conditions | None":
        """Split its WHERE and QUALIFY into conditions; None if it is more than a SELECT from `samples` by them.

        Raises:
            RequestError: they are nested too deeply.
        """
        if not self._plain:
            return None
        node = self.tree["statements"][0]["node"]
        table = node["from_table"]
        alias = str(table.get("alias") or "samples").replace('"', '""')
        try:
            where, qualify = (_sql(_conjuncts(node[part])) for part in ("where_clause", "qualify"))
        except RecursionError:
            raise RequestError(TOO_DEEP) from None
        return Conditions(f'samples AS "{alias}"', where, qualify)


@dataclass(frozen=True)
class Conditions:
    """The conditions that a WHERE and a QUALIFY join by AND, as DuckDB writes them."""

    table: str
    """The text after FROM."""
    each: list[str]
    """Of WHERE: each is about one row."""
    qualify: list[str]
    """Of QUALIFY: about the rows that are left by WHERE."""


def parse(sql: str) -> Parsed:
    """Parse one SELECT.

    Raises:
        RequestError: the SQL is wrong, or something else.
    """
    try:
        with _parser().cursor() as connection:
            tree = json.loads(_value(connection, "SELECT json_serialize_sql(?::VARCHAR)", sql))
    except RecursionError:
        raise RequestError(TOO_DEEP) from None
    if tree["error"]:
        if "Max expression depth" in tree["error_message"]:
            raise RequestError(TOO_DEEP)
        raise RequestError(f"SQL: {tree['error_message'] if tree['error_type'] == 'parser' else EXPECTED}")
    if len(tree["statements"]) != 1:
        raise RequestError(f"SQL: {len(tree['statements'])} statements; {EXPECTED}")
    return Parsed(tree)


def _sql(conditions: list[Node]) -> list[str]:
    """Write expressions of a tree as SQL."""
    texts = []
    with _parser().cursor() as connection:
        tree = json.loads(_value(connection, "SELECT json_serialize_sql(?::VARCHAR)", "SELECT 1 WHERE true"))
        for condition in conditions:
            tree["statements"][0]["node"]["where_clause"] = condition
            text = _value(connection, "SELECT json_deserialize_sql(?::JSON)", json.dumps(tree))
            texts.append(text.removeprefix("SELECT 1 WHERE "))
    return texts


@lru_cache(maxsize=1)
def _parser() -> duckdb.DuckDBPyConnection:
    """Return the one connection for parsing: it takes longer to start than to parse."""
    return connect()


def _value(connection: duckdb.DuckDBPyConnection, sql: str, argument: str) -> str:
    row = connection.execute(sql, [argument]).fetchone()
    assert row is not None
    return str(row[0])


def _conjuncts(condition: Node | None) -> list[Node]:
    """Split a condition at its ANDs."""
    if condition is None:
        return []
    if condition.get("type") == "CONJUNCTION_AND":
        return [part for child in condition["children"] for part in _conjuncts(child)]
    return [condition]


def _stars(node: Node) -> list[Node]:
    """List the `*` of a SELECT's own list, but not COLUMNS(...)."""
    return [one for one in node["select_list"] if one.get("class") == "STAR" and not one.get("columns")]


def _orders_by_place(node: Node) -> bool:
    """Tell whether a SELECT may order its rows by the place of a column: `ORDER BY 2`."""
    return any(order.get("class") == "CONSTANT" for order in _orders(node))


def _orders(node: Node) -> list[Node]:
    """List what a SELECT orders its rows by."""
    return [order["expression"] for modifier in node.get("modifiers", ()) for order in modifier.get("orders", ())]


def _parts(tree: object) -> Iterator[Node]:
    """Walk every object of a tree."""
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
