"""Pictures that a server says are not for us are left out, each with its reason, and only if it is to be heeded."""

import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.opt_outs import RobotsRules
from microdit.pipeline.sources.url_fetcher import Fetched, fetch_all
from tests.servers.sloppy import SloppyServer, picture

HEEDING = FetchOptions(timeout=4, idle_timeout=1, allow_networks=["127.0.0.0/8"])
AGENT = HEEDING.agent


def fetched(urls: list[str], **options: object) -> list[Fetched]:
    used = HEEDING.model_copy(update=options)
    return [answer for _, answer in fetch_all(((url, url) for url in urls), used) if answer is not None]


SAID = {
    "/said/X-Robots-Tag/noai%2C noimageai": "noai",
    "/said/x-robots-tag/ NoImageAI": "noimageai",
    "/said/X-Robots-Tag/noindex": "noindex",
    "/said/X-Robots-Tag/all%2C noimageindex": "noimageindex",
    "/said/X-Robots-Tag/none": "noindex",
    "/said/X-Robots-Tag/microdit: noai": "noai",
    "/said/X-Robots-Tag/otherbot: noai": None,
    "/said/X-Robots-Tag/unavailable_after: 1 Jan 2099 15:00:00 GMT": None,
    "/said/X-Robots-Tag/max-image-preview: large": None,
    "/said/X-Robots-Tag/nofollow%2C noarchive": None,
    "/said/tdm-reservation/1": "tdm_reservation",
    "/said/tdm-reservation/0": None,
}


def test_headers_that_opt_out_are_heeded():
    with SloppyServer() as server:
        urls = [server.url + path for path in SAID]
        assert dict(zip(SAID, (one.reason for one in fetched(urls)), strict=True)) == SAID
        assert {one.reason for one in fetched(urls, opt_out_headers=False)} == {None}
        assert [one.reason for one in fetched([f"{server.url}/to/said/X-Robots-Tag/noai"])] == ["noai"]


def test_robots_txt_is_asked_for_once_and_heeded():
    robots = b"User-agent: *\nDisallow: /private/\nAllow: /private/open/\n"
    with SloppyServer(robots=robots) as server:
        paths = [f"/{folder}/{i}" for i in range(20) for folder in ("ok", "private", "private/open")]
        found = fetched([server.url + path for path in [*paths, "/to/private/x"]])
        assert [one.reason for one in found] == [None, "robots_txt", None] * 20 + ["robots_txt"]
        assert [one.data for one in found[:1]] == [picture("/ok/0")]
        assert server.asked.count("/robots.txt") == 1
        assert not [path for path in server.asked if path.startswith("/private/") and "open" not in path]
        assert fetched([f"{server.url}/private/1"], robots_txt=False)[0].reason is None


@pytest.mark.parametrize(
    ("status", "reason"), [("404", None), ("403", None), ("410", None), ("500", "http_500"), ("503", "http_503")]
)
def test_a_robots_txt_that_cannot_be_had(status: str, reason: str | None, monkeypatch: pytest.MonkeyPatch):
    answer = SloppyServer._answer
    with SloppyServer() as server:
        monkeypatch.setattr(
            SloppyServer,
            "_answer",
            lambda self, path: answer(self, f"/status/{status}" if path == "/robots.txt" else path),
        )
        found = fetched([f"{server.url}/ok/{i}" for i in range(3)])
    assert [one.reason for one in found] == [reason] * 3
    assert all(one.detail.startswith("robots.txt: ") for one in found if reason)


def test_a_silent_host_is_waited_for_once():
    with socket.create_server(("127.0.0.1", 0), backlog=200) as silent:
        began = time.monotonic()
        found = fetched([f"http://127.0.0.1:{silent.getsockname()[1]}/{i}" for i in range(40)])
    assert {one.reason for one in found} == {"timeout"}
    assert time.monotonic() - began < 4


def test_the_contact_stands_in_the_user_agent():
    assert FetchOptions(contact="mailto:me@h.test").agent.endswith("microdit/0.1) (+mailto:me@h.test)")
    with pytest.raises(ValueError, match="contact"):
        FetchOptions(contact="a\r\nX: b")


RULES = """\ufeff# comment
User-agent: otherbot
Disallow: /

USER-AGENT: *   # all
user-agent: somebot
Crawl-delay: 3
disallow: /a
Allow: /a/b
Disallow: /*.gif$
Disallow: /q?x=
Disallow:
Disallow: /%C3%A9
Sitemap: https://h/s.xml
"""


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        *(("/", True), ("/a", False), ("/a/c", False), ("/a/b", True), ("/x.gif", False), ("/x.gif?y", True)),
        *(("/q?x=1", False), ("/q?y=1", True), ("/é", False), ("/%c3%a9/1", False)),
    ],
)
def test_rules_are_read_as_the_standard_says(path: str, allowed: bool):
    assert RobotsRules.parse(RULES.encode(), AGENT).allow(path) == allowed


def test_the_group_that_names_us_counts_alone():
    rules = b"User-agent: *\nDisallow: /\nUser-agent: MicroDiT\nDisallow: /x\nUser-agent: mozilla\nDisallow: /y\n"
    ours = RobotsRules.parse(rules, AGENT)
    assert (ours.allow("/"), ours.allow("/x"), ours.allow("/y")) == (True, False, True)
    assert not RobotsRules.parse(rules, "other/1.0").allow("/")


@given(st.binary(max_size=200), st.text(max_size=30))
def test_any_bytes_are_some_rules(data: bytes, path: str):
    RobotsRules.parse(data, AGENT).allow(path)


def test_patterns_of_strangers_take_no_time():
    rules = RobotsRules.parse(b"User-agent: *\n" + b"Disallow: /" + b"*a" * 5000 + b"b$\n", AGENT)
    began = time.monotonic()
    assert rules.allow("/" + "a" * 4000)
    assert time.monotonic() - began < 1
