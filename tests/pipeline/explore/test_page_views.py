"""The other views of the page: groups, comparing, training, latents; and faults that exclude readers."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation.duplicates import dedup
from tests.pipeline.explore.serving import served
from tests.pipeline.helpers.reader import Reader, chromium, reading
from tests.pipeline.helpers.report_corpus import BROKEN_LATENT, FAILURES, SAME, autoencoder_folder, corpus, run

__all__ = ["autoencoder_folder", "corpus", "run"]

pytestmark = pytest.mark.browser
VIEWS = [
    {},
    {"where": "sharpnes > 3"},
    {"view": "sample", "source": "made", "key": "k3"},
    {"view": "failures"},
    {"view": "failures", "column": "images", "reason": "http_404"},
    {"view": "groups"},
    {"view": "compare", "b": "nsfw > 0.4"},
    {"view": "runs"},
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(corpus: Corpus, run: Path) -> Iterator[str]:
    dedup(corpus)
    with served(corpus, runs=run.parent) as server:
        yield server.url


@pytest.fixture(params=[390, 1280])
def reader(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with reading(browser, url, request.param) as reader:
        yield reader


def loaded(reader: Reader, selector: str) -> None:
    """Wait until an image is there; one has a source and pixels."""
    reader.see(selector).first.scroll_into_view_if_needed()
    reader.until(f"document.querySelector({selector!r})?.naturalWidth > 0")


def test_groups_show_which_one_is_kept(reader: Reader) -> None:
    reader.open(view="groups")
    expect(reader.see(".groups > li")).to_have_count(len(SAME))
    sizes = sorted(card.locator("a.thumb").count() for card in reader.see(".groups > li").all())
    assert sizes == sorted(len(group) for group in SAME)
    expect(reader.see(".thumb.kept")).to_have_count(len(SAME))
    loaded(reader, ".groups img")
    reader.see(".tabs a", "Alike in meaning").click()
    expect(reader.see(".groups ~ .end")).not_to_be_empty()
    reader.open(view="sample", source="made", key=f"k{min(SAME[0])}")
    reader.see(".lines a", "duplicate").click()
    reader.counted(f"{len(SAME[0])} of 32 rows")


def test_two_filters_are_compared(reader: Reader) -> None:
    reader.open(where="width = height")
    reader.see("nav a", "Compare").click()
    expect(reader.see("#compare-a")).to_have_value("width = height")
    reader.see("#compare-b").fill("nsfw > 0.4")
    reader.press("Enter")
    square = sum(n % 3 == 0 for n in range(32) if n not in FAILURES)
    high = sum(n / 40 > 0.4 for n in range(32) if n not in FAILURES)
    both = sum(n % 3 == 0 and n / 40 > 0.4 for n in range(32) if n not in FAILURES)
    expect(reader.see(".figure strong")).to_have_text([str(square), str(high), str(both)])
    expect(reader.see(".side").first.locator("a.thumb")).to_have_count(square)
    expect(reader.see(".charts figure").nth(5)).to_be_attached()
    loaded(reader, ".side img")
    reader.see(".side a", "show all").last.click()
    reader.counted(f"{high} of 32 rows")


def test_latents_are_decoded_when_asked_for(reader: Reader) -> None:
    reader.open(view="sample", source="made", key="k3")
    assert not [one for one in reader.requests if "/api/decoded" in one]
    reader.see("button", "Decode latents/tiny-64").click()
    loaded(reader, ".latents img")
    expect(reader.see(".latents figcaption")).to_contain_text("64 × 64")
    reader.see("button", "Decode latents/gone-64").click()
    expect(reader.see(".latents")).to_contain_text("cannot be decoded")
    reader.open(view="sample", source="made", key=f"k{BROKEN_LATENT}")
    expect(reader.see(".tag.drop")).to_have_text("not_finite")
    reader.expected.append("/api/decoded")


def test_training_has_curves_and_sheets(reader: Reader) -> None:
    reader.open(view="runs")
    expect(reader.see(".curves figure", "loss").first.locator("polyline")).to_be_attached()
    assert reader.see(".curve").count() == reader.see(".curves figure").count() >= 3
    reader.see("#step").focus()
    reader.press("Home")
    expect(reader.see(".sheets output")).to_have_text("step 0")
    loaded(reader, ".sheets img")
    reader.press("ArrowRight")
    expect(reader.see(".sheets output")).to_have_text("step 40")
    reader.until("document.querySelector('.sheets img').naturalHeight === 80")
    reader.tab.reload()
    expect(reader.see(".sheets output")).to_have_text("step 40")
    reader.see("#step").focus()
    reader.press("End")
    expect(reader.see(".sheets output")).to_have_text("step 120: its sheet cannot be shown")
    reader.expected.append("/sheet?step=120")


# -- for everybody -----------------------------------------------------------------------------------------------------
FAULTS = """() => {
  const faults = [];
  const seen = (node) => node.checkVisibility({ visibilityProperty: true }) && node.getClientRects().length;
  const named = (node) => node.getAttribute("aria-label")?.trim() || node.textContent.trim() || node.labels?.length
    || [...node.querySelectorAll("img")].some((image) => image.alt) || node.getAttribute("aria-labelledby");
  for (const node of document.querySelectorAll("a, button, input, select, textarea, summary, [role=img]"))
    if (seen(node) && !named(node)) faults.push(`no name: ${node.outerHTML.slice(0, 120)}`);
  for (const image of document.images) if (!image.hasAttribute("alt")) faults.push(`no alt: ${image.src}`);
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of new Set(ids)) if (ids.filter((one) => one === id).length > 1) faults.push(`id twice: ${id}`);
  const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const colour = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const found = colour(getComputedStyle(one).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !seen(node)) continue;
    if (node.closest("[disabled], [aria-disabled], option, svg")) continue;
    const [a, b] = [light(colour(getComputedStyle(node).color)), light(ground(node))].sort();
    const contrast = (b + 0.05) / (a + 0.05);
    if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(1)}: ${texts.currentNode.data.slice(0, 40)}`);
  }
  if (document.scrollingElement.scrollWidth > innerWidth) faults.push("wider than the window");
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].filter(seen).map((node) => Number(node.tagName[1]));
  levels.forEach((level, i) => i && level > levels[i - 1] + 1 && faults.push(`heading ${level} below another`));
  return faults;
}"""


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light"), (2560, "dark")])
def test_no_view_has_a_serious_fault(browser: Browser, url: str, width: int, scheme: str) -> None:
    axe = None
    if importlib.util.find_spec("axe_playwright_python"):  # where the rules of axe-core are installed, they count too
        from axe_playwright_python.sync_playwright import Axe

        axe = Axe()
    with reading(browser, url, width, scheme) as reader:
        for view in VIEWS:
            reader.open(**view)
            expect(reader.see("main img, #sql-error:not(:empty), .cards, .failed li, .curve").first).to_be_visible()
            assert reader.tab.evaluate(FAULTS) == [], view
            if axe is not None:
                found = axe.run(reader.tab).response["violations"]
                assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == [], (view, found)
        ground = reader.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(250, 249, 246)", "dark": "rgb(18, 21, 24)"}[scheme]
        assert all("400 (Bad Request)" in message for message in reader.messages), reader.messages
        reader.messages.clear()


def test_the_focus_can_be_seen(reader: Reader) -> None:
    reader.open().counted("32 rows")
    stops = 0
    for _ in range(14):
        reader.press("Tab")
        if reader.tab.evaluate("document.activeElement === document.body"):
            break
        stops += 1
        style = "(({outlineStyle, outlineWidth}) => `${outlineStyle} ${outlineWidth}`)(getComputedStyle(%s))"
        focused = "document.activeElement.matches('#sql') ? document.activeElement.form : document.activeElement"
        drawn = reader.tab.evaluate(style % f"({focused})")
        shadow = reader.tab.evaluate(f"getComputedStyle({focused}).boxShadow")
        assert not drawn.startswith("none") or shadow != "none", reader.focus
    assert stops > 9
