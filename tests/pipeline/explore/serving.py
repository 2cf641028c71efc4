"""A server of `microdit explore` in a thread, and how tests ask it."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.explore.server import bind, serve


@dataclass
class Answer:
    """An answer: its status, its headers, and its bytes."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


@dataclass
class Served:
    """A server that runs. `url` ends with a slash, or with the token."""

    url: str
    csrf: str = ""
    cookies: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        """Send a request with these headers alone, and read its answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            data = None if body is None else json.dumps(body).encode()
            given = {"Host": f"127.0.0.1:{self.port}"} | ({"Content-Type": "application/json"} if data else {})
            if self.cookies:
                given["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            connection.request(method, path, data, given | {k.replace("_", "-"): v for k, v in headers.items()})
            response: HTTPResponse = connection.getresponse()
            found: dict[str, str] = {}
            for name, value in response.getheaders():
                found[name.lower()] = f"{found[name.lower()]}, {value}" if name.lower() in found else value
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, name: str, **parameters: Any) -> Any:
        """Ask for `/api/NAME`, which has to succeed, and give its JSON."""
        answer = self.ask(f"/api/{name}?{urlencode(parameters)}")
        assert answer.status == 200, answer.data
        return answer.json

    def leave(self, name: str, where: str, seconds: float = 0.5) -> None:
        """Ask with a condition, and leave after some time; raises TimeoutError unless the answer came before."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", f"/api/{name}?{urlencode({'where': where})}")
            connection.getresponse()
        finally:
            connection.close()

    def refused(self, name: str, **parameters: Any) -> str:
        """Ask for `/api/NAME`, which has to be refused with one message, and give that."""
        answer = self.ask(f"/api/{name}?{urlencode(parameters)}")
        assert 400 <= answer.status < 500, answer.data
        assert list(answer.json) == ["error"]
        return str(answer.json["error"])

    def post(self, path: str, /, **body: Any) -> Answer:
        """Post JSON as a page does that has asked for `/api/corpus`."""
        self.csrf = self.csrf or self.get("corpus")["token"]
        return self.ask(f"/api/{path}", "POST", body, X_Microdit_Token=self.csrf)


@contextmanager
def served(
    corpus: Corpus, token: str | None = None, read_only: bool = False, runs: Path | None = None
) -> Iterator[Served]:
    """Serve a corpus in a thread while the block runs; what it keeps on this machine goes with it."""
    with TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        with _served(corpus, token, read_only, runs) as found:
            yield found


@contextmanager
def _served(corpus: Corpus, token: str | None, read_only: bool, runs: Path | None) -> Iterator[Served]:
    ready, begun = threading.Event(), list[str]()
    loop = asyncio.new_event_loop()

    def told(url: str) -> None:
        begun.append(url)
        ready.set()

    async def main() -> None:
        await serve(corpus, bind("127.0.0.1", 0), token, read_only, runs, told)

    task = loop.create_task(main())
    task.add_done_callback(lambda _: ready.set())

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except BaseException:
            ready.set()
        finally:
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(120)
    if not begun:
        thread.join()
        task.result()
    try:
        yield Served(begun[0])
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
        assert not thread.is_alive()
