"""The miniatures on loopback: a hub, and plain addresses with ranges."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.hub import Hub
from tests.miniatures import Miniature


class Files:
    """Files by the paths of their addresses. `url` is what their hosts become, `requests` the paths and answers."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, int] = {}
        self.requests: list[tuple[str, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def here(self, url: str) -> str:
        """The address here of a file that is elsewhere."""
        return f"{self.url}{urlsplit(url).path}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Files

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        data = self.served.files.get(path)
        status = self.served.answers.get(path, 200 if data is not None else 404)
        body, headers = data or b"", {"Accept-Ranges": "bytes", "Last-Modified": "Sat, 01 Jul 2023 12:00:00 GMT"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and asked:
            start, stop = int(asked[1]), min(len(body), int(asked[2] or len(body)) + 1)
            if start >= stop:
                status, headers, body = 416, {"Content-Range": f"bytes */{len(body)}"}, b""
            else:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
                status, body = 206, body[start:stop]
        elif status not in (200, 206):
            body = b"URL signature expired" if status == 403 else b""
        self.served.requests.append((path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def publish(miniatures: Mapping[str, Miniature] | list[Miniature], hub: Hub, files: Files) -> None:
    """Put everything that miniatures are made of on the servers."""
    for miniature in miniatures.values() if isinstance(miniatures, Mapping) else miniatures:
        for repo, repository in miniature.repositories.items():
            for branch, found in repository.branches.items():
                hub.add(repo, found, kind="datasets", branch=branch, gated=repository.gated)
            hub.add(repo, repository.files, kind="datasets", gated=repository.gated, commit=repository.revision)
        files.files |= miniature.urls


@contextmanager
def serving() -> Iterator[Files]:
    files = Files()
    try:
        yield files
    finally:
        files.close()
