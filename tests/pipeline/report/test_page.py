"""The report page: what it says equals what the corpus holds, and a browser shows it without any request."""

import io
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, sync_playwright

from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.content.crop import square
from microdit.pipeline.content.images import decode
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import write_failure
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.curation.duplicates import dedup
from microdit.pipeline.report import charts
from microdit.pipeline.report.page import write_report
from microdit.pipeline.report.pictures import BESIDE, PICTURES, psnr
from microdit.pipeline.selection.selections import select
from tests.pipeline.helpers.report_corpus import (
    FAILURES,
    HOSTILE,
    KEPT,
    ROWS,
    SAFE,
    SAME,
    SHARDS,
    UNSCORED,
    autoencoder_folder,
    corpus,
    drawing,
    run,
)
from tests.pipeline.helpers.small_corpus import fill, make_corpus

__all__ = ["autoencoder_folder", "corpus", "run"]


@dataclass
class Page:
    path: Path
    html: str
    text: str


class _Text(HTMLParser):
    """The text of a page, as a reader sees it: one space between the pieces, plain spaces in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden = self.hidden or tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.hidden = self.hidden and tag != "style"

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)


def as_page(path: Path) -> Page:
    html = path.read_text(encoding="utf-8")
    reader = _Text()
    reader.feed(html)
    return Page(path, html, " ".join(" ".join(reader.pieces).split()))


@pytest.fixture(scope="module")
def page(corpus: Corpus, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    dedup(corpus)
    select(corpus, "train", "SELECT source, shard, row FROM samples WHERE status = 'ok' AND height = width")
    select(corpus, "safe", SAFE)
    return as_page(write_report(corpus, tmp_path_factory.mktemp("page") / "new" / "report.html", run))


# -- what it says ----------------------------------------------------------------------------------------------------
def test_the_funnel_is_the_corpus(page: Page) -> None:
    square = sum(1 for n in range(SHARDS * ROWS) if n not in FAILURES and n % 3 == 0)
    section = page.html.split('id="images"')[0]
    steps = re.findall(r'<div class="step">(\w[\w ]*)<small>.*?<div class="left">([\d,]+)', section, re.DOTALL)
    assert steps == [
        ("Listed", "32"),
        ("Fetched", "29"),
        ("Decoded", "28"),
        ("Kept", str(KEPT)),
        ("In every column", str(KEPT - 1 - len(UNSCORED))),
        ("Selected", "9"),
        ("Selected", str(square)),
    ]
    assert "2 http_404 , such as made/k1 : HTTP 404 for http://127.0.0.1/<script>" in page.text
    assert "1 timeout , such as made/k5 : no byte within 2 s" in page.text
    assert "1 not_finite in latents/tiny-64, such as made/k12 : 7 values are no numbers" in page.text
    assert "upstream" not in page.text, "what was inherited is shown where it began"
    assert "height = width" in page.text, "the query of the selection"


def test_bytes_rates_licences_and_lineage_are_those_of_the_commits(corpus: Corpus, page: Page) -> None:
    commits = corpus.commits("latents/tiny-64")
    size = sum(c.object.size + c.sidecar.size for c in commits)
    rows = re.findall(r'<th scope="row">latents/tiny-64</th>(.*?)</tr>', page.html, re.DOTALL)
    in_bytes, in_rates, in_lineage = (" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in rows)
    samples = KEPT - 1
    wanted = [charts.format_bytes(size), str(samples), charts.format_bytes(size / samples)]
    assert in_bytes == " ".join(wanted).replace("\xa0", " ")
    assert in_rates.startswith(f"{SHARDS} {SHARDS * ROWS} ")
    assert in_lineage.endswith(f"images {corpus.column('latents/tiny-64').fingerprint[:12]}")
    names = [name for name in corpus.columns() if corpus.commits(name)]
    objects = {o.name: o.size for name in names for c in corpus.commits(name) for o in (c.object, c.sidecar)}
    assert f"{charts.format_bytes(sum(objects.values()))} in all".replace("\xa0", " ") in page.text
    odd = sum(1 for n in range(SHARDS * ROWS) if n not in FAILURES and n % 2)
    assert f"CC0 made {odd}" in page.text and f"not stated made {KEPT - odd}" in page.text
    assert "Drawn by a <test>, CC0" in page.text
    assert "Not built yet, and not asked for below: text/minilm@later" in page.text


def test_pictures_stand_beside_what_their_latents_decode_to(
    corpus: Corpus, page: Page, autoencoder_folder: Path
) -> None:
    cards = re.findall(r'<article class="sample card">(.*?)</article>', page.html, re.DOTALL)
    assert len(cards) == PICTURES
    commit = corpus.commits("latents/tiny-64")[0]
    autoencoder = load_autoencoder(autoencoder_folder)
    with corpus.open_object(commit) as file:
        latents = {key: array_from_bytes(members["npy"]) for key, members in read_tar(file)}
    for card in cards:
        (key,) = re.findall(r'<p class="key mono">made/(\w+)</p>', card)
        assert int(key[1:]) not in FAILURES
        assert card.count("<img ") == 2, "the image, and one decoded latent"
        if key in latents:
            decoded = autoencoder.decode(torch.from_numpy(latents[key])[None])[0].numpy()
            assert f"64 px, {psnr(_encoded(int(key[1:])), decoded):.1f} dB" in card
    assert "latents/gone-64 cannot be decoded here" in page.text
    assert "latents/other-64 cannot be decoded here: the autoencoder" in page.text, "other weights than the column's"


def _encoded(number: int) -> np.ndarray:
    """The pixels that a 64 px latent of a stored drawing is made from."""
    buffer = io.BytesIO()
    drawing(number).save(buffer, "jpeg", quality=92)
    return square(decode(buffer.getvalue(), 1 << 20).pixels, 64)


def test_histograms_count_every_kept_image(page: Page) -> None:
    assert re.search(r"Short side\s*<small>all 27 the same", page.html)
    for title in (
        "words of captions/source",
        "words of captions/long",
        "tokens of text/minilm@source",
        "sharpness (scores/basic)",
    ):
        figure = page.html.split(f"<figcaption>{title}<small>")[1].split("</figure>")[0]
        counts = re.findall(r"<title>[^<]*: ([\d,]+) images</title>", figure)
        assert sum(map(int, counts)) == KEPT, title
    figure = page.html.split("<figcaption>absmax of latents/tiny-64<small>")[1].split("</figure>")[0]
    assert sum(map(int, re.findall(r": ([\d,]+) images</title>", figure))) == KEPT - 1


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_captions_stand_side_by_side(page: Page) -> None:
    rows = re.findall(r'<article class="side">(.*?)</article>', page.html, re.DOTALL)
    assert len(rows) == BESIDE and all(row.count("<img ") == 1 for row in rows)
    for row in rows:
        short, long = re.findall(r"<dt>captions/(?:source|long), (\d+) words?</dt>", row)
        assert int(long) == int(short) + 4


def test_the_ends_of_scores_have_their_pictures(page: Page) -> None:
    section = page.html.split('id="scores"')[1].split("</section>")[0]
    assert re.findall(r"<h3>(.*?)</h3>", section) == ["sharpness (scores/basic)", "nsfw (scores/nsfw)"]
    nsfw = section.split("nsfw (scores/nsfw)</h3>")[1]
    low, middle, high = (re.findall(r'title="made/k(\d+)"', part) for part in nsfw.split('class="end">')[1:])
    assert [int(n) for n in low] == [0, 2, 3] and [int(n) for n in high] == [29, 30, 31]
    scored = sorted(n for n in range(SHARDS * ROWS) if n not in FAILURES and n not in UNSCORED)
    assert abs(scored.index(int(middle[1])) - len(scored) // 2) <= 1
    assert "0.775" in high_says(nsfw)


def high_says(html: str) -> str:
    return words(html.split('class="end">')[3])


def test_filters_say_what_they_would_drop(page: Page) -> None:
    section = page.html.split('id="filters"')[1].split("</section>")[0]
    rows = {words(row.split("<small")[0]): row for row in section.split('<div class="step">')[1:]}
    kept = [n for n in range(SHARDS * ROWS) if n not in FAILURES]
    double = sum(len(group) - 1 for group in SAME)
    unsafe = [n for n in kept if n in UNSCORED or n / 40 > 0.2]
    blurred = [n for n in kept if math.sqrt(n) < 20]
    assert len(blurred) == KEPT
    for label, count in (
        ("Nearly the same as another", double), ("Not safe for work", len(unsafe)), ("Small", KEPT),
        ("Long and narrow", 0), ("Blurred", KEPT),
    ):  # fmt: skip
        share = f"{100 * count / KEPT:.1f}%"
        assert words(rows[label].split('class="left">')[1]).startswith(f"{count} {share}"), label
        assert rows[label].count("<img ") == min(count, 5), label
    assert "2 have no score" in rows["Not safe for work"]
    assert "comes from <code>microdit decontaminate</code>" in rows["Near an evaluation set"]
    assert "comes from <code>scores/text</code> in the config" in rows["Much text"]
    assert f"would leave 0 of {KEPT} kept images" in words(section)


def test_duplicates_are_shown_beside_the_one_that_is_kept(page: Page) -> None:
    section = page.html.split('id="duplicates"')[1].split("</section>")[0]
    assert f"{sum(map(len, SAME))} images in 3 groups" in words(section)
    groups = section.split("<article")[1:]
    assert ["7 images, 5 of them here" in words(group) for group in groups] == [True, False, False]
    for group in groups:
        assert group.count('<figure class="kept">') == 1 and "0 bits apart" in group
        numbers = {int(n) for n in re.findall(r'title="made/k(\d+)"', group)}
        assert any(numbers <= same for same in SAME)


def test_the_funnel_of_a_selection_has_its_conditions(page: Page) -> None:
    section = page.html.split('id="selections"')[1].split("</section>")[0]
    safe = section.split("train@")[0]
    steps = re.findall(r'<div class="step(?: mono)?">(.*?)</div>.*?<div class="left">([\d,]+)', safe, re.DOTALL)
    kept = [n for n in range(SHARDS * ROWS) if n not in FAILURES]
    calm = [n for n in kept if n not in UNSCORED and n / 40 <= 0.5]
    largest = {max(group, key=lambda n: (n % 3, -n)) for group in SAME}
    once = [n for n in calm if not any(n in group for group in SAME) or n in largest]
    assert steps == [
        ("every input", "32"), ("kept", str(KEPT)), ("s.status = &#39;ok&#39;", str(KEPT)),
        ("nsfw &lt;= 0.5", str(len(calm))),
        ("duplicate_keep", str(len(once))), ("selected", "9"), ("and in every column", steps[-1][1]),
    ]  # fmt: skip
    assert "Of 2 it is not known" in words(safe) and "changed since" not in safe
    assert int(steps[-1][1]) <= 9 and "height = width" in words(section)


def test_a_selection_of_an_earlier_corpus_says_so(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "corpus")
    fill(made, columns=["captions/source"])
    select(made, "odd", "SELECT source, shard, row FROM samples WHERE status = 'ok' AND caption_source != ''")
    nested = "SELECT * FROM (SELECT source, shard, row FROM samples WHERE status = 'ok' ORDER BY id) LIMIT 3"
    select(made, "nested", nested)
    fill(made, units=2, columns=["captions/source"])
    section = as_page(write_report(made, tmp_path / "r.html")).text.split("How each selection was chosen")[1]
    odd = section.split("odd@")[1]
    assert "captions/source, images changed since it was made; the conditions are counted on what is there now" in odd
    assert "Its query is more than conditions on single rows" in section.split("odd@")[0]


def test_training_is_told_and_so_is_what_is_damaged(page: Page) -> None:
    assert "7,680 images seen in 120 steps, 15 s at 512 images a second" in page.text
    assert "Stages: 1: tiny-64, mask 75%; 2: tiny-64, mask 0%." in page.text
    assert "1 lines of log.jsonl have no finite loss" in page.text
    assert "1 lines of log.jsonl are no JSON" in page.text
    assert page.html.count('<polyline class="mean"') == 2, "for a desktop and for a phone"
    assert "The validation loss goes from 0.9 to 0.438." in page.text and "validation loss 0.438" in page.text
    assert page.html.count('<polyline class="validation"') == 2
    assert "step-00000120.png cannot be read" in page.text
    assert re.findall(r"After step (\d+)\.", page.text) == ["80", "40"], "the newest first, and three at most"


def test_figures_stand_beside_the_untrained_networks(page: Page) -> None:
    section = page.text.split("What was learned")[1].split("Loss")[0]
    assert "among those of the 64 captions drawn 58 of 64 1 of 64" in section
    assert "among all 1,462 real images 41 of 64 0 of 64" in section
    assert "PSNR to their own real image, mean 15.0 dB 6.3 dB" in section
    assert "KID of EfficientNet-Lite0 to real images (0 is best) 0.205 ± 0.03 3.51 ± 0.2" in section
    assert "held out" not in section, "it was not measured"
    assert "(18 steps, guidance 2), for 64 captions drawn at random" in page.text


def test_untrusted_text_is_escaped(page: Page) -> None:
    assert HOSTILE in page.text and "tiny & <small>" in page.text
    assert "<script" not in page.html and "<small>\n" not in page.html.split("<h1>")[1].split("</h1>")[0]
    assert "default-src 'none'" in page.html


def test_a_page_without_a_run_and_without_latents(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "corpus")
    fill(made, columns=["captions/source"])
    text = as_page(write_report(made, tmp_path / "r.html")).text
    assert "10 of 12 images were kept" in text and "Training" not in text
    assert "Not built yet, and not asked for below: scores/basic, latents/demo-64, text/minilm@source" in text


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "corpus")
    fill(made, units=1, shards=1, columns=["captions/source"])
    write_failure(
        made, "scores/basic", "demo", "demo-000000-00", stage="scores", attempts=3, message="disk <full>", traceback=""
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluation.json").write_text("{")
    (run / "grid.png").write_bytes(b"no picture")
    text = as_page(write_report(made, tmp_path / "r.html", run)).text
    assert "scores/basic: 1 shard failed and was set aside, such as demo-000000-00: disk <full>" in text
    assert "there is no log.jsonl" in text
    assert "evaluation.json is no JSON" in text
    assert "grid.png cannot be read" in text


@pytest.mark.parametrize("what", ["nothing built", "no such run", "out is a folder"])
def test_bad_requests_are_named(tmp_path: Path, corpus: Corpus, what: str) -> None:
    if what == "nothing built":
        empty = Corpus.create(tmp_path / "empty", "empty")
        with pytest.raises(RequestError, match="no images are committed yet"):
            write_report(empty, tmp_path / "r.html")
    elif what == "no such run":
        with pytest.raises(RequestError, match=r"nowhere.*there is no such folder"):
            write_report(corpus, tmp_path / "r.html", tmp_path / "nowhere")
    else:
        with pytest.raises(RequestError, match="cannot be written"):
            write_report(corpus, tmp_path)


# -- in a browser ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=switches)
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_a_browser_shows_it(browser: Browser, page: Page, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    try:
        tab = context.new_page()
        errors: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.path.as_uri())
        for summary in tab.locator("summary").all():  # what is folded away must fit too
            summary.click()
        assert errors == []
        assert [url for url in requests if not url.startswith("data:")] == [page.path.as_uri()]
        images = tab.evaluate("Array.from(document.images, i => [i.complete, i.naturalWidth, i.alt])")
        assert len(images) == page.html.count("<img ") > PICTURES * 2 + 1 + 2
        assert all(complete and size > 0 and alt for complete, size, alt in images)
        assert tab.evaluate("window.hurt") is None
        assert tab.evaluate("document.scripts.length") == 0
        assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
        assert tab.locator("svg.loss:visible").count() == 1, "the curve for this width, and not the other"
        assert tab.locator("h1").inner_text() == "tiny & <small>"
        names = tab.locator("svg[role=img]").evaluate_all("all => all.map(s => s.querySelector('title').textContent)")
        assert len(names) >= 8 and all(names)
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(250, 249, 246)", "dark": "rgb(18, 21, 24)"}[scheme]
    finally:
        context.close()


def test_the_page_is_small(page: Page) -> None:
    assert page.path.stat().st_size < 3_000_000
