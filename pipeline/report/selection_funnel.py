"""Show how a selection was chosen: what each condition of its query leaves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.report.filters import bare
from microdit.pipeline.report.sample_view import OK
from microdit.pipeline.selection.needed_columns import named_groups
from microdit.pipeline.selection.queries import Conditions, parse
from microdit.pipeline.selection.running import LimitError
from microdit.pipeline.selection.selections import Selection, changed_since, load_selection
from microdit.pipeline.selection.view import OpenView, connected, run, run_apart
from microdit.pipeline.tables.database import GIB, SqlLimits
from microdit.pipeline.tables.sample_table import SampleTable

SECONDS, MOST_SECONDS = 30.0, 60.0  # that one condition may take, and all of a selection
MEMORY = 4 * GIB  # that a query may take
MORE = "Its query is more than conditions on single rows: only what it began and ended with is shown."
STOPPED = (
    f"Its query was stopped, because it takes more than {SECONDS:.0f} seconds or {MEMORY // GIB} GiB of memory: what "
    "follows from there is not shown."
)


@dataclass(frozen=True)
class SelectionStep:
    """Samples left after a condition of a selection's query; `code` writes the label as code."""

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


def selection_funnel(
    corpus: Corpus, table: SampleTable, selection: Selection, complete: Sequence[str]
) -> SelectionFunnel:
    """Count what each condition of a selection's query leaves, in the corpus as it is now.

    The query may be anybody's: it runs in a process of its own, within limits.
    """
    limits = SqlLimits(seconds=MOST_SECONDS)
    limits = replace(limits, memory=min(limits.memory, MEMORY))
    steps: list[SelectionStep] = []
    table.make(corpus, named_groups(corpus, " ".join([selection.query, *complete])))  # its making is not the query's
    try:
        steps, problem = run_apart(limits, _funnel_steps, corpus, table, selection, complete, limits)
    except LimitError:
        problem = STOPPED
    except RequestError as error:
        problem = str(error)
    steps = steps or [SelectionStep("selected", selection.rows)]
    full = f"{selection.name}@{selection.hash}"
    return SelectionFunnel(selection.name, selection.hash, steps, problem, changed_since(corpus, full))


def _funnel_steps(
    spill: Path,
    corpus: Corpus,
    table: SampleTable,
    selection: Selection,
    complete: Sequence[str],
    limits: SqlLimits,
) -> tuple[list[SelectionStep], str | None]:
    """Count the steps, one by one: those before an error are shown, and what it was."""
    steps: list[SelectionStep] = []
    problem = None
    with connected(corpus, table, limits, spill) as connection:
        counts = _Counts(connection, replace(limits, seconds=SECONDS))
        try:
            steps += [SelectionStep("every input", counts.count("true")), SelectionStep("kept", counts.count(OK))]
            conditions = parse(selection.query).conditions()
            if conditions is None:
                problem = (
                    "Its query is more than conditions on single rows: only what it began and ended with is shown."
                )
            else:
                for step in _condition_steps(counts, conditions):
                    steps.append(step)
            steps.append(SelectionStep("selected", selection.rows))
            connection.register("chosen", load_selection(corpus, f"{selection.name}@{selection.hash}"))
            joined = "samples JOIN chosen USING (source, shard, row)"
            steps.append(SelectionStep("and in every column", counts.count(" AND ".join(["true", *complete]), joined)))
        except LimitError:
            problem = STOPPED
        except RequestError as error:  # the corpus no longer has a column, or the selection is damaged
            problem = str(error)
    return steps, problem


@dataclass(frozen=True)
class _Counts:
    """The open view of samples, to count in."""

    connection: OpenView
    limits: SqlLimits

    def count(self, condition: str, table: str = "samples") -> int:
        sql = f"SELECT count(*) AS n FROM {table} WHERE {condition}"
        return int(run(self.connection, sql, self.limits)["n"][0].as_py())


def _condition_steps(counts: _Counts, conditions: Conditions) -> Iterator[SelectionStep]:
    passed = [OK]
    for text in [text for text in conditions.each if text != f"({OK})"]:
        unknown = counts.count(" AND ".join([*passed, f"({text}) IS NULL"]), conditions.table)
        passed.append(text)
        yield SelectionStep(bare(text), counts.count(" AND ".join(passed), conditions.table), unknown, code=True)
    for number in range(len(conditions.qualify)):
        clause = " AND ".join(conditions.qualify[: number + 1])
        left = f"(SELECT 1 FROM {conditions.table} WHERE {' AND '.join(passed)} QUALIFY {clause})"
        yield SelectionStep(bare(conditions.qualify[number]), counts.count("true", left), code=True)
