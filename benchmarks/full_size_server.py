"""A proxy before an S3 server that answers each request late, and counts requests and the bytes of their answers."""

import http.client
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


class LateS3:
    """Pass requests on to `upstream` after so many seconds. A context manager; `url` is its address."""

    def __init__(self, upstream: str, seconds: float):
        self.upstream, self.seconds = urlsplit(upstream).netloc, seconds
        self.requests: Counter[str] = Counter()
        """By method; listings are counted as `LIST`."""
        self.read = 0
        """Bytes of the answers."""
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Forward)
        self._server.late = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LateS3":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        with self.lock:
            self.requests.clear()
            self.read = 0


class _Server(ThreadingHTTPServer):
    late: LateS3
    daemon_threads = True
    request_queue_size = 128


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _pass_on(self) -> None:
        late, method = self.server.late, self.command
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        time.sleep(late.seconds)
        connection = http.client.HTTPConnection(late.upstream, timeout=600)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        connection.request(method, self.path, body or None, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        with late.lock:
            late.requests["LIST" if method == "GET" and "list-type=" in self.path else method] += 1
            late.read += len(data)
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("content-length") or str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def log_message(self, format: str, *args: object) -> None:
        pass
