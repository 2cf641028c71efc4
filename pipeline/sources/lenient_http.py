"""Read answers that break the rules of HTTP as browsers do: odd headers, equal lengths twice, gzip that is none."""

import asyncio
import contextlib
import re
import ssl
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import BasicAuth
from multidict import CIMultiDict
from yarl import URL

MAX_HEADERS = 256 << 10
CHUNK = 64 << 10
STATUS = re.compile(rb"(?:HTTP/\d(?:\.\d)?|ICY) +(\d{3})(?: +([^\r\n]*))?")
GZIP = b"\x1f\x8b"


class UnreadableAnswer(Exception):
    """An answer that cannot be read, with a short code of the reason."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Head:
    """The status line and the headers of an answer."""

    status: int
    reason: str
    headers: CIMultiDict[str]


async def ask_leniently(
    url: URL, addresses: Sequence[str], headers: Mapping[str, str], max_bytes: int, verify: bool = True
) -> tuple[Head, bytes]:
    """Ask for a URL on a connection of its own; return the head and the body. The caller bounds the time.

    Args:
        addresses: those of its host, of which the first that takes a connection is asked.
        verify: refuse a certificate that fails.

    Raises:
        UnreadableAnswer: it is no answer, or beyond the limits.
        OSError: there is no connection.
        EOFError: the connection ended before the answer did.
    """
    reader, writer = await _connect(url, addresses, verify)
    try:
        host = url.host_port_subcomponent or ""
        lines = {"Host": host, **headers, "Accept-Encoding": "gzip, deflate", "Connection": "close"}
        if url.user is not None:
            lines["Authorization"] = BasicAuth(url.user, url.password or "").encode()
        request = f"GET {url.raw_path_qs} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        writer.write(f"{request}\r\n".encode("latin-1", "replace"))
        head = await _head(reader)
        while 100 <= head.status < 200:
            head = await _head(reader)
        if head.status not in (200, 203, 206):
            return head, b""
        body = await _body(reader, head, max_bytes)
        return head, unpacked(body, head.headers.get("Content-Encoding", ""), max_bytes)
    finally:
        writer.close()
        with contextlib.suppress(Exception):
            writer.transport.abort()


async def _connect(
    url: URL, addresses: Sequence[str], verify: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    secure: dict[str, Any] = {}
    if url.scheme == "https":
        context = ssl.create_default_context()
        if not verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        secure = {"ssl": context, "server_hostname": (url.raw_host or "").rstrip(".")}
    failed: OSError = OSError("its host has no address")
    for address in addresses:
        try:
            return await asyncio.open_connection(address, url.port, limit=MAX_HEADERS, **secure)
        except OSError as error:
            failed = error
    raise failed


async def _head(reader: asyncio.StreamReader) -> Head:
    lines: list[bytes] = []
    size = 0
    while True:
        try:
            line = await reader.readline()
        except ValueError:
            raise UnreadableAnswer("connection", f"a line of its headers is longer than {MAX_HEADERS} bytes") from None
        size += len(line)
        if not line:
            raise EOFError("the connection ended within the headers")
        if size > MAX_HEADERS:
            raise UnreadableAnswer("connection", f"its headers are longer than {MAX_HEADERS} bytes")
        if line.strip():
            lines.append(line.rstrip(b"\r\n"))
        elif lines:
            break
    status = STATUS.match(lines[0])
    if status is None:
        raise UnreadableAnswer("connection", f"its first line is no status of HTTP: {lines[0][:80]!r}")
    headers: CIMultiDict[str] = CIMultiDict()
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if colon and name.strip() and not line[:1].isspace():  # others are passed over
            headers.add(name.strip().decode("latin-1"), value.strip().decode("utf-8", "surrogateescape"))
    return Head(int(status[1]), (status[2] or b"").decode("latin-1"), headers)


async def _body(reader: asyncio.StreamReader, head: Head, max_bytes: int) -> bytes:
    if "chunked" in head.headers.get("Transfer-Encoding", "").lower():
        return await _chunks(reader, max_bytes)
    said = {part.strip() for value in head.headers.getall("Content-Length", []) for part in value.split(",")}
    lengths = {int(part) for part in said if part.isascii() and part.isdigit() and len(part) < 16}
    if len(lengths) > 1:
        raise UnreadableAnswer("connection", f"it says that it has {' and '.join(map(str, sorted(lengths)))} bytes")
    length = lengths.pop() if lengths else None
    if length is not None and length > max_bytes:
        raise UnreadableAnswer("too_large", f"{length} bytes, at most {max_bytes} are read")
    data = bytearray()
    while length is None or len(data) < length:
        block = await reader.read(CHUNK if length is None else min(CHUNK, length - len(data)))
        if not block:
            break
        data += block
        if len(data) > max_bytes:
            raise UnreadableAnswer("too_large", f"more than {max_bytes} bytes")
    if said and length is None and not data:
        raise UnreadableAnswer("connection", f"its length is {', '.join(sorted(said))[:80]!r}, and nothing follows")
    if length is not None and len(data) < length:
        encoded = head.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip", "deflate")
        if not (encoded and bytes(data[:2]) == GZIP):  # the length of what it was before it was packed
            raise UnreadableAnswer("truncated", f"the transfer broke off after {len(data)} of {length} bytes")
    return bytes(data)


async def _chunks(reader: asyncio.StreamReader, max_bytes: int) -> bytes:
    data = bytearray()
    while True:
        line = (await _line(reader)).split(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", line):
            raise UnreadableAnswer("truncated", f"expected the length of a chunk, found {line[:40]!r}")
        size = int(line, 16)
        if size == 0:
            return bytes(data)
        if len(data) + size > max_bytes:
            raise UnreadableAnswer("too_large", f"more than {max_bytes} bytes")
        try:
            data += await reader.readexactly(size)
        except asyncio.IncompleteReadError:
            raise UnreadableAnswer("truncated", "the transfer broke off within a chunk") from None
        await _line(reader)


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readline()
    except ValueError:
        raise UnreadableAnswer("truncated", "expected the length of a chunk, found a longer line") from None
    if not line:
        raise UnreadableAnswer("truncated", "the transfer broke off between chunks")
    return line


def unpacked(data: bytes, encodings: str, max_bytes: int) -> bytes:
    """Unpack a body in gzip or deflate; what is said to be packed and is not comes as it is.

    Raises:
        UnreadableAnswer: it is damaged, or too large.
    """
    encodings = encodings.lower()
    if data.startswith(GZIP) and "gzip" in encodings:
        kind = zlib.MAX_WBITS | 16
    elif encodings == "deflate" and not data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF")):
        kind = zlib.MAX_WBITS if data[:1] == b"\x78" else -zlib.MAX_WBITS
    else:
        return data
    unpack = zlib.decompressobj(kind)
    try:
        plain = unpack.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise UnreadableAnswer("truncated", f"its {encodings} cannot be unpacked: {error}") from None
    if len(plain) > max_bytes:
        raise UnreadableAnswer("too_large", f"more than {max_bytes} bytes")
    if not unpack.eof:
        raise UnreadableAnswer("truncated", f"its {encodings} breaks off")
    return plain
