"""A reader of `microdit explore` in Debian's chromium: what he does, and what the page says."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlencode

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
SIZES = {390: 844, 1280: 900, 2560: 1400}


@contextmanager
def chromium() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)  # a machine may be busy
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=SWITCHES)
        yield browser
        browser.close()


class Reader:
    """One tab, and everything that its console was told."""

    def __init__(self, tab: Page, url: str):
        self.tab, self.url = tab, url
        self.messages: list[str] = []  # a browser also writes down every request that is refused
        self.expected: list[str] = []  # parts of messages that may come, perhaps late
        self.requests: list[str] = []
        tab.on("console", lambda message: self.messages.append(f"{message.text} {message.location.get('url')}"))
        tab.on("pageerror", lambda error: self.messages.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))

    def open(self, **state: str) -> "Reader":
        self.tab.goto("about:blank")
        self.tab.goto(f"{self.url}#{urlencode(state)}")
        expect(self.tab.locator("h1")).not_to_have_text("microdit explore")
        return self

    def see(self, selector: str, text: str | None = None) -> Locator:
        return self.tab.locator(selector, has_text=text)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    def counted(self, text: str) -> None:
        """Wait until the count of the filter's rows is this."""
        expect(self.tab.locator("#count")).to_have_text(text)

    @property
    def state(self) -> dict[str, str]:
        """The state in the URL."""
        return self.tab.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")

    @property
    def focus(self) -> str:
        """The name of what has the focus."""
        return self.tab.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id")

    def until(self, expression: str) -> None:
        """Wait until this is true in the page; the page's policy forbids playwright's own way."""
        for _ in range(400):
            if self.tab.evaluate(expression):
                return
            self.tab.wait_for_timeout(50)
        raise AssertionError(f"never true: {expression}")

    def filter_by_sql(self, where: str) -> None:
        """Type a condition, from wherever the focus is."""
        self.tab.evaluate("document.activeElement.blur()")
        self.press("/")
        self.press("ControlOrMeta+a")
        self.tab.keyboard.type(where)
        self.press("Enter")

    def to_the_end(self) -> int:
        """Scroll until the last picture; the most pictures that were in the document at once."""
        most = 0
        while not (end := self.see("#grid-end").inner_text()).startswith("That is all"):
            assert "cannot" not in end, end
            self.tab.evaluate("document.getElementById('main').scrollBy(0, 2 * innerHeight)")
            self.tab.wait_for_timeout(30)
            most = max(most, self.see("#grid li").count())
        self.tab.evaluate("document.getElementById('main').scrollTo(0, 1e9)")
        return most


@contextmanager
def reading(browser: Browser, url: str, width: int, scheme: str = "light") -> Iterator[Reader]:
    """A tab of this width; in the end nothing may have been said in the console, and nothing run that is data."""
    size = {"width": width, "height": SIZES[width]}
    context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=width < 500)  # type: ignore[arg-type]
    try:
        reader = Reader(context.new_page(), url)
        yield reader
        assert [one for one in reader.messages if not any(part in one for part in reader.expected)] == []
        assert reader.tab.evaluate("window.hurt") is None
        assert [one for one in reader.requests if not one.startswith((url, "data:", "about:"))] == []
    finally:
        context.close()
