"""Read the members of tars, compressed or not, with the bounds and reasons of `archives`."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from microdit.pipeline.base.liveness import alive

BLOCK = 512
CHUNK = 1 << 20
MAX_HEADERS = 1 << 20  # bytes of long names and pax records before one member
MAX_PADDING = 64 << 20  # bytes of zeros behind the end of a tar
MAX_RATIO = 200  # decompressed bytes for a compressed one; texts have 10 at most
FREE_BYTES = 256 << 20  # decompressed before the ratio counts
XZ_MEMORY = 256 << 20
MAX_EMPTY = 1000  # empty compressed streams, one after the other in a file
GZIP, BZIP2, XZ, ZSTD = COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class Member:
    """A member of an archive: its bytes, or a reason (a short code) and one line of detail why there are none."""

    name: str
    """As in the archive; bytes that are not UTF-8 are lone surrogates."""
    data: bytes | None
    reason: str | None = None
    detail: str = ""


class ArchiveError(Exception):
    """An archive, or a member of it, is damaged from here on; the message says how."""


def tar_members(path: Path, wanted: Callable[[str], bool], max_bytes: int) -> Iterator[Member]:
    """Read the wanted members of a tar, plain or compressed with gzip, bzip2, xz or zstd; arguments as `members`.

    A tar without an end marker counts as truncated: it may have been cut between two members.
    """
    with path.open("rb") as file:
        tar = _Tar(PackedStream(file), wanted, max_bytes)
        try:
            yield from tar.members()
        except ArchiveError as error:
            behind = f", behind {tar.last!r}" if tar.last else ""
            detail = f"{error} (byte {tar.stream.position} of the unpacked tar{behind}, {tar.count} members read)"
            yield Member("", None, "damaged_archive", detail)


def tar_chunks(path: Path, wanted: Callable[[str], bool]) -> Iterator[bytes]:
    """Read the first wanted member of a tar in chunks: for members that are too long for memory.

    Raises:
        ValueError: the tar is damaged, there or before it; or it has no such member.
    """
    with path.open("rb") as file:
        tar = _Tar(PackedStream(file), wanted, 0)
        try:
            while (header := tar._next()) is not None:
                if header.kind in b"0\x007" and wanted(header.name):
                    left = header.size
                    while left:
                        alive()
                        yield tar.stream.exactly(size := min(left, CHUNK))
                        left -= size
                    return
                tar._pass(header)
        except ArchiveError as error:
            raise ValueError(str(error)) from error
    raise ValueError("no such member is in it")


@dataclass(frozen=True)
class _Header:
    """The header block before a member's data."""

    name: str
    size: int
    kind: bytes
    block: bytes


class _Tar:
    """One pass through a tar. `last` is the name of the latest member, `count` the number of members so far."""

    def __init__(self, stream: "PackedStream", wanted: Callable[[str], bool], max_bytes: int):
        self.stream, self._wanted, self._max_bytes = stream, wanted, max_bytes
        self.last, self.count = "", 0

    def members(self) -> Iterator[Member]:
        while (header := self._next()) is not None:
            alive()
            self.last, self.count = header.name, self.count + 1
            directory = header.kind == b"5" or (header.kind in b"0\0" and header.name.endswith("/"))
            if directory or not self._wanted(header.name):
                self._pass(header)
            elif header.kind not in (b"0", b"\0", b"7"):
                self._pass(header)
                yield Member(header.name, None, "not_a_file", _what(header.kind))
            elif header.size > self._max_bytes:
                self._pass(header)
                detail = f"{header.size} bytes, at most {self._max_bytes} are read"
                yield Member(header.name, None, "too_large", detail)
            else:
                yield Member(header.name, self.stream.exactly(header.size))
                self.stream.skip(-header.size % BLOCK)

    def _pass(self, header: _Header) -> None:
        if header.kind in b"123456":  # these have no data, whatever their size says
            return
        block = header.block
        more = header.kind == b"S" and block[482:483] not in (b"\0", b"")
        while more:  # the map of a sparse file
            alive()
            more = self.stream.exactly(BLOCK)[504:505] not in (b"\0", b"")
        self.stream.skip(-(-header.size // BLOCK) * BLOCK)

    def _next(self) -> _Header | None:
        """Read the next member's header and apply the name and pax records before it; None at the end."""
        name: str | None = None
        size: int | None = None
        extra, sparse, begun = 0, False, False
        while True:
            block = self._block(begun)
            if block is None:
                return None
            header = _parse(block)
            if header.kind not in b"LKxgX":
                break
            begun = True
            extra += BLOCK + header.size
            if extra > MAX_HEADERS:
                raise ArchiveError(f"more than {MAX_HEADERS} bytes of names and records before one member")
            data = self.stream.exactly(header.size)
            self.stream.skip(-header.size % BLOCK)
            if header.kind == b"L":
                name = _text(data.partition(b"\0")[0])
            elif header.kind in b"xX":
                records = _pax(data)
                name = _text(records[b"path"]) if b"path" in records else name
                sparse |= any(key.startswith(b"GNU.sparse.") for key in records)
                if b"size" in records:
                    size = _decimal(records[b"size"])
        kind = b"S" if sparse and header.kind in b"0\0" else header.kind
        block = bytes(BLOCK) if kind != header.kind else block  # the map of this kind of sparse file is in its data
        return _Header(header.name if name is None else name, header.size if size is None else size, kind, block)

    def _block(self, begun: bool) -> bytes | None:
        """Read the next block that is not all zeros; None at the end. Behind an end marker another tar may follow."""
        zeros = 0
        while True:
            block = self.stream.read(BLOCK)
            if len(block) == BLOCK and not block.strip(b"\0"):
                zeros += BLOCK
                alive()
                if zeros > MAX_PADDING:
                    raise ArchiveError(f"more than {MAX_PADDING} bytes of zeros")
            elif block.strip(b"\0"):
                if len(block) < BLOCK:
                    raise ArchiveError(f"it ends within a header, after {len(block)} bytes of it")
                return block
            elif zeros and not begun:
                return None
            else:
                raise ArchiveError("it ends without the mark of its end" if self.stream.position else "it is empty")


def is_tar(start: bytes) -> bool:
    """Tell from its first 512 bytes or more if a file is a tar, or compressed as one may be."""
    try:
        return start.startswith(COMPRESSED) or bool(_parse(start))
    except ArchiveError:
        return False


def _parse(block: bytes) -> _Header:
    """Parse a header block.

    Raises:
        ArchiveError: its checksum is wrong.
    """
    counted = block[:148] + b" " * 8 + block[156:]
    text = block[148:156].partition(b"\0")[0].strip()
    stated = int(text, 8) if text and not text.strip(b"01234567") else -1
    # old tars added the bytes as signed ones
    if len(block) < BLOCK or (stated != sum(counted) and stated != sum(byte - 256 * (byte > 127) for byte in counted)):
        raise ArchiveError(f"no member begins here, but {block[:24]!r}")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _Header(_text(name), _number(block[124:136]), block[156:157], block)


def _number(field: bytes) -> int:
    """Parse a number of a header: octal digits, or binary if the first bit is set."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ArchiveError(f"a negative or absurd size: {field!r}")
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    if text.strip(b"01234567"):
        raise ArchiveError(f"a size that is no number: {field!r}")
    return int(text or b"0", 8)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise ArchiveError(f"a size that is no number: {text[:24]!r}")
    return int(text)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Parse pax records, `<length> <key>=<value>\\n` each."""
    records: dict[bytes, bytes] = {}
    offset = 0
    while offset < len(data) and data[offset]:
        digits, space, _ = data[offset : offset + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = data[offset : offset + length]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if not equals or not value.endswith(b"\n") or len(record) < length:
            raise ArchiveError(f"a pax record that cannot be read: {data[offset : offset + 24]!r}")
        records[key] = value[:-1]
        offset += length
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _what(kind: bytes) -> str:
    kinds = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
    return kinds.get(kind, f"a sparse file or something else of type {kind!r}") + "; expected a regular file"


class PackedStream:
    """Read a file from front to back, decompress it if need be, and refuse decompression bombs."""

    def __init__(self, file: BinaryIO):
        self._file, self.position = file, 0
        start = file.read(6)
        file.seek(0)
        self._size = file.seek(0, 2)
        file.seek(0)
        self._chunks: Iterator[bytes] | None = None
        if start.startswith(GZIP):
            self._chunks = _decompressed(file, _Gunzip)
        elif start.startswith(BZIP2):
            self._chunks = _decompressed(file, bz2.BZ2Decompressor)
        elif start.startswith(XZ):
            self._chunks = _decompressed(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY))
        elif start.startswith(ZSTD):
            file.seek(0, 2)  # another reader reads it and does not tell its position: the ratio counts the whole file
            zstd = pa.CompressedInputStream(pa.OSFile(file.name), "zstd")
            self._chunks = iter(lambda: zstd.read(CHUNK), b"")
        self._held, self._at = b"", 0

    def read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end.

        Raises:
            ArchiveError: the compressed data is damaged, or a bomb.
        """
        if self._chunks is None:
            data = self._file.read(size)
            self.position += len(data)
            return data
        parts = []
        while size:
            if self._at == len(self._held) and not self._more():
                break
            part = self._held[self._at : self._at + size]
            self._at += len(part)
            self.position += len(part)
            size -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def some(self, size: int) -> bytes:
        """Read up to `size` bytes, those before any damage too; none at the end. Raises as `read`."""
        if self._chunks is None or (self._at == len(self._held) and not self._more()):
            return self.read(size)
        return self.read(min(size, len(self._held) - self._at))

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) < size:
            raise ArchiveError(f"it ends {size - len(data)} bytes before a member does")
        return data

    def skip(self, size: int) -> None:
        if self._chunks is not None:
            while size:
                alive()
                size -= len(self.exactly(min(size, CHUNK)))
            return
        if size > self._size - self.position:
            raise ArchiveError(f"it ends {size - self._size + self.position} bytes before a member does")
        self._file.seek(size, 1)
        self.position += size

    def _more(self) -> bool:
        assert self._chunks is not None
        try:
            self._held, self._at = next(self._chunks, b""), 0
        except (zlib.error, lzma.LZMAError, EOFError, ValueError, pa.ArrowException) as error:
            raise ArchiveError(f"what is packed is damaged: {error}") from None
        except OSError as error:
            if error.errno is not None:  # the disk's fault, not the file's
                raise
            raise ArchiveError(f"what is packed is damaged: {error}") from None
        made = self.position + len(self._held)
        if made > FREE_BYTES + MAX_RATIO * self._file.tell():
            raise ArchiveError(f"a bomb: {made} bytes came of {self._file.tell()}")
        return bool(self._held)


class _Gunzip:
    """Give zlib's decompressor the interface of those of bz2 and lzma."""

    def __init__(self) -> None:
        self._inner, self.needs_input = zlib.decompressobj(31), True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        made = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = len(made) < max_length and not self._inner.unconsumed_tail
        return made


def _decompressed(
    file: BinaryIO, decompressor: Callable[[], "_Gunzip | bz2.BZ2Decompressor | lzma.LZMADecompressor"]
) -> Iterator[bytes]:
    """Decompress one or several concatenated streams, in chunks.

    Raises:
        EOFError: the last stream is truncated.
        ValueError: more than `MAX_EMPTY` empty streams in a row.
    """
    packed = file.read(CHUNK // 4)
    empty = 0
    while packed:
        alive()
        inner, empty = decompressor(), empty + 1
        if empty > MAX_EMPTY:
            raise ValueError(f"{MAX_EMPTY} times nothing")
        while not inner.eof:
            if inner.needs_input and not packed and not (packed := file.read(CHUNK // 4)):
                raise EOFError("it ends too early")
            made = inner.decompress(packed, CHUNK)
            packed = b""
            if made:
                empty = 0
                yield made
        packed = (inner.unused_data or file.read(CHUNK // 4)).lstrip(b"\0")
