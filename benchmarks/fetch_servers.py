"""Servers of this machine for `benchmarks/fetch.py`: nginx with pictures, and one whose faults pass."""

import os
import random
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from benchmarks.photographs import photograph

PICTURES = 64
FAULTS = ("reset", "stall", "429", "503", "cut")
STALL = 30.0

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; {modules}
events {{ worker_connections 8192; }}
http {{
  access_log off; sendfile on; default_type image/jpeg; root {folder}/www;
  client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t;
  uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
  ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem; ssl_session_cache shared:all:8m;
  keepalive_requests 1000000;
  server {{ listen 127.0.0.1:{http} backlog=4096; }}
  server {{ listen 127.0.0.1:{https} ssl backlog=4096; }}
  server {{ listen 127.0.0.1:{http_close} backlog=4096; keepalive_timeout 0; }}
  server {{ listen 127.0.0.1:{https_close} ssl backlog=4096; keepalive_timeout 0; }}
}}
"""


def write_pictures(folder: Path, urls: int) -> None:
    """Write `/0.jpg` and so on: names of a few pictures."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(urls):
        if number < PICTURES:
            (folder / f"{number}.jpg").write_bytes(photograph(rng))
        else:
            os.link(folder / f"{number % PICTURES}.jpg", folder / f"{number}.jpg")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def nginx(folder: Path, urls: int) -> Iterator[dict[str, str]]:
    """Run nginx; yield the beginnings of its URLs by how they are asked: `http`, `https`, and with `_close`."""
    if (program := shutil.which("nginx")) is None:
        sys.exit("nginx is not installed here; `apt-get install nginx-light` installs it")
    write_pictures(folder / "www", urls)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    ports = {name: free_port() for name in ("http", "https", "http_close", "https_close")}
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, modules=user, **ports))
    process = subprocess.Popen([program, "-c", str(folder / "nginx.conf"), "-p", str(folder)])
    try:
        _wait_for(ports["https_close"])
        yield {name: f"{name.removesuffix('_close')}://127.0.0.1:{port}" for name, port in ports.items()}
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    until = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


@contextmanager
def silent_servers(number: int) -> Iterator[list[str]]:
    """Listen on so many ports, and never answer; yield the beginnings of the URLs."""
    sockets = [socket.create_server(("127.0.0.1", 0), backlog=2000) for _ in range(number)]
    try:
        yield [f"http://127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    finally:
        for one in sockets:
            one.close()


class _Faulty(BaseHTTPRequestHandler):
    """`/FAULT/NUMBER.jpg` has that fault when it is asked for the first time, and is a picture from then on."""

    protocol_version = "HTTP/1.1"
    picture = b""
    seen: set[str] = set()  # noqa: RUF012

    def do_GET(self) -> None:
        fault = self.path.split("/")[1]
        first = self.path not in self.seen
        self.seen.add(self.path)
        if first and fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
        elif first and fault == "stall":
            time.sleep(STALL)
            self.close_connection = True
        elif first and fault in ("429", "503"):
            self._send(int(fault), b"")
        elif self.path == "/robots.txt":
            self._send(404, b"")
        else:
            self._send(200, self.picture, cut=first and fault == "cut")

    def _send(self, status: int, body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, *_: object) -> None:
        pass


class _Server(socketserver.ThreadingTCPServer):
    request_queue_size, daemon_threads, allow_reuse_address = 1024, True, True

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def faulty_server(picture: bytes) -> Iterator[str]:
    """Run the server of passing faults."""
    handler = type("_FaultyPictures", (_Faulty,), {"picture": picture, "seen": set()})
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
