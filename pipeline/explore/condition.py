"""Conditions that readers write: what stands after WHERE of a query over the view `samples`."""

from dataclasses import dataclass
from functools import lru_cache

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.selection.queries import EXPECTED, TOO_DEEP, Node, parse

LONGEST = 20_000  # characters
CHOICE = "SELECT source, shard, row FROM samples"
"""The SQL before a condition, for a selection as for `microdit select`."""


@dataclass(frozen=True)
class Condition:
    """A checked condition. `by_row`: it looks at one row alone, so that a part of the table may be asked by itself."""

    text: str
    by_row: bool

    def choose(self, columns: str) -> str:
        """Write the SQL of the chosen samples, with these columns."""
        return f"SELECT {columns} FROM samples{self.behind}"

    @property
    def behind(self) -> str:
        """Return the SQL after `FROM samples`."""
        return f" WHERE {self.text}\n" if self.text else ""


@lru_cache(maxsize=1024)
def checked(text: str) -> Condition:
    """Check that a text can stand after WHERE, and that nothing but conditions stands in it.

    Raises:
        RequestError: it is wrong, with DuckDB's message.
    """
    text = text.strip().rstrip(";").rstrip()
    if len(text) > LONGEST:
        raise RequestError(f"SQL: a condition of {len(text):,} characters; expected {LONGEST:,} at most")
    if not text:
        return Condition("", True)
    parsed = parse(f"{CHOICE} WHERE {text}\n")
    node = parsed.tree["statements"][0]["node"]
    more = node.get("modifiers") or any(node.get(name) for name in ("group_expressions", "having", "sample"))
    table = node.get("from_table") or {}
    if node.get("type") != "SELECT_NODE" or str(table.get("table_name")).lower() != "samples" or more:
        raise RequestError(f"SQL: a condition such as `width >= 512` is expected, not a whole query; {EXPECTED}")
    try:
        return Condition(text, node.get("qualify") is None and _by_row(node["where_clause"]))
    except RecursionError:
        raise RequestError(TOO_DEEP) from None


def _by_row(node: Node) -> bool:
    """Tell that an expression has no query and no window in it."""
    waiting: list[object] = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if part.get("class") in ("SUBQUERY", "WINDOW"):
                return False
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return True


def both(*conditions: Condition) -> Condition:
    """Join conditions by AND; each is a whole one."""
    texts = [f"({condition.text}\n)" for condition in conditions if condition.text]
    return checked(" AND ".join(texts))
