"""Read the members of zips by their central directory, with the bounds and reasons of `archives`."""

import stat
import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from microdit.pipeline.base.liveness import alive
from microdit.pipeline.files.tars import FREE_BYTES, MAX_RATIO, ArchiveError, Member

END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s4B4HL2L5H2L")
LOCAL = struct.Struct("<4s2B4HL2L2H")
MAX_DIRECTORY = 256 << 20  # bytes; some two million members
FREE_MEMBER = 16 << 20  # decompressed bytes of one member before the ratio counts
STORED, DEFLATED = 0, 8
ENCRYPTED, DESCRIPTOR, UTF8 = 0x1, 0x8, 0x800


@dataclass(frozen=True)
class _Entry:
    """The directory's entry of a member."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    mode: int
    """Unix mode, 0 if there is none."""
    offset: int
    """Byte of the member's local header in the file."""


def zip_members(path: Path, wanted: Callable[[str], bool], max_bytes: int) -> Iterator[Member]:
    """Read the wanted members of a zip, in the order of its directory; arguments as `archives.members`.

    If the directory is missing or damaged (a truncated file), read the members that follow each other from the file's
    beginning as far as that goes, then give a `damaged_archive`.
    """
    with path.open("rb") as file:
        zipped = _Zip(file, wanted, max_bytes)
        try:
            start, directory = zipped.directory()
        except ArchiveError as error:
            yield from zipped.without_directory(str(error))
            return
        yield from zipped.members(start, directory)


def is_zip(file: BinaryIO) -> bool:
    """Tell from its beginning and its end if a file is a zip."""
    file.seek(0)
    begins = file.read(4) in (b"PK\3\4", b"PK\5\6")
    file.seek(max(0, file.seek(0, 2) - END.size - 0xFFFF))
    return begins or b"PK\5\6" in file.read()


class _Zip:
    """One pass through a zip."""

    def __init__(self, file: BinaryIO, wanted: Callable[[str], bool], max_bytes: int):
        self._file, self._wanted, self._max_bytes = file, wanted, max_bytes
        self._size = file.seek(0, 2)
        self._made = 0

    def members(self, start: int, directory: bytes) -> Iterator[Member]:
        """Read the members of the directory, which begins at byte `start`."""
        offsets = array("Q", sorted(array("Q", (entry.offset for entry in _entries(directory)))))
        for entry in _entries(directory):
            alive()
            if entry.name.endswith("/") or not self._wanted(entry.name):
                continue
            following = bisect_right(offsets, entry.offset)
            end = min(offsets[following] if following < len(offsets) else start, start)
            double = following > 1 and offsets[following - 2] == entry.offset
            yield self._member(entry, 0 if double else end)
            if self._made > FREE_BYTES + MAX_RATIO * self._size:
                yield Member("", None, "damaged_archive", f"a bomb: {self._made} bytes came of {self._size}")
                return

    def _member(self, entry: _Entry, end: int) -> Member:
        """Read one member, whose bytes must end before `end`."""
        if (refused := self._refused(entry)) is not None:
            return refused
        try:
            at = self._data_at(entry.offset)
            if at + entry.packed > end:
                raise ArchiveError("it overlaps another member, or the directory")
            return Member(entry.name, self._unpack(at, entry))
        except (ArchiveError, zlib.error) as error:
            return Member(entry.name, None, "damaged_member", str(error))

    def _refused(self, entry: _Entry) -> Member | None:
        """Refuse a member by its directory entry; None if its bytes may be read."""
        kind = stat.S_IFMT(entry.mode)
        if kind not in (0, stat.S_IFREG):
            return Member(entry.name, None, "not_a_file", "a link or a device; expected a regular file")
        if entry.flags & ENCRYPTED:
            return Member(entry.name, None, "encrypted", "it needs a password")
        if entry.method not in (STORED, DEFLATED):
            return Member(entry.name, None, "unsupported", f"packed by method {entry.method}; expected 0 or 8")
        longer = entry.size // 1000 + 1024  # deflate adds as much to incompressible data
        if (most := max(entry.size, entry.packed - longer)) > self._max_bytes:
            return Member(entry.name, None, "too_large", f"{most} bytes, at most {self._max_bytes} are read")
        if entry.size > FREE_MEMBER + MAX_RATIO * entry.packed:
            return Member(entry.name, None, "bomb", f"{entry.size} bytes packed in {entry.packed}")
        return None

    def _data_at(self, offset: int) -> int:
        """Return the offset of a member's bytes, given that of its local header."""
        self._file.seek(min(offset, self._size))
        header = self._file.read(LOCAL.size)
        if len(header) < LOCAL.size or not header.startswith(b"PK\3\4"):
            raise ArchiveError(f"no member begins at byte {offset}")
        *_, name, extra = LOCAL.unpack(header)
        return int(offset + LOCAL.size + name + extra)

    def _unpack(self, at: int, entry: _Entry) -> bytes:
        self._file.seek(at)
        data = self._file.read(entry.packed)
        if len(data) < entry.packed:
            raise ArchiveError(f"the file ends {entry.packed - len(data)} bytes before it does")
        if entry.method == DEFLATED:
            data = zlib.decompressobj(-15).decompress(data, entry.size + 1)
        self._made += len(data)
        if len(data) != entry.size:
            raise ArchiveError(
                f"it has {'more' if len(data) > entry.size else 'fewer'} than the {entry.size} bytes it says"
            )
        if zlib.crc32(data) != entry.crc:
            raise ArchiveError("its bytes are not those that its checksum is of")
        return data

    # -- where the directory is ----------------------------------------------------------------------------------------

    def directory(self) -> tuple[int, bytes]:
        """Return the directory's offset and its bytes.

        Raises:
            ArchiveError: the directory is missing or damaged.
        """
        tail_at = max(0, self._size - END.size - 0xFFFF)
        self._file.seek(tail_at)
        tail = self._file.read()
        end_record = tail.rfind(b"PK\5\6")
        if end_record < 0 or len(tail) - end_record < END.size:
            raise ArchiveError("the directory at its end is missing")
        end = tail_at + end_record
        _, _, _, _, count, size, offset, _ = END.unpack_from(tail, end_record)
        if 0xFFFFFFFF in (size, offset) or count == 0xFFFF:
            end, count, size, offset = self._end64(end, count, size, offset)
        if size > MAX_DIRECTORY or offset + size > end:
            raise ArchiveError(f"its end tells of a directory of {size} bytes at {offset}, which is not there")
        self._file.seek(offset)
        directory = self._file.read(size)
        if (entries := sum(1 for _ in _entries(directory))) != count:
            raise ArchiveError(f"its directory has {entries} members, its end tells of {count}")
        return offset, directory

    def _end64(self, end: int, count: int, size: int, offset: int) -> tuple[int, int, int, int]:
        """Replace the four numbers by those of the zip64 record before the end record, if there is one."""
        at = end - LOCATOR.size
        if at < 0:
            return end, count, size, offset
        self._file.seek(at)
        signature, _, at, _ = LOCATOR.unpack(self._file.read(LOCATOR.size))
        if signature != b"PK\6\7":
            return end, count, size, offset
        self._file.seek(min(at, self._size))
        record = self._file.read(END64.size)
        if len(record) < END64.size or not record.startswith(b"PK\6\6"):
            raise ArchiveError("the directory at its end is damaged")
        *_, count, size, offset = END64.unpack(record)
        return at, count, size, offset

    # -- without it ----------------------------------------------------------------------------------------------------

    def without_directory(self, fault: str) -> Iterator[Member]:
        """Read the members that follow each other from the beginning; then give a `damaged_archive` with the fault."""
        at = count = 0
        while True:
            alive()
            self._file.seek(at)
            header = self._file.read(LOCAL.size)
            if len(header) < LOCAL.size or not header.startswith(b"PK\3\4"):
                break
            _, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL.unpack(header)
            name = _name(self._file.read(name_length), flags)
            packed, size, _ = _large(self._file.read(extra_length), packed, size, 0)
            at += LOCAL.size + name_length + extra_length
            if flags & DESCRIPTOR or at + packed > self._size:  # its size is behind its data, or it is truncated
                break
            count += 1
            if self._wanted(name) and not name.endswith("/"):
                entry = _Entry(name, flags, method, crc, packed, size, 0, 0)
                refused = self._refused(entry)
                try:
                    yield refused or Member(name, self._unpack(at, entry))
                except (ArchiveError, zlib.error) as error:
                    yield Member(name, None, "damaged_member", str(error))
            at += packed
            if self._made > FREE_BYTES + MAX_RATIO * self._size:
                fault = f"a bomb: {self._made} bytes came of {self._size}"
                break
        yield Member("", None, "damaged_archive", f"{fault} ({count} members read)")


def _entries(directory: bytes) -> Iterator[_Entry]:
    """Parse the entries of a directory, as far as they can be read."""
    at = 0
    while at + ENTRY.size <= len(directory) and directory.startswith(b"PK\1\2", at):
        fields = ENTRY.unpack_from(directory, at)
        _, _, system, _, _, flags, method, _, _, crc, packed, size, name, extra, comment, _, _, mode, offset = fields
        at += ENTRY.size
        text, about = directory[at : at + name], directory[at + name : at + name + extra]
        at += name + extra + comment
        if at > len(directory):
            return
        packed, size, offset = _large(about, packed, size, offset)
        yield _Entry(_name(text, flags), flags, method, crc, packed, size, mode >> 16 if system == 3 else 0, offset)


def _large(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """Replace those of the three numbers that did not fit into 32 bits by the values of the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            size = next(numbers, size) if size == 0xFFFFFFFF else size
            packed = next(numbers, packed) if packed == 0xFFFFFFFF else packed
            offset = next(numbers, offset) if offset == 0xFFFFFFFF else offset
            break
        at += 4 + length
    return packed, size, offset


def _name(name: bytes, flags: int) -> str:
    if flags & UTF8 or name.isascii():
        return name.decode("utf-8", "surrogateescape")
    return name.decode("cp437")
