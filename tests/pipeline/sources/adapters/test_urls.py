"""The adapter `urls` against a real server that answers, refuses, hangs, lies and breaks off."""

import asyncio
import datetime
import email.utils
import hashlib
import json
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources import url_fetcher as fetch
from microdit.pipeline.sources.adapters.urls import MAX_LINE, Urls, index_list, read_lines
from microdit.pipeline.sources.list_columns import ListColumns
from microdit.pipeline.sources.source import Input

QUICK = FetchOptions(
    concurrency=8,
    timeout=6,
    idle_timeout=1,
    max_bytes=100_000,
    max_redirects=3,
    retry_after=1,
    allow_networks=["127.0.0.0/8"],
    robots_txt=False,
)
MEGABYTE = b"\0" * 1_000_000


class Server:
    """A web server in a thread, which records its requests in `events`."""

    def __init__(self):
        self.events: list[str] = []
        self.busy = self.most_busy = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        app = web.Application()
        app.router.add_get("/{what}/{rest:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        what, rest = request.match_info["what"], request.match_info["rest"]
        self.events.append(request.path)
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            return await getattr(self, what)(request, rest)
        finally:
            self.busy -= 1

    async def ok(self, request: web.Request, rest: str) -> web.StreamResponse:
        await asyncio.sleep(0.01)
        return web.Response(body=rest.encode())

    async def status(self, request: web.Request, rest: str) -> web.StreamResponse:
        return web.Response(status=int(rest))

    async def once(self, request: web.Request, rest: str) -> web.StreamResponse:
        """Respond with the status and Retry-After of the path, then with 200."""
        status, _, retry_after = rest.partition("/")
        if self.events.count(request.path) > 1:
            return web.Response(body=b"at last")
        return web.Response(status=int(status), headers={"Retry-After": retry_after} if retry_after else {})

    async def hang(self, request: web.Request, rest: str) -> web.StreamResponse:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.events.append("hung up")

    async def drip(self, request: web.Request, rest: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b".")
            await asyncio.sleep(0.05)

    async def large(self, request: web.Request, rest: str) -> web.StreamResponse:
        return web.Response(body=MEGABYTE)

    async def endless(self, request: web.Request, rest: str) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        while True:
            await response.write(MEGABYTE)

    async def zipped(self, request: web.Request, rest: str) -> web.StreamResponse:
        response = web.Response(body=MEGABYTE * 20)
        response.enable_compression(web.ContentCoding.gzip)
        return response

    async def redirect(self, request: web.Request, rest: str) -> web.StreamResponse:
        left = int(rest)
        raise web.HTTPFound(f"/redirect/{left - 1}" if left > 1 else "/ok/there")

    async def away(self, request: web.Request, rest: str) -> web.StreamResponse:
        raise web.HTTPFound(rest)

    async def reset(self, request: web.Request, rest: str) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def short(self, request: web.Request, rest: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"not all of it")
        assert request.transport is not None
        request.transport.close()
        return response

    def __enter__(self) -> "Server":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def _listen(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def source(folder: Path, server: Server, paths: list[str], unit_inputs: int = 1000, options: FetchOptions = QUICK):
    (folder / "list.tsv").write_text("".join(f"{path}\tcaption {i}\n" for i, path in enumerate(paths)))
    return Urls("web", folder / "list.tsv", unit_inputs, options, base=server.url, license="CC0")


def read(urls: Urls, wanted=lambda ordinal: True) -> list[Input]:
    return [item for unit in urls.units() for item in urls.read(unit, wanted)]


def test_inputs_come_in_the_order_of_the_list(tmp_path: Path, server: Server):
    found = read(source(tmp_path, server, [f"/ok/{i}" for i in range(50)], unit_inputs=20))
    assert [item.data for item in found] == [str(i).encode() for i in range(50)]
    assert [item.key for item in found] == [f"{i:09d}" for i in range(50)]
    assert [item.ordinal for item in found] == [*range(20), *range(20), *range(10)]
    assert found[7] == Input(7, "000000007", b"7", "/ok/7", "caption 7", "CC0")


def test_requests_in_flight_are_bounded(tmp_path: Path, server: Server):
    read(
        source(tmp_path, server, [f"/ok/{i}" for i in range(100)], options=QUICK.model_copy(update={"concurrency": 5}))
    )
    assert server.most_busy == 5


def test_what_is_not_wanted_is_not_fetched(tmp_path: Path, server: Server):
    found = read(source(tmp_path, server, [f"/ok/{i}" for i in range(20)]), lambda ordinal: ordinal % 3 == 0)
    assert [item.data is not None for item in found] == [i % 3 == 0 for i in range(20)]
    assert all(item.reason is None and item.caption == f"caption {i}" for i, item in enumerate(found))
    assert sorted(server.events) == sorted(f"/ok/{i}" for i in range(0, 20, 3))


FATES = {
    "/status/404": ("http_404", 1),
    "/status/410": ("http_410", 1),
    "/status/403": ("http_403", 1),
    "/status/204": ("http_204", 1),
    "/status/500": ("http_500", 2),
    "/status/503": ("http_503", 2),
    "/status/429": ("http_429", 2),
    "/hang/": ("timeout", 2),
    "/drip/": ("timeout", 1),
    "/reset/": ("connection", 4),  # aiohttp sends each request again at once
    "/short/": ("truncated", 2),
    "/large/": ("too_large", 1),
    "/endless/": ("too_large", 1),
    "/zipped/": ("too_large", 1),
    "/redirect/9": ("redirects", 4),
    "/away/ftp://127.0.0.1/x": ("bad_url", 1),
    "/away/http://127.0.0.1:1/x": ("connection", 2),
    "/once/429/100": ("http_429", 1),
}


def test_every_fault_has_its_reason_and_harms_nobody_else(tmp_path: Path, server: Server):
    paths = [path for fate in FATES for path in (fate, f"/ok/{fate[1:]}")]
    found = read(source(tmp_path, server, paths, options=QUICK.model_copy(update={"concurrency": 40, "timeout": 4})))
    assert {item.origin: item.reason for item in found[::2]} == {path: reason for path, (reason, _) in FATES.items()}
    assert all(item.data is None and item.detail for item in found[::2])
    assert [item.data for item in found[1::2]] == [path[1:].encode() for path in FATES]
    tries = {path: sum(event.startswith(path.partition("9")[0]) for event in server.events) for path in FATES}
    assert 2 <= tries["/status/429"] <= fetch.REFUSALS + 1  # the host allows others meanwhile
    assert tries | {"/status/429": 2} == {path: count for path, (_, count) in FATES.items()}


@pytest.mark.parametrize("fault", ["429", "429/1", "500", "503/0", "503/junk", "503/-1"])
def test_a_passing_fault_is_tried_once_more(tmp_path: Path, server: Server, fault: str):
    [found] = read(source(tmp_path, server, [f"/once/{fault}"]))
    assert found.data == b"at last"
    assert len(server.events) == 2


@pytest.mark.parametrize(("seconds", "tries"), [(-100, 2), (1, 2), (100, 1)])
def test_retry_after_may_be_a_date(tmp_path: Path, server: Server, seconds: int, tries: int):
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    read(source(tmp_path, server, [f"/once/503/{email.utils.format_datetime(when, usegmt=True)}"]))
    assert len(server.events) == tries


def test_redirects_are_followed_within_a_bound(tmp_path: Path, server: Server):
    assert [item.data for item in read(source(tmp_path, server, ["/redirect/3"]))] == [b"there"]


def test_servers_that_never_answer_hold_up_nobody(tmp_path: Path, server: Server):
    hanging = [f"/hang/{i}" for i in range(7)]  # all but one of the requests that may be in flight
    options = QUICK.model_copy(update={"idle_timeout": 3.0, "timeout": 3.5})
    found = read(source(tmp_path, server, [*hanging, *(f"/ok/{i}" for i in range(20))], options=options))
    assert [item.reason for item in found] == ["timeout"] * 7 + [None] * 20
    assert server.events.index("hung up") > max(server.events.index(f"/ok/{i}") for i in range(20))


def test_a_host_that_does_not_exist_or_listen(tmp_path: Path, server: Server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    found = read(source(tmp_path, server, ["http://no-such-host.invalid/x", f"http://127.0.0.1:{port}/x"]))
    assert found[0].reason in ("dns", "timeout")  # without any network a look-up may take longer than a second
    assert found[1].reason == "connection"


@pytest.mark.parametrize("answer", [b"garbage\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"])
def test_a_server_that_does_not_speak_http(tmp_path: Path, server: Server, answer: bytes):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            for _ in range(4):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(answer)

        threading.Thread(target=talk, daemon=True).start()
        [found] = read(source(tmp_path, server, [f"http://127.0.0.1:{listener.getsockname()[1]}/x"]))
    assert found.reason == "connection"


def test_answers_that_wait_are_bounded_in_number(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "WINDOW", 10)
    urls = source(tmp_path, server, [f"/ok/{i}" for i in range(200)])
    taken = 0
    for item in urls.read("web-000000", lambda ordinal: True):
        taken += 1
        assert item.data is not None
        assert len(server.events) <= taken + 10
    assert taken == 200


@pytest.mark.parametrize("spooled", [0, 2_000_000])
def test_answers_that_wait_are_bounded_in_bytes(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, spooled: int
):
    monkeypatch.setattr(fetch, "MAX_HELD", (spooled and 1_000_000) or 3_000_000)
    monkeypatch.setattr(fetch, "MAX_SPOOLED", spooled)
    options = QUICK.model_copy(update={"max_bytes": 2_000_000, "concurrency": 4})
    urls = source(tmp_path, server, ["/large/"] * 40, options=options)
    taken = 0
    for item in urls.read("web-000000", lambda ordinal: True):
        taken += 1
        assert item.data == MEGABYTE
        assert len(server.events) <= taken + 3 + 4
    assert taken == 40


def test_a_reader_that_stops_early_leaves_nothing_behind(tmp_path: Path, server: Server):
    urls = source(tmp_path, server, ["/ok/1", "/hang/", *(f"/ok/{i}" for i in range(50))])
    reader = urls.read("web-000000", lambda ordinal: True)
    assert next(reader).data == b"1"
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch"]


def test_an_error_of_the_caller_comes_back_to_the_caller(tmp_path: Path, server: Server):
    def wanted(ordinal: int) -> bool:
        if ordinal == 5:
            raise KeyError("mine")
        return True

    seen = []
    with pytest.raises(KeyError, match="mine"):
        seen.extend(source(tmp_path, server, [f"/ok/{i}" for i in range(9)]).read("web-000000", wanted))
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch"]


# -- the list --------------------------------------------------------------------------------------------------------
def test_lines_that_are_none(tmp_path: Path, server: Server):
    lines = [
        b"",
        b"no tab",
        b"\tno url",
        b"ftp://127.0.0.1/x\tother scheme",
        b"http:///x\tno host",
        b"http://[::1/x\tno address",
        b"http://127.0.0.1/\xff\tnot UTF-8",
        b"x" * (MAX_LINE + 1) + b"\tlong",
        b"x" * (3 * MAX_LINE) + b"\tlonger",
        f"{server.url}/ok/fine\t  a   caption\twith a tab \r".encode(),
        f"{server.url}/ok/last\t".encode(),
    ]
    (tmp_path / "list.tsv").write_bytes(b"\n".join(lines))
    found = read(Urls("web", tmp_path / "list.tsv", 100, QUICK))
    assert [item.reason for item in found] == ["unreadable_list_line"] * 9 + [None, None]
    assert all(item.detail and len(item.detail) < 300 for item in found[:9])
    assert [item.key for item in found] == [f"{i:09d}" for i in range(11)]
    assert [(item.data, item.caption) for item in found[9:]] == [(b"fine", "a caption with a tab"), (b"last", "")]


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    last_has_end=st.booleans(),
    unit_inputs=st.integers(1, 8),
    limit=st.none() | st.integers(1, 35),
    block=st.integers(1, 40),
)
def test_units_are_the_list_cut_up(tmp_path_factory, lines, last_has_end, unit_inputs, limit, block):
    file = tmp_path_factory.mktemp("list") / "list.tsv"
    file.write_bytes(b"\n".join(lines) + (b"\n" if last_has_end and lines else b""))
    if not last_has_end and lines and not lines[-1]:
        lines = lines[:-1]  # what is behind the last end of line is a line only if there is something
    wanted = lines[:limit]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microdit.pipeline.sources.adapters.urls.BLOCK", block)
        index = index_list(file, unit_inputs, limit)
        assert index.inputs == len(wanted)
        assert len(index.offsets) - 1 == -(-len(wanted) // unit_inputs)
        if not wanted:
            return
    found = [list(read_lines(file, index, number)) for number in range(len(index.offsets) - 1)]
    assert [line for unit in found for line in unit] == [line.rstrip(b"\r") for line in wanted]
    assert all(len(unit) == unit_inputs for unit in found[:-1])


def test_the_declaration_tells_lists_apart(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("http://a/1\tx\nhttp://a/2\ty\n")
    (tmp_path / "b.tsv").write_text("http://a/1\tx\nhttp://a/3\ty\n")
    a, b = (Urls("web", tmp_path / name, 10, QUICK).stage() for name in ("a.tsv", "b.tsv"))
    assert {name for name in a if a[name] != b[name]} == {"list"}
    first = [Urls("web", tmp_path / name, 10, QUICK, limit=1).stage() for name in ("a.tsv", "b.tsv")]
    assert first[0] == first[1]
    assert (first[0]["inputs"], first[0]["units"]) == (1, 1)
    patient = QUICK.model_copy(update={"timeout": 60, "concurrency": 1})
    assert Urls("web", tmp_path / "a.tsv", 10, patient).stage() == a


def test_a_list_that_changed_is_read_again(tmp_path: Path):
    file = tmp_path / "list.tsv"
    file.write_text("http://a/1\tx\n")
    before = Urls("web", file, 10, QUICK)
    file.write_text("http://a/1\tx\nhttp://a/2\ty\n")
    assert Urls("web", file, 10, QUICK).stage()["inputs"] == 2
    assert before.stage()["inputs"] == 1


def test_a_list_that_is_not_there_or_empty(tmp_path: Path):
    with pytest.raises(RequestError, match=r"sources\.web\.list = .*none\.tsv.*No such file.*url<TAB>caption"):
        Urls("web", tmp_path / "none.tsv", 10, QUICK)
    with pytest.raises(RequestError, match=r"sources\.web\.list.*directory"):
        Urls("web", tmp_path, 10, QUICK)
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(RequestError, match="empty"):
        Urls("web", tmp_path / "empty.tsv", 10, QUICK)


def test_bytes_are_those_that_the_list_says(tmp_path: Path, server: Server):
    data = b"1"
    rows = [
        {"md5": hashlib.md5(data).hexdigest().upper(), "sha256": hashlib.sha256(data).hexdigest()},
        {"md5": None, "sha256": ""},
        {"md5": hashlib.md5(data).hexdigest(), "sha256": "0" * 64},
        {"md5": "f" * 32},
        {"md5": "none"},
        {"md5": 12},
    ]
    lines = [json.dumps({"url": f"{server.url}/ok/1", "caption": "one", **row}) for row in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    columns = ListColumns(more=(("md5", "md5"), ("sha256", "sha256")))
    found = read(Urls("web", tmp_path / "list.jsonl", 10, QUICK, columns=columns))
    assert [(item.reason, item.data) for item in found] == [
        *[(None, data)] * 2,
        *[("wrong_checksum", None)] * 2,
        *[("unreadable_list_line", None)] * 2,
    ]
    assert found[2].detail == (
        f"the sha256 of the 1 bytes that came is {hashlib.sha256(data).hexdigest()}, the list has {'0' * 64}"
    )
    assert found[4].detail == "md5: expected 32 hexadecimal digits, found 'none'"
    assert found[3].origin == f"{server.url}/ok/1"


def test_sources_travel(tmp_path: Path, server: Server):
    urls = source(tmp_path, server, ["/ok/1", "/ok/2"])
    copy = pickle.loads(pickle.dumps(urls))
    assert copy.stage() == urls.stage()
    assert [item.data for item in read(copy)] == [b"1", b"2"]
