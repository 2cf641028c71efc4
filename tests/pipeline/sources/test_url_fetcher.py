"""The fetcher against servers as they are: sloppy ones, strict ones, ones that allow few requests, silent ones."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources import host_pace
from microdit.pipeline.sources.url_fetcher import Fetched, fetch_all
from microdit.pipeline.sources.web_url import as_written, redirected
from tests.servers.sloppy import SloppyServer, picture

QUICK = FetchOptions(timeout=8, idle_timeout=2, max_bytes=100_000, allow_networks=["127.0.0.0/8"], robots_txt=False)


@pytest.fixture
def server() -> Iterator[SloppyServer]:
    with SloppyServer() as server:
        yield server


def fetched(server: SloppyServer, paths: list[str], options: FetchOptions = QUICK) -> dict[str, Fetched]:
    urls = [path if path.startswith("http") else server.url + path for path in paths]
    found = dict(zip(paths, (answer for _, answer in fetch_all(((url, url) for url in urls), options)), strict=True))
    return {path: answer for path, answer in found.items() if answer is not None}


WRITTEN = {
    **{path: path for path in ("/a%27b", "/a%2fb", "/a%7Eb", "/a?u=http%3A%2F%2Fh", "/a/../b", "/a//b", "/a?", "/[1]")},
    "/100%": "/100%25",
    "/a b": "/a%20b",
    "/é?é": "/%C3%A9?%C3%A9",
    "/a|b": "/a%7Cb",
    "/a#b": "/a",
}


@pytest.mark.parametrize("redirect", ["", "/to"])
def test_urls_are_sent_as_written(server: SloppyServer, redirect: str):
    for path, sent in WRITTEN.items():
        if redirect and "#" in path:
            continue
        answer = fetched(server, [f"{redirect}{path}" if not redirect else f"{redirect}{sent}"])
        assert [found.data for found in answer.values()] == [picture(sent)]
        assert server.asked[-1] == sent
        assert [found.url for found in answer.values()] == [server.url + (sent if redirect else path)]


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='#%"<>\\^`{|}'), max_size=30))
def test_what_may_be_sent_stays(path: str):
    assert as_written(f"http://h/{path}").raw_path_qs == f"/{path}"


def test_redirects_are_resolved():
    assert redirected("https://h/a/b?c", "/x/../y?") == "https://h/x/../y?"
    assert redirected("https://h/a/b", "//i/x") == "https://i/x"
    assert redirected("https://h/a/b", "c%2f") == "https://h/a/c%2f"
    assert redirected("https://h/a/b", " HTTP://i/%7e ") == "HTTP://i/%7e"


SLOPPY = [
    *("large_header", "many_headers", "same_lengths", "length_and_chunks", "no_gzip", "x_gzip", "bytes_behind_gzip"),
    *("no_brotli", "no_colon", "space_in_name", "nul", "behind", "close/icy", "203", "206/whole"),
]


def test_what_browsers_take_is_taken_and_costs_nobody_else(server: SloppyServer):
    paths = [path for name in SLOPPY for path in (f"/{name}", f"/ok/{name}")]
    found = fetched(server, paths, QUICK.model_copy(update={"concurrency": 2}))
    assert {path: answer.reason for path, answer in found.items() if answer.reason} == {}
    assert {path: answer.data for path, answer in found.items()} == {path: picture(path) for path in paths}


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/206/part", "http_206"), ("/close/cut", "truncated"), ("/close/other_lengths", "connection")],
)
def test_what_is_not_whole_fails(server: SloppyServer, path: str, reason: str):
    assert fetched(server, [path])[path].reason == reason


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529])
def test_passing_faults_are_tried_again(server: SloppyServer, status: int):
    assert fetched(server, [f"/once/{status}/x"])[f"/once/{status}/x"].reason is None


def test_the_pace_of_a_host_is_learnt(server: SloppyServer):
    paths = [f"/limited/{i}" for i in range(120)]
    found = fetched(server, paths)
    assert [path for path, answer in found.items() if answer.data != picture(path)] == []
    assert len(server.asked) < 3 * len(paths)


def test_silent_hosts_cost_one_wait(server: SloppyServer):
    with socket.create_server(("127.0.0.1", 0), backlog=200) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        paths = [f"{url}/{i}" if i % 10 == 0 else f"/ok/{i}" for i in range(600)]
        began = time.monotonic()
        found = fetched(server, paths, QUICK.model_copy(update={"concurrency": 8}))
    assert time.monotonic() - began < 8  # sixty of two seconds each, eight at once, would take fifteen
    assert {path: answer.reason for path, answer in found.items() if answer.reason} == dict.fromkeys(
        paths[::10], "timeout"
    )
    assert all(answer.data == picture(path) for path, answer in found.items() if path.startswith("/"))


def test_a_silent_host_is_known_in_the_next_unit_and_may_answer_again(server: SloppyServer):
    impatient = QUICK.model_copy(update={"idle_timeout": 1.5})
    with socket.create_server(("127.0.0.1", 0), backlog=200) as silent:
        port = silent.getsockname()[1]
        paths = [f"http://127.0.0.1:{port}/{i}" for i in range(60)]
        first = fetched(server, paths, impatient)
        assert {answer.reason for answer in first.values()} == {"timeout"}
        assert {answer.detail for answer in first.values()} == {
            *("no bytes for 1.5 seconds", "no bytes for 1 second", "its host answers no requests")
        }
        began = time.monotonic()
        assert {answer.reason for answer in fetched(server, paths).values()} == {"timeout"}
        assert time.monotonic() - began < 1.9  # and not the two seconds of a first wait
    with SloppyServer(port=port) as revived:
        found = fetched(revived, paths, impatient)
        assert {path: answer.data for path, answer in found.items()} == {
            path: picture(path.rpartition(str(port))[2]) for path in paths
        }


def test_a_host_that_stays_silent_is_not_asked_in_each_unit(server: SloppyServer, monkeypatch: pytest.MonkeyPatch):
    impatient = QUICK.model_copy(update={"idle_timeout": 1.0})
    with socket.create_server(("127.0.0.1", 0), backlog=200) as silent:
        port = silent.getsockname()[1]
        paths = [f"http://127.0.0.1:{port}/1", "/ok/1"]
        for _ in range(3):
            assert fetched(server, paths, impatient)[paths[0]].reason == "timeout"
        began = time.monotonic()
        assert [answer.reason for answer in fetched(server, paths, impatient).values()] == ["timeout", None]
        assert time.monotonic() - began < 0.7
    with SloppyServer(port=port) as revived:
        assert fetched(revived, paths, impatient)[paths[0]].reason == "timeout"  # a passing fault, for `--retry-failed`
        monkeypatch.setattr(host_pace, "REST", 0.0)
        assert fetched(revived, paths, impatient)[paths[0]].data == picture("/1")


def test_each_host_is_asked_at_the_beginning(server: SloppyServer):
    """A silent host at the end of the list is known early, and waited for while others are fetched."""
    last = server.url.replace("127.0.0.1", "localhost") + "/last"
    fetched(server, [*(f"/ok/{i}" for i in range(60)), last], QUICK.model_copy(update={"concurrency": 2}))
    assert server.asked.index("/last") < 20


def test_slow_hosts_lose_nothing(server: SloppyServer):
    paths = [f"/{'slow' if i % 3 else 'ok'}/{i}" for i in range(60)]
    assert [answer.data for answer in fetched(server, paths).values()] == [picture(path) for path in paths]


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/hang", "no bytes for 0.5 seconds"),
        ("/drip", "no complete answer within 1.5 seconds"),
    ],
)
def test_a_timeout_says_which_limit_it_was(server: SloppyServer, path: str, detail: str):
    limits = QUICK.model_copy(update={"idle_timeout": 0.5, "timeout": 1.5})
    assert [(one.reason, one.detail) for one in fetched(server, [path], limits).values()] == [("timeout", detail)]


def test_results_come_while_others_are_fetched(server: SloppyServer):
    """The first results do not wait for the last ones, whatever the host's pace was at the beginning."""
    urls = [f"{server.url}/ok/{i}" for i in range(3000)]
    asked = [len(server.asked) for _ in fetch_all(((url, url) for url in urls), QUICK)]
    assert asked[100] < 1500


WATCHED = """
import sys
from microdit.pipeline.base.liveness import watched
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources import host_pace
from microdit.pipeline.sources.url_fetcher import fetch_all
options = FetchOptions(timeout=8, idle_timeout=2, allow_networks=["127.0.0.1"])
with watched(1.0):
    [(_, found)] = fetch_all([(0, sys.argv[1])], options)
print(found.reason)
"""


def test_waiting_for_a_server_is_no_hang():
    """A `stall_timeout` below `fetch.timeout` sets no unit aside."""
    with socket.create_server(("127.0.0.1", 0), backlog=20) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        done = subprocess.run([sys.executable, "-c", WATCHED, url], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "timeout\n"), done.stderr
