"""Fetch many URLs from a hostile server: memory and open files stay bounded, and every URL has bytes or a reason.

    python benchmarks/fetch_soak.py [--urls 200000] [--hosts 1000] [--json]

The server is a process of this machine, and has a thousand addresses. It drips, sends bodies and redirects without an
end, headers of a megabyte, wrong lengths, packed zeros, what is no HTTP; it resets, stays silent, has a
certificate that nobody trusts, and does not answer TLS.
`unexpected` counts URLs whose outcome is none of those of their kind, `files_left` the files and sockets that are open
afterwards and were not before; both must be 0. `memory_mb` is the resident memory after a tenth of the URLs, and
`memory_peak_mb` the most at any time.
"""

import asyncio
import gzip
import multiprocessing
import os
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fetch_servers import free_port
from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.url_fetcher import fetch_all

UNIT = 16384
BODY = b"a picture" * 200
OPTIONS = FetchOptions(
    concurrency=256,
    timeout=3.0,
    idle_timeout=1.0,
    max_bytes=1 << 20,
    robots_txt=False,
    allow_networks=["127.0.0.0/8"],
)
OUTCOMES: dict[str, set[str | None]] = {
    "ok": {None},
    "longer": {None},
    "drip": {"timeout"},
    "endless": {"too_large"},
    "loop": {"redirects"},
    "away": {"redirects"},
    "inside": {"private_address"},
    "file": {"bad_url"},
    "header": {"connection"},
    "shorter": {"truncated"},
    "zeros": {"too_large"},
    "reset": {"connection"},
    "garbage": {"connection"},
    "chunks": {"truncated"},
    "http_404": {"http_404"},
    "http_500": {"http_500"},
    "silent": {"timeout"},
    "self_signed": {"certificate"},
    "no_tls": {"timeout"},
}
COMMON = 10  # of so many URLs one is of each of the kinds but `ok`, in turn


def _answer(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _answers() -> dict[str, bytes]:
    packed = gzip.compress(bytes(8 << 20))
    return {
        "ok": _answer(BODY),
        "longer": _answer(BODY + b"more", length=len(BODY)),
        "inside": _answer(b"", "Location: http://169.254.169.254/latest", status="302 Found"),
        "file": _answer(b"", "Location: file:///etc/passwd", status="302 Found"),
        "header": _answer(BODY, "X: " + "a" * (1 << 20)),
        "shorter": _answer(BODY[:90], length=len(BODY)),
        "zeros": _answer(packed, "Content-Encoding: gzip"),
        "garbage": b"\x00\xff" * 500,
        "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY,
        "http_404": _answer(b"", status="404 Not Found"),
        "http_500": _answer(b"", status="500 Trouble"),
    }


class Hostile:
    """The server."""

    def __init__(self) -> None:
        self._answers = _answers()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
                kind, number = path.split("/")[1:3]
                if kind == "reset":
                    writer.transport.abort()
                    return
                if kind == "silent":
                    await asyncio.sleep(60)
                elif kind in ("drip", "endless"):
                    await self._pour(writer, kind)
                elif kind in ("loop", "away"):
                    to = path if kind == "loop" else f"/away/{number}0"
                    writer.write(_answer(b"", f"Location: {to}", status="302 Found"))
                else:
                    writer.write(self._answers[kind])
                await writer.drain()
                if kind in ("shorter", "longer", "garbage", "chunks"):
                    return
        except (OSError, EOFError, ssl.SSLError):
            return
        finally:
            writer.close()

    async def _pour(self, writer: asyncio.StreamWriter, kind: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1\r\n.\r\n" if kind == "drip" else b"10000\r\n" + bytes(65536) + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.3 if kind == "drip" else 0)


def run_server(port: int, tls_port: int, folder: str) -> None:
    async def run() -> None:
        server = Hostile()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
        await asyncio.start_server(server.serve, "0.0.0.0", port, backlog=4096)
        await asyncio.start_server(server.serve, "0.0.0.0", tls_port, backlog=4096, ssl=context)
        await asyncio.Event().wait()

    _raise_limit()
    asyncio.run(run())


def _raise_limit() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listed(urls: int, hosts: int, port: int, tls_port: int) -> Iterator[tuple[str, str]]:
    """List (kind, URL): silent URLs are on hosts of their own."""
    others = [kind for kind in OUTCOMES if kind != "ok"]
    for number in range(urls):
        kind = others[number // COMMON % len(others)] if number % COMMON == 7 else "ok"
        host = number % hosts
        address = f"127.{2 if kind == 'silent' else 1}.{host // 250}.{host % 250 + 1}"
        scheme = "https" if kind in ("self_signed", "no_tls") else "http"
        yield kind, f"{scheme}://{address}:{tls_port if kind == 'self_signed' else port}/{kind}/{number}"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def memory() -> float:
    """Resident memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(urls: int, hosts: int, port: int, tls_port: int) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    unexpected: Counter[str] = Counter()
    before, early, most_files, peak = open_files(), 0.0, 0, 0.0
    began, number = time.monotonic(), 0
    pairs = list(listed(urls, hosts, port, tls_port))
    for first in range(0, urls, UNIT):
        for (kind, _), found in fetch_all(((pair, pair[1]) for pair in pairs[first : first + UNIT]), OPTIONS):
            assert found is not None
            reasons[found.reason or "ok"] += 1
            right = found.reason in OUTCOMES[kind] and (found.data == BODY) is (found.reason is None)
            if not right or bool(found.reason) is not bool(found.detail):
                unexpected[f"{kind}: {found.reason}"] += 1
            number += 1
            if number % 500 == 0:
                most_files, peak = max(most_files, open_files()), max(peak, memory())
            if number == urls // 10:
                early = memory()
    return {
        "urls": number,
        "hosts": hosts,
        "seconds": round(time.monotonic() - began, 1),
        "memory_mb": round(early),
        "memory_end_mb": round(memory()),
        "memory_peak_mb": round(peak),
        "files_most": most_files,
        "files_left": open_files() - before,
        "unexpected": sum(unexpected.values()),
        "unexpected_kinds": dict(unexpected),
        "reasons": dict(reasons.most_common()),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--urls", type=int, default=200_000)
    parser.add_argument("--hosts", type=int, default=1000)
    options = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("only Linux has as many addresses of its own")
    _raise_limit()
    with tempfile.TemporaryDirectory() as folder:
        subject = ("-subj", "/CN=nobody", "-keyout", "key.pem", "-out", "cert.pem")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        port, tls_port = free_port(), free_port()
        server = multiprocessing.get_context("spawn").Process(target=run_server, args=(port, tls_port, folder))
        server.start()
        time.sleep(2)
        try:
            figures = soak(options.urls, options.hosts, port, tls_port)
        finally:
            server.terminate()
            server.join()
    print_figures(figures, options.json)


if __name__ == "__main__":
    main()
