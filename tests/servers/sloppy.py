"""A web server that answers as servers of the web do: odd headers, wrong lengths, gzip that is none, few requests."""

import asyncio
import gzip
import re
import threading
import time
from typing import Self
from urllib.parse import unquote

GIF = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\x00\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


def picture(path: str) -> bytes:
    """A picture that has its path behind it, so that a test sees that it is its URL's."""
    return GIF + path.encode() * 20


class SloppyServer:
    """The server, on a free port of this machine.

    `asked` has the paths in the order of the requests, `logins` their Authorization.
    """

    def __init__(self, rate: float = 60.0, port: int = 0, robots: bytes = b""):
        self._robots = robots
        self._port = port
        self.asked: list[str] = []
        self.logins: list[str | None] = []
        self._rate, self._tokens, self._filled = rate, 20.0, time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        started = asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._server = asyncio.run_coroutine_threadsafe(started, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                path = request.split("\r\n")[0].removeprefix("GET ").removesuffix(" HTTP/1.1")
                self.asked.append(path)
                login = re.search(r"(?im)^authorization: (.*?)\r", request)
                self.logins.append(login and login[1])
                if path.startswith("/hang"):
                    await asyncio.sleep(60)
                if path.startswith("/slow"):
                    await asyncio.sleep(0.8)
                if path.startswith("/drip"):
                    await self._drip(writer)
                writer.write(self._answer(path))
                await writer.drain()
                if path.startswith("/close"):
                    return
        except (OSError, EOFError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    async def _drip(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.2)

    def _answer(self, path: str) -> bytes:
        body = picture(path)
        packed = gzip.compress(body)
        length = b"Content-Length: %d" % len(body)
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        match path.removeprefix("/close").strip("/").split("/"):
            case ["robots.txt"]:
                return _answer(self._robots, b"Content-Length: %d" % len(self._robots), status=b"200 OK")
            case ["said", name, value]:
                return _answer(body, length, f"{unquote(name)}: {unquote(value)}".encode())
            case ["limited", *_]:
                return self._limited(body)
            case ["to", *rest]:
                return _answer(b"", b"Location: /" + "/".join(rest).encode(), status=b"302 Found")
            case ["away", *_]:
                return _answer(b"", b"Location: " + path.partition("/away/")[2].encode(), status=b"302 Found")
            case ["once", code, *_]:
                return _answer(body, length) if self.asked.count(path) > 1 else _answer(b"", status=code.encode())
            case ["status", code]:
                return _answer(b"", status=code.encode())
            case ["203"]:
                return _answer(body, length, status=b"203 Non-Authoritative")
            case ["206", "whole"]:
                return _answer(
                    body, length, b"Content-Range: bytes 0-%d/%d" % (len(body) - 1, len(body)), status=b"206 Part"
                )
            case ["206", "part"]:
                return _answer(body, length, b"Content-Range: bytes 0-%d/9999" % (len(body) - 1), status=b"206 Part")
            case ["large_header"]:
                return _answer(body, length, b"X: " + b"a" * 60_000)
            case ["many_headers"]:
                return _answer(body, length, *(b"X%d: v" % i for i in range(300)))
            case ["same_lengths"]:
                return _answer(body, length, length)
            case ["other_lengths"]:
                return _answer(body, length, b"Content-Length: 5")
            case ["length_and_chunks"]:
                return _answer(chunks, length, b"Transfer-Encoding: chunked")
            case ["no_gzip"]:
                return _answer(body, length, b"Content-Encoding: gzip")
            case ["x_gzip"]:
                return _answer(packed, b"Content-Length: %d" % len(packed), b"Content-Encoding: x-gzip")
            case ["bytes_behind_gzip"]:
                return _answer(packed + bytes(9), b"Content-Length: %d" % (len(packed) + 9), b"Content-Encoding: gzip")
            case ["no_brotli"]:
                return _answer(body, length, b"Content-Encoding: br")
            case ["no_colon"]:
                return _answer(body, length, b"this is no header")
            case ["space_in_name"]:
                return _answer(body, length, b"X Odd : v")
            case ["nul"]:
                return _answer(body, length, b"X: a\0b")
            case ["behind"]:
                return _answer(body + b"<!-- served in 3 ms -->", length)
            case ["icy"]:
                return _answer(body, length).replace(b"HTTP/1.1", b"ICY")
            case ["cut"]:
                return _answer(body[:50], length)
        return _answer(body, length)

    def _limited(self, body: bytes) -> bytes:
        now = time.monotonic()
        self._tokens = min(20.0, self._tokens + (now - self._filled) * self._rate) - 1
        self._filled = now
        if self._tokens < 0:
            self._tokens += 1
            return _answer(b"", b"Retry-After: 1", status=b"429 Too Many Requests")
        return _answer(body, b"Content-Length: %d" % len(body))


def _answer(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    if not body:
        headers = (*headers, b"Content-Length: 0")
    return b"".join(line + b"\r\n" for line in (b"HTTP/1.1 " + status, *headers)) + b"\r\n" + body
