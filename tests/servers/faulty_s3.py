"""A proxy that makes an S3 server fail: 500 and 503, resets, stalls, truncated uploads and responses."""

import contextlib
import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("error_500", "error_503", "reset", "stall", "cut_upload", "cut_answer")
BAD_DAY = {"error_500": 0.025, "error_503": 0.025, "reset": 0.02, "stall": 0.02, "cut_upload": 0.02, "cut_answer": 0.02}
CODES = {"error_500": (500, "InternalError"), "error_503": (503, "SlowDown")}
READS = ("GET", "HEAD")
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass(frozen=True)
class Fault:
    """The fault of one request: one of `KINDS`, before or (`done`) after the server has carried it out."""

    kind: str
    done: bool = False


class FaultyS3:
    """Passes requests on to `upstream`, and counts them; a share of them meets a fault. A context manager.

    Args:
        rates: the share of requests that meet each kind. A cut happens only to a request, or an answer, with a body.
        stall_seconds: how long a stall lasts, one of these; then the request goes on.
    """

    def __init__(
        self, upstream: str, seed: int, rates: Mapping[str, float] = BAD_DAY, stall_seconds: Sequence[float] = (1.0,)
    ):
        self.upstream = urlsplit(upstream).netloc
        self.seed, self.rates, self.stall_seconds = seed, dict(rates), stall_seconds
        self.script: deque[Fault | None] = deque()
        """Faults of the next requests, instead of random ones."""
        self.conditions = "kept"
        """What becomes of `If-None-Match`: `kept`, `ignored` as by some servers, or `refused` with 501."""
        self.expired: set[str] = set()
        """Session tokens that have expired."""
        self.requests: Counter[str] = Counter()
        """Counts by method; listings are counted as `LIST`."""
        self.faults: Counter[str] = Counter()
        self.lost_answers = 0
        """Writes that succeeded and whose response was lost or an error."""
        self.retries = 0
        """Requests that repeat one that met a fault."""
        self._unlucky: Counter[tuple[str, str]] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyS3":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def admit(self, method: str, path: str) -> tuple[Fault | None, float]:
        """Count a request; return its fault, and the seconds of a stall."""
        with self._lock:
            self.requests["LIST" if "list-type=2" in path else method] += 1
            if self._unlucky[method, path] > 0:
                self._unlucky[method, path] -= 1
                self.retries += 1
            stall = self._random.choice(self.stall_seconds)
            if self.script:
                return self.script.popleft(), stall
            chance, done = self._random.random(), self._random.random() < 0.5
            for kind, rate in self.rates.items():
                chance -= rate
                if chance < 0:
                    return Fault(kind, done), stall
            return None, stall

    def fired(self, fault: Fault, method: str, path: str) -> None:
        """Count a fault that has happened."""
        with self._lock:
            self.faults[fault.kind] += 1
            self._unlucky[method, path] += 1
            self.lost_answers += fault.done and fault.kind not in ("stall", "cut_upload") and method not in READS


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    proxy: FaultyS3

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients and servers that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _any(self) -> None:
        proxy, where = self.server.proxy, (self.command, self.path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        fault, stall = proxy.admit(*where)
        if self.headers.get("x-amz-security-token") in proxy.expired:
            text = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            self._answer(400, [("Content-Type", "application/xml")], text)
            return
        if proxy.conditions == "refused" and self.headers.get("If-None-Match"):
            text = b"<Error><Code>NotImplemented</Code><Message>not implemented here</Message></Error>"
            self._answer(501, [("Content-Type", "application/xml")], text)
            return
        kind = fault.kind if fault else None
        if fault is None or (kind == "cut_upload" and not body):
            self._answer(*self._forward(body))
            return
        if kind == "cut_answer":
            status, headers, answer = self._forward(body)
            if self.command == "HEAD" or len(answer) < 2:
                self._answer(status, headers, answer)
                return
            proxy.fired(Fault("cut_answer", True), *where)
            self._answer(status, headers, answer, cut=True)
            return
        proxy.fired(fault, *where)
        if kind == "cut_upload":
            self._forward(body, cut=True)
            self._reset()
        elif kind == "stall":
            if not fault.done:
                time.sleep(stall)
            answered = self._forward(body)
            if fault.done:
                time.sleep(stall)
            self._answer(*answered)
        else:
            if fault.done:
                self._forward(body)
            if kind == "reset":
                self._reset()
            else:
                status, code = CODES[fault.kind]
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
                self._answer(status, [("Content-Type", "application/xml")], text)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def _forward(self, body: bytes, cut: bool = False) -> tuple[int, list[tuple[str, str]], bytes]:
        """Forward a request; a truncated one has half of its body, and its response is not awaited."""
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=120)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                ignored = name.lower() == "if-none-match" and self.server.proxy.conditions == "ignored"
                if name.lower() not in HOP and not ignored:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[: len(body) // 2] if cut else body)
            if cut:
                return 0, [], b""
            answer = connection.getresponse()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("content-length", "0")))
            return answer.status, headers, answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def _reset(self) -> None:
        """End the connection with RST: sent bytes that are not read yet are lost."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # without the FIN that the server would send first
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass
