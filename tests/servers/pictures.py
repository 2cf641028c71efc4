"""A web server of pictures that stops, or allows few requests, and captions them as OpenAI's API does."""

import hashlib
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import numpy as np
from PIL import Image

CAPTION = "A square of many colours lies on a table, seen from above."


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 48)).save(buffer, "PNG")
    return buffer.getvalue()


class PictureServer:
    """The server on a port of this machine, which it keeps when it is entered again.

    Args:
        answers: pictures that it sends before it stops.
        rate: pictures a second that it sends; to further requests it answers 429.
        rejects: how many different images it answers 400 to, when it is asked for captions.
    """

    def __init__(self, answers: int | None = None, rate: float | None = None, rejects: int = 0):
        self.answers, self.rate, self.rejects = answers, rate, rejects
        self.sent = self.refused = 0
        self.rejected: set[str] = set()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._tokens, self._filled = 10.0, time.monotonic()

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()

    def _serve(self) -> None:
        with self._server:  # closes its socket at the end: further connections are refused
            self._server.serve_forever(poll_interval=0.02)

    def take(self) -> int:
        """Return the status of the next picture, 0 for none."""
        with self._lock:
            now = time.monotonic()
            if self.rate is not None:
                self._tokens = min(10.0, self._tokens + (now - self._filled) * self.rate) - 1
                self._filled = now
                if self._tokens < 0:
                    self._tokens += 1
                    self.refused += 1
                    return 429
            if self.answers is not None and self.sent >= self.answers:
                threading.Thread(target=self._server.shutdown, daemon=True).start()
                return 0
            self.sent += 1
            return 200

    def takes_image(self, body: dict[str, Any]) -> bool:
        """Tell whether it captions an image, or rejects it: always the same ones."""
        image = hashlib.sha256(json.dumps(body["messages"][0]["content"][0]).encode()).hexdigest()
        with self._lock:
            if len(self.rejected) < self.rejects:
                self.rejected.add(image)
            return image not in self.rejected or not self.rejects


class _Handler(BaseHTTPRequestHandler):
    owner: PictureServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status = self.owner.take()
        if not status:
            self.close_connection = True
        elif status == 429:
            self._answer(status, b"", {"Retry-After": "2"})
        else:
            self._answer(status, picture(int(self.path.strip("/"))))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.owner.takes_image(body):
            self._answer(400, b"this image is not to my taste")
            return
        choice = {"message": {"content": CAPTION}, "finish_reason": "stop"}
        self._answer(200, json.dumps({"choices": [choice]}).encode())

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
