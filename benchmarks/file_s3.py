"""Serve a folder as S3 on loopback, for reading: whole objects, ranges, heads, listings.

It sends by sendfile, so that it is no bottleneck; `python benchmarks/file_s3.py FOLDER` prints its port.
"""

import os
import re
import sys
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ROOT = Path()
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as storages do: else each answer's end waits 40 ms for an acknowledgement

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(unquote(urlsplit(self.path).path).strip("/"), query.get("prefix", [""])[0])
        else:
            self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = ROOT / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        size = path.stat().st_size
        first, last, asked = 0, size - 1, RANGE.fullmatch(self.headers.get("range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file:
            while body and first <= last:
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, last - first + 1)

    def _list(self, bucket: str, prefix: str) -> None:
        items = []
        for path in sorted((ROOT / bucket).rglob("*")):
            key = str(path.relative_to(ROOT / bucket))
            if path.is_file() and key.startswith(prefix):
                items.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size><ETag>0</ETag>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"
        self._send(200, text.encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    ROOT = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
