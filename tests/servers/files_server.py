"""A plain web server for files on loopback, as data sets are published outside of hubs.

Signed links that expire, ranges or none, and everything that goes wrong with downloads of many gigabytes.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest


@dataclass
class Served:
    """A file, and what its server does with it. `faults` are those of the next requests, in order, one for each.

    ("cut", bytes after which the connection breaks), ("status", answered instead), ("slow", bytes in each twentieth of
    a second), ("silent", bytes after which nothing comes for a second), ("lie", bytes that are announced and do not
    come), ("become", bytes: it is another file from now on), ("", None) for none.
    """

    data: bytes
    etag: str | None = ""
    """None: the server sends none; "" that of the bytes."""
    modified: float | None = 1.7e9
    ranges: bool = True
    if_range: bool = True
    """If False, the server ignores that header and always sends the range."""
    signed: bool = False
    """Refuse requests without an `oe=<hex time>` in the query that is still to come."""
    length: bool = True
    """Send Content-Length."""
    faults: list[tuple[str, object]] = field(default_factory=list)

    def headers(self) -> dict[str, str]:
        found = {"Accept-Ranges": "bytes"} if self.ranges else {}
        if self.etag is not None:
            found["ETag"] = self.etag or f'"{sha256(self.data).hexdigest()[:16]}"'
        if self.modified is not None:
            found["Last-Modified"] = formatdate(self.modified, usegmt=True)
        return found


@dataclass
class Asked:
    """A request: the path, its Range and If-Range, the answer, and how many bytes of it were sent so far."""

    path: str
    range: str | None
    if_range: str | None
    status: int
    sent: int = 0
    login: str | None = None


class FilesServer:
    """`files`: by path, without the first slash. `asked`: the requests so far."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.asked: list[Asked] = []
        self.retry_after = "1"
        self.connections: list[socket.socket] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of_files": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def add(self, path: str, data: bytes, **about: object) -> str:
        """Serve a file; return its URL, without a signature."""
        self.files[path] = Served(data, **about)  # type: ignore[arg-type]
        return f"{self.url}/{quote(path)}"

    def signed(self, path: str, seconds: float = 3600) -> str:
        """Make a link to a file that expires after so many seconds."""
        self.files[path].signed = True
        return f"{self.url}/{quote(path)}?_nc_gid=SECRET&oh=00_SECRET&oe={int(time.time() + seconds):X}"

    def ranges(self, path: str) -> list[str | None]:
        """List the Range headers of the requests for a file, in order."""
        return [asked.range for asked in self.asked if asked.path == path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_files: FilesServer

    def setup(self) -> None:
        super().setup()
        self.server_of_files.connections.append(self.connection)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # clients that break off are what is tested
            super().handle()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path.removeprefix("/"))
        file = self.server_of_files.files.get(path)
        if file is None:
            return self._send(path, 404, {}, b"no such file")
        if file.signed and int(parse_qs(url.query).get("oe", ["0"])[0], 16) < time.time():
            return self._send(path, 403, {"Content-Type": "text/plain"}, b"URL signature expired")
        kind, value = file.faults.pop(0) if file.faults else ("", None)
        if kind == "become":
            file.data = value  # type: ignore[assignment]
            if file.modified is not None:
                file.modified += 60
        if kind == "status":
            late = value in (429, 503)
            return self._send(path, value, {"Retry-After": self.server_of_files.retry_after} if late else {}, b"no")
        status, body, headers = 200, file.data, file.headers()
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        fits = condition is None or condition in (headers.get("ETag"), headers.get("Last-Modified"))
        if wanted and file.ranges and (fits or not file.if_range):
            start, total = int(wanted[1]), len(file.data)
            if start >= total:
                return self._send(path, 416, {"Content-Range": f"bytes */{total}"}, b"")
            status, body = 206, file.data[start:]
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self._send(path, status, headers, body, kind, value, file.length)

    def _send(
        self,
        path: str,
        status: object,
        headers: dict[str, str],
        body: bytes,
        kind: str = "",
        value: object = None,
        length: bool = True,
    ) -> None:
        assert isinstance(status, int)
        asked = Asked(
            path,
            self.headers.get("Range"),
            self.headers.get("If-Range"),
            status,
            login=self.headers.get("Authorization"),
        )
        self.server_of_files.asked.append(asked)
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        if length:
            self.send_header("Content-Length", str(len(body) + (value if kind == "lie" else 0)))  # type: ignore[operator]
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if not length or kind in ("cut", "lie"):
            self.close_connection = True
        if kind in ("cut", "silent"):
            first, rest = body[:value], body[value:]  # type: ignore[misc]
        else:
            first, rest = body, b""
        if self.command != "HEAD":
            step = value if kind == "slow" else max(1, len(first))
            with contextlib.suppress(OSError):  # the client went away
                for start in range(0, len(first), step):  # type: ignore[call-overload]
                    asked.sent += self.wfile.write(first[start : start + step])  # type: ignore[operator]
                    if kind == "slow":
                        time.sleep(0.05)
                self.wfile.flush()
                if kind == "silent":
                    time.sleep(1)
                    asked.sent += self.wfile.write(rest)


@pytest.fixture
def files_server() -> Iterator[FilesServer]:
    """An empty server."""
    server = FilesServer()
    try:
        yield server
    finally:
        server.close()
