"""Weights by source: parsed, applied, and refused."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.selection.chosen_rows import ChosenRows
from microdit.pipeline.selection.selections import SELECTION, load_selection, select
from microdit.pipeline.selection.weights import parse_shares, weigh
from tests.pipeline.helpers.scored_corpus import OK, make


@pytest.mark.parametrize(
    ("weights", "shares"),
    [(None, [2 / 10, 8 / 10]), ("equal", [1 / 2, 1 / 2]), ("a=1,b=3", [1 / 4, 3 / 4]), ("b=0.5, a=2", [4 / 5, 1 / 5])],
)
def test_sources_come_as_often_as_they_shall(tmp_path: Path, weights: str | None, shares: list[float]) -> None:
    corpus = make(tmp_path, [("a", 2), ("b", 8)])
    given = None if weights is None else parse_shares(weights)
    made = select(corpus, "mixed", OK, given)
    table = load_selection(corpus, "mixed")
    total = {"a": 0.0, "b": 0.0}
    for line in table.to_pylist():
        total[line["source"]] += line["weight"]
    assert [total[source] / 10 for source in "ab"] == pytest.approx(shares)
    about = json.loads(table.schema.metadata[b"microdit"])
    assert about.get("weights") == given
    assert made.hash == select(corpus, "mixed", OK, given).hash


SHARE = st.floats(0.01, 100)

WEIGHT = st.floats(0.125, 8, width=32)


@settings(max_examples=100, deadline=None, print_blob=True)
@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(SHARE, st.lists(WEIGHT, min_size=1, max_size=9)), min_size=1))
def test_weights_keep_their_proportions_within_a_source(sources: dict[str, tuple[float, list[float]]]) -> None:
    rows = [(source, "s", row, w) for source in sorted(sources) for row, w in enumerate(sources[source][1])]
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SELECTION)
    chosen = ChosenRows.of(table)
    found = pa.concat_tables(weigh(chosen, {source: share for source, (share, _) in sources.items()}).parts())
    assert found.drop(["weight"]).equals(table.drop(["weight"])) and found.schema.equals(SELECTION)
    weight = found["weight"].to_numpy().astype(np.float64)
    assert weight.mean() == pytest.approx(1, rel=1e-5)
    whole = sum(share for share, _ in sources.values())
    for source, (share, before) in sources.items():
        mine = weight[np.array(found["source"].to_pylist()) == source]
        assert mine.sum() / len(rows) == pytest.approx(share / whole, rel=1e-5)
        assert mine / mine.sum() == pytest.approx(np.array(before) / math.fsum(before), rel=1e-5)
    if len({share for share, _ in sources.values()}) == 1:
        assert pa.concat_tables(weigh(chosen, "equal").parts()).equals(found)


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=0", "a=-1", "a=nan", "a=inf", "a=1,,b=1", "a=1,a=2", "a:1"])
def test_weights_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"--weights {text}: ") + ".*expected equal, or each source once"):
        parse_shares(text)


def test_weights_name_every_source_and_no_other(tmp_path: Path) -> None:
    corpus = make(tmp_path, [("a", 2), ("b", 2)])
    message = r"there is no row of c, b has no number; expected a number for each source .*: a, b"
    with pytest.raises(RequestError, match=message):
        select(corpus, "x", OK, {"a": 1, "c": 1})
    with pytest.raises(RequestError, match="too far apart for 32-bit numbers"):
        select(corpus, "x", OK, {"a": 1e-300, "b": 1})
