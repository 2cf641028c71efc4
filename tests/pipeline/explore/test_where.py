"""Conditions as the page reads and writes them: what a filter writes is read back, and the rest is left as it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Page, Route

from microdit.pipeline.explore.condition import checked
from tests.pipeline.helpers.reader import chromium

pytestmark = pytest.mark.browser
MODULE = Path(__file__).parents[3] / "pipeline/explore/page/where.js"
COLUMNS = [
    {"name": "width", "kind": "number", "group": "images"},
    {"name": "sharp", "kind": "number", "group": "scores/basic"},
    {"name": "source", "kind": "category", "group": "images"},
    {"name": "good", "kind": "flag", "group": "tables"},
    {"name": "caption_long", "kind": "text", "group": "captions/long"},
]
LOADED = "async ({columns, where}) => { const { Where } = await import('http://page.test/where.js');"
LOADED += "const read = new Where(where, columns);"

numbers = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-6)
ranges = st.tuples(numbers, numbers).map(lambda two: {"low": min(two), "high": max(two)})
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
chosen = st.lists(texts, min_size=1, max_size=3, unique=True).map(lambda values: {"values": values})
free = st.sampled_from(
    ["width % 2 = 0", "x BETWEEN 1 AND 2", "(a OR b)", "k LIKE '% AND %'", "CASE WHEN a AND b THEN c END"]
)


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """A tab that has nothing but the module."""

    def answer(route: Route) -> None:
        script = route.request.url.endswith(".js")
        route.fulfill(
            body=MODULE.read_text() if script else "", content_type="text/javascript" if script else "text/html"
        )

    with chromium() as browser:
        tab = browser.new_page()
        tab.route("**/*", answer)
        tab.goto("http://page.test/")
        yield tab


def ask(tab: Page, where: str, result: str, **given: Any) -> Any:
    return tab.evaluate(f"{LOADED} return {result}; }}".replace("({columns, where})", "({columns, where, given})"), {
        "columns": COLUMNS, "where": where, "given": given,
    })  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(width=ranges, source=chosen, other=free)
@example(width={"low": 1, "high": 2}, source={"values": ["it's", "a AND b", "x') OR ('"]}, other="(a OR b)")
def test_what_a_filter_writes_is_read_back(tab: Page, width: dict, source: dict, other: str) -> None:
    first = ask(tab, other, "read.with('width', given.filter)", filter=width)
    both = ask(tab, first, "read.with('source', given.filter)", filter=source)
    assert both.startswith(f"{other} AND width >= ")
    assert ask(tab, both, "read.filter('width')") == pytest.approx(width)
    assert ask(tab, both, "read.filter('source')") == source
    assert ask(tab, both, "read.with('source', null)") == first
    assert ask(tab, first, "read.with('width', null)") == other
    assert checked(ask(tab, "", "read.with('source', given.filter)", filter=source)).text, "DuckDB can read it"


def test_what_it_cannot_cut_stays_whole(tab: Page) -> None:
    for where in ("a OR width > 3", "width > 3 -- AND good", "a AND (b", "good) OR (good"):
        assert ask(tab, where, "read.with('good', {values: [true]})") == f"({where}) AND good = true"
    assert ask(tab, "good AND width BETWEEN 1 AND 5", "[read.filter('good'), read.filter('width')]") == [
        {"values": [True]},
        {"low": 1, "high": 5, "closed": True},
    ]
    assert ask(tab, "(source IN ('a', 'b') OR source IS NULL)", "read.filter('source')") == {
        "values": ["a", "b"],
        "empty": True,
    }


@settings(max_examples=30, deadline=None)
@given(word=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="%_\\"), min_size=1, max_size=12))
@example(word="it's")
@example(word="a OR b")
def test_words_are_found_again(tab: Page, word: str) -> None:
    where = ask(tab, "width > 3", "read.withWord(given.word)", word=word)
    assert ask(tab, where, "read.words()") == [word]
    assert ask(tab, where, "read.withWord('')") == "width > 3"
