"""The page of `microdit explore` in a browser: what a reader does on a phone and on a desk, by pointer and by keys."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.selections import load_selection
from tests.pipeline.explore.serving import served
from tests.pipeline.helpers.browsed_corpus import (
    FAILS,
    HOSTILE_ROW,
    caption,
    failed,
    make_browsed,
    sharpness,
)
from tests.pipeline.helpers.picture_corpus import microdit
from tests.pipeline.helpers.reader import Reader, chromium, reading
from tests.pipeline.helpers.report_corpus import HOSTILE

pytestmark = pytest.mark.browser
ROWS = 300
GOOD = [number for number in range(ROWS) if not failed(number)]
PARTS = Path(__file__).parents[3] / "pipeline/explore/page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_browsed(tmp_path_factory.mktemp("browsed"), ROWS)


@pytest.fixture(scope="module")
def url(corpus: Corpus) -> Iterator[str]:
    with served(corpus) as server:
        yield server.url


@pytest.fixture(params=[390, 1280])
def reader(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with reading(browser, url, request.param) as reader:
        yield reader


def show_filters(reader: Reader) -> None:
    if reader.see("#open-filters").is_visible():
        reader.see("#open-filters").click()


def sharp(low: float, high: float) -> int:
    return sum(low <= sharpness(number) < high for number in GOOD)


def drag(reader: Reader, column: str, begin: float, end: float) -> None:
    """Drag over a histogram, from one part of its width to another."""
    reader.see(f"[data-column={column}]").scroll_into_view_if_needed()
    chart = reader.see(f"[data-column={column}] svg")
    chart.hover()  # once it stands still
    box = chart.bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    reader.tab.mouse.move(box["x"] + box["width"] * begin, y)
    reader.tab.mouse.down()
    reader.tab.mouse.move(box["x"] + box["width"] * end, y, steps=4)
    reader.tab.mouse.up()


# -- filters -----------------------------------------------------------------------------------------------------------
def test_filters_by_dragging_and_all_others_follow(reader: Reader) -> None:
    reader.open().counted(f"{ROWS} rows")
    show_filters(reader)
    drag(reader, "basic_sharpness", 0.51, 0.74)
    reader.until("location.hash.includes('basic_sharpness')")
    show_filters(reader)
    where = reader.state["where"]
    lower, upper = where.split(" AND ")
    assert lower.startswith("basic_sharpness >= ") and upper.startswith("basic_sharpness < ")
    wanted = sharp(float(lower.split()[-1]), float(upper.split()[-1]))
    assert 10 < wanted < ROWS / 2
    reader.counted(f"{wanted} of {ROWS} rows")
    expect(reader.see("#sql")).to_have_value(where)
    source = reader.see("[data-column=source]")
    source.scroll_into_view_if_needed()
    expect(source.locator(".rows").first).not_to_have_text(str(ROWS // 2))
    bars = dict(zip(source.locator(".value").all_inner_texts(), source.locator(".rows").all_inner_texts(), strict=True))
    assert sum(map(int, bars.values())) == wanted, "the bars of another column follow"
    source.locator("button", has_text="birds").click()
    reader.counted(f"{bars['birds']} of {ROWS} rows")
    assert reader.state["where"] == f"{where} AND source = 'birds'"
    reader.tab.go_back()
    reader.counted(f"{wanted} of {ROWS} rows")


def test_sql_can_be_edited_and_its_errors_stand_beside_it(reader: Reader) -> None:
    reader.open().counted(f"{ROWS} rows")
    reader.filter_by_sql("width >= 100 AND source IN ('birds') AND license = 'CC0'")
    wanted = sum(n < ROWS / 2 and n % 3 != 0 and 72 + 8 * (n % 7) >= 100 for n in GOOD)
    reader.counted(f"{wanted} of {ROWS} rows")
    show_filters(reader)
    reader.see("[data-column=width]").scroll_into_view_if_needed()
    expect(reader.see("input[aria-label='width from']")).to_have_value("100")
    expect(reader.see("[data-column=source] [aria-pressed=true]")).to_have_text(f"birds{wanted}")
    reader.press("Escape")
    reader.filter_by_sql("widht >= 100")
    expect(reader.see("#sql-error")).to_contain_text("widht")
    expect(reader.see("#sql")).to_have_attribute("aria-invalid", "true")
    reader.filter_by_sql("width >= 100 OR source = 'birds'")
    expect(reader.see("#sql-error")).to_be_empty()
    show_filters(reader)
    reader.see("[data-column=license] .values button", "CC0").click()
    wanted = sum(n % 3 != 0 and (n < ROWS / 2 or 72 + 8 * (n % 7) >= 100) for n in GOOD)
    reader.counted(f"{wanted} of {ROWS} rows")
    assert reader.state["where"] == "(width >= 100 OR source = 'birds') AND license = 'CC0'"
    reader.expected.append("status of 400")


def test_words_are_looked_for_in_all_captions(reader: Reader) -> None:
    reader.open().counted(f"{ROWS} rows")
    reader.see("#words").fill("harbour")
    reader.press("Enter")
    reader.counted(f"{sum('harbour' in caption(number) for number in GOOD)} of {ROWS} rows")
    reader.see("#words").fill("soft")
    reader.press("Enter")
    reader.counted(f"{len(GOOD)} of {ROWS} rows")
    assert reader.state["where"] == "(caption_long ILIKE '%soft%' OR caption_source ILIKE '%soft%')"
    reader.see("#words").fill("")
    reader.press("Enter")
    reader.counted(f"{ROWS} rows")


# -- the grid ----------------------------------------------------------------------------------------------------------
def test_pages_through_to_the_end(reader: Reader) -> None:
    reader.open().counted(f"{ROWS} rows")
    most = reader.to_the_end()
    assert most < 100, "what is far away is not in the document"
    expect(reader.see("#grid-end")).to_have_text(f"That is all: {ROWS} pictures.")
    expect(reader.see(f"#grid a[aria-label^='{caption(ROWS - 2)}']")).to_be_visible()
    pages = [one for one in reader.requests if "/api/rows" in one]
    assert len(pages) == ROWS // 100 and all("after=" in one for one in pages[1:])
    asked = {one.split("key=")[1].split("&")[0] for one in reader.requests if "/api/image" in one}
    assert len(asked) > 50 and asked <= {f"k{number}" for number in GOOD}, "none is asked for that is not there"


def test_a_view_is_an_url(reader: Reader) -> None:
    reader.open(where="width >= 80")
    reader.counted(f"{sum(72 + 8 * (n % 7) >= 80 for n in GOOD)} of {ROWS} rows")
    reader.to_the_end()
    reader.until("location.hash.includes('at=')")
    reader.tab.reload()
    expect(reader.see("#earlier")).to_be_visible()
    expect(reader.see("#sql")).to_have_value("width >= 80")
    expect(reader.see("#grid li").first).to_be_visible()
    reader.see("#earlier").click()
    expect(reader.see("#grid li").nth(30)).to_be_attached()
    reader.see("nav a", "Failures").click()
    expect(reader.see("h2", "What failed")).to_be_visible()
    assert reader.state["view"] == "failures" and reader.state["where"] == "width >= 80"
    reader.tab.go_back()
    expect(reader.see("#grid")).to_be_visible()
    assert reader.see("#page-view").is_hidden()


def test_pictures_are_drawn_at_random(reader: Reader) -> None:
    reader.open(where="source = 'cities'").counted(f"{ROWS // 2} of {ROWS} rows")
    reader.see("#order").click()
    expect(reader.see("#grid-note")).to_contain_text("drawn at random")
    expect(reader.see("#grid a").first).to_be_visible()
    drawn = reader.see("#grid a").first.get_attribute("aria-label")
    reader.tab.reload()
    expect(reader.see("#grid a").first).to_have_attribute("aria-label", drawn or "")
    reader.see("#grid-note a").click()
    expect(reader.see("#grid a").first).to_have_attribute("aria-label", f"{caption(ROWS // 2)} (cities/k{ROWS // 2})")


@pytest.mark.slow
def test_five_thousand_pictures_do_not_make_it_slow(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    many = make_browsed(tmp_path_factory.mktemp("many"), 5000)
    with served(many) as server, reading(browser, server.url, 1280) as reader:
        reader.open().counted("5,000 rows")
        frame = "new Promise(done => { const began = performance.now(); const main = document.getElementById('main');"
        frame += "main.scrollBy(0, 400); requestAnimationFrame(() => requestAnimationFrame(() =>"
        frame += "done(performance.now() - began))); })"
        early = sorted(reader.tab.evaluate(frame) for _ in range(20))[10]
        assert reader.to_the_end() < 100
        expect(reader.see("#grid-end")).to_have_text("That is all: 5,000 pictures.")
        reader.tab.evaluate("document.getElementById('main').scrollBy(0, -20000)")
        late = sorted(reader.tab.evaluate(frame) for _ in range(20))[10]
        assert late < 2 * early + 20, "milliseconds until the frame after a scroll"
        assert reader.see("#grid li").count() < 100


# -- one picture -------------------------------------------------------------------------------------------------------
def test_a_picture_is_opened_and_its_words_are_found(reader: Reader) -> None:
    reader.open(where="caption_source ILIKE '%harbour%'")
    reader.see("#grid a").first.click()
    expect(reader.see("#sample-title")).to_have_text("birds / k2")
    texts = [caption(2), caption(2) + ". The light is soft."]
    expect(reader.see(".caption")).to_have_text(texts[::-1])
    assert reader.see(".caption mark").all_inner_texts() == ["harbour", "harbour"]
    reader.until("document.querySelector('.whole img').naturalWidth > 0")
    assert reader.tab.evaluate("document.querySelector('.whole img').naturalWidth") == 72 + 8 * 2
    expect(reader.see(".scores")).to_contain_text("sharpness")
    reader.see("[aria-label='The picture after']").click()
    expect(reader.see("#sample-title")).to_have_text("birds / k6")
    reader.press("Escape")
    expect(reader.see("#grid")).to_be_visible()
    assert "(birds/k6)" in reader.focus or reader.tab.evaluate("innerWidth") < 500


def test_hostile_words_are_text(reader: Reader) -> None:
    reader.open(view="sample", source="birds", key=f"k{HOSTILE_ROW}")
    expect(reader.see(".caption").first).to_contain_text("<script>")
    assert HOSTILE in reader.see(".caption").all_inner_texts()
    reader.open(view="failures", column="images", reason="http_404")
    expect(reader.see(".failed li")).to_have_count(ROWS // FAILS)
    expect(reader.see(".failed li").first).to_contain_text(HOSTILE)
    reader.open(view="sample", source="birds", key=HOSTILE)
    expect(reader.see("[role=alert]").last).to_contain_text("<script>")
    reader.open(where=HOSTILE)
    expect(reader.see("#sql-error")).not_to_be_empty()
    reader.expected.append("status of 4")


# -- choosing ----------------------------------------------------------------------------------------------------------
def test_a_saved_selection_is_the_command_lines(reader: Reader, corpus: Corpus) -> None:
    name = f"clear-{reader.tab.viewport_size['width']}"
    where = "basic_sharpness > 60 AND width >= 80"
    reader.open(where=where).counted(f"{chosen()} of {ROWS} rows")
    reader.see("#save").click()
    reader.see("#selection-name").fill(name)
    reader.press("Enter")
    expect(reader.see("#dialog [role=status]")).to_contain_text(f"Saved as {name}@")
    said = reader.see("#dialog [role=status]").inner_text()
    sql = f"SELECT source, shard, row FROM samples WHERE {where}"
    assert sql in said
    by_command = microdit("select", corpus.url, f"{name}-too", sql)
    assert by_command.exit_code == 0, by_command.output
    ours, theirs = load_selection(corpus, name), load_selection(corpus, f"{name}-too")
    assert ours.num_rows == chosen() and ours.equals(theirs)
    reader.press("Escape")
    assert reader.see("#dialog").is_hidden()


def test_failed_rows_are_left_out_of_a_selection_by_one_button(browser: Browser, url: str, corpus: Corpus) -> None:
    with reading(browser, url, 1280) as reader:
        reader.open(where="source = 'birds'").counted(f"{ROWS // 2} of {ROWS} rows")
        reader.see("#save").click()
        reader.see("#selection-name").fill("birds")
        reader.press("Enter")
        reader.see("#dialog button", "Add status").click()
        good = sum(number < ROWS / 2 for number in GOOD)
        expect(reader.see("#dialog form > p").first).to_contain_text(f"{good} of {ROWS} rows")
        reader.see("#selection-name").fill("birds")
        reader.press("Enter")
        expect(reader.see("#dialog [role=status]")).to_contain_text("Saved as birds@")
        assert load_selection(corpus, "birds").num_rows == good
        reader.expected.append("400 (Bad Request)")


def chosen() -> int:
    return sum(sharpness(n) > 60 and 72 + 8 * (n % 7) >= 80 for n in GOOD)


def test_marks_are_made_and_undone(reader: Reader) -> None:
    key = f"k{reader.tab.viewport_size['width'] % 100}"
    reader.open(view="sample", source="birds", key=key)
    expect(reader.see(".marking p")).to_have_text("Not marked yet.")
    reader.see("#note").fill("see <b>this</b>")
    reader.see(".marking .drop").click()
    expect(reader.see(".marking p")).to_contain_text("Marked drop by")
    reader.tab.reload()
    expect(reader.see("#note")).to_have_value("see <b>this</b>")
    expect(reader.see(".marking .drop")).to_have_attribute("aria-pressed", "true")
    reader.open(where="mark = 'drop'").counted(f"1 of {ROWS} rows")
    expect(reader.see("#grid li.drop")).to_have_count(1)
    reader.open(view="sample", source="birds", key=key)
    expect(reader.see(".marking .drop")).to_have_attribute("aria-pressed", "true")
    reader.press("u")
    expect(reader.see(".marking p")).to_have_text("Not marked yet.")
    reader.open(where="mark = 'drop'").counted(f"0 of {ROWS} rows")
    expect(reader.see("#grid-end")).to_have_text("Nothing is left by this filter.")


def test_everything_goes_by_keys_alone(reader: Reader) -> None:
    reader.open().counted(f"{ROWS} rows")
    expect(reader.see("#grid li").first).to_be_visible()
    reader.press("Tab")
    assert reader.focus == "skip"
    reader.press("Enter")
    assert reader.focus == f"{caption(0)} (birds/k0)"
    reader.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert reader.focus.endswith("(birds/k2)")
    reader.press("ArrowDown", "ArrowUp")
    below = reader.focus
    reader.press("k")
    expect(reader.see("#toasts")).to_contain_text("Marked keep")
    assert reader.focus == f"{below}, marked keep"
    reader.press("u")
    expect(reader.see("#toasts")).to_contain_text("undone")
    reader.press("Home", "Enter")
    expect(reader.see("#sample-title")).to_have_text("birds / k0")
    reader.press("ArrowRight")
    expect(reader.see("#sample-title")).to_have_text("birds / k1")
    reader.press("Escape")
    expect(reader.see("#grid")).to_be_visible()
    reader.until("document.activeElement.ariaLabel?.includes('birds/k1')")
    reader.press("f")
    expect(reader.see("[data-column=source] button").last).to_be_visible()
    for _ in range(120):  # charts come as the focus comes near
        if reader.focus == "width from":
            break
        reader.press("Tab")
        reader.tab.wait_for_timeout(60)
    reader.tab.keyboard.type("120")
    reader.press("Enter")
    reader.counted(f"{sum(72 + 8 * (n % 7) >= 120 for n in GOOD)} of {ROWS} rows")
    assert reader.state["where"] == "width >= 120"
    reader.tab.evaluate("document.activeElement.blur()")
    reader.press("?")
    expect(reader.see("#dialog h2")).to_have_text("Keys")
    reader.press("Escape")
    reader.press("/")
    assert reader.focus == "sql"
    reader.press("Escape", "s")
    assert reader.focus == "Search captions"


def test_the_page_is_small_and_asks_nobody_else() -> None:
    parts = list(PARTS.iterdir())
    assert {part.suffix for part in parts} == {".html", ".js", ".css"}
    text = {part.name: part.read_text(encoding="utf-8") for part in parts}
    assert sum(len(one.splitlines()) for one in text.values()) <= 1900
    for name, one in text.items():
        assert "innerHTML" not in one and "eval(" not in one and "insertAdjacentHTML" not in one, name
        addresses = [line for line in one.splitlines() if "://" in line and "www.w3.org/2000/svg" not in line]
        assert addresses == [] or name == "sample.js", "addresses of others"
