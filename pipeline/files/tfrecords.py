"""Read TFRecord files and their `tf.Example` messages, without TensorFlow; every size is bounded."""

import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from microdit.pipeline.base.liveness import alive
from microdit.pipeline.files.tars import CHUNK, ArchiveError, Member
from microdit.pipeline.files.unpacked import unpacked

MASK = 0xA282EAD8  # added to the rotated checksum, as the format says
MAX_NUMBERS = 65_536  # of one feature
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protobuf

Feature = bytes | float | list[bytes] | list[float] | None


def records(path: Path, max_bytes: int) -> Iterator[Member]:
    """Read the records of a file, whose names are their numbers.

    A record whose checksum is wrong fails with `damaged_member`, a longer one than `max_bytes` with `too_large`. Where
    a length is damaged nothing further can be read: the last record is a `damaged_archive`.
    """
    number = 0
    with unpacked(path) as file:
        try:
            while header := file.read(12):
                alive()
                length = _length(header)
                yield _record(file, str(number), length, max_bytes)
                number += 1
        except ArchiveError as error:
            yield Member("", None, "damaged_archive", f"{error} ({number} records read)")


def _length(header: bytes) -> int:
    if len(header) < 12:
        raise ArchiveError(f"it ends within a record's length, after {len(header)} bytes of it")
    length, checksum = struct.unpack("<QI", header)
    if masked_crc32c(header[:8]) != checksum:
        raise ArchiveError(f"no record begins here, but {header[:8]!r}: its checksum is wrong")
    return int(length)


def _record(file: BinaryIO, name: str, length: int, max_bytes: int) -> Member:
    if length > max_bytes:
        left = length + 4
        while left:
            alive()
            if not (data := file.read(min(left, CHUNK))):
                raise ArchiveError(f"it ends {left} bytes before a record does")
            left -= len(data)
        return Member(name, None, "too_large", f"{length} bytes, at most {max_bytes} are read")
    data = file.read(length + 4)
    if len(data) < length + 4:
        raise ArchiveError(f"it ends {length + 4 - len(data)} bytes before a record does")
    data, end = data[:length], data[length:]
    if masked_crc32c(data) != struct.unpack("<I", end)[0]:
        return Member(name, None, "damaged_member", "its bytes are not those that its checksum is of")
    return Member(name, data)


def masked_crc32c(data: bytes) -> int:
    """Compute the checksum of the format: CRC-32C, rotated by 15 bits, and a constant added."""
    import google_crc32c  # here, as TFRecords alone need it

    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


# -- messages --------------------------------------------------------------------------------------------------------
def parse_example(data: bytes, wanted: Collection[str]) -> tuple[dict[str, Feature], list[str]]:
    """Parse a `tf.Example`: the wanted features by name, a single value as it is, and the names of all features.

    Raises:
        ValueError: it is no such message, or a feature has more than `MAX_NUMBERS` numbers.
    """
    values: dict[str, Feature] = {}
    names: list[str] = []
    for field, features in _fields(memoryview(data)):
        if field != 1 or not isinstance(features, memoryview):
            continue
        for _, entry in _fields(_message(features)):
            parts = dict(_fields(_message(entry)))
            name = bytes(_message(parts.get(1, memoryview(b"")))).decode()
            names.append(name)
            if name in wanted:
                values[name] = _feature(_message(parts.get(2, memoryview(b""))))
    return values, names


def _feature(message: memoryview) -> Feature:
    found: list[bytes] = []
    numbers: list[float] = []
    for kind, inner in _fields(message):
        for _, value in _fields(_message(inner)):
            if kind == 1:
                found.append(bytes(_message(value)))
            elif kind == 2:
                raw = bytes(value) if isinstance(value, memoryview) else struct.pack("<I", value)
                numbers += struct.unpack(f"<{len(raw) // 4}f", raw[: len(raw) // 4 * 4])
            else:
                numbers += _signed(value)
            if len(numbers) > MAX_NUMBERS:
                raise ValueError(f"a feature has more than {MAX_NUMBERS} numbers")
    several: list[bytes] | list[float] = found or numbers
    return several if len(several) > 1 else several[0] if several else None


def _signed(value: int | memoryview) -> list[int]:
    numbers, at = [value] if isinstance(value, int) else [], 0
    while isinstance(value, memoryview) and at < len(value) and len(numbers) <= MAX_NUMBERS:
        number, at = _varint(value, at)
        numbers.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in numbers]


def _message(value: int | memoryview) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("expected a tf.Example; a number stands where a message should")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of a message with their numbers: integers, and bytes without a copy."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire == BYTES:
            size, at = _varint(message, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"expected a tf.Example; a field has the unknown type {wire}")
        if at + size > len(message):
            raise ValueError("expected a tf.Example; a field is longer than its message")
        part = message[at : at + size]
        at += size
        yield tag >> 3, part if wire == BYTES else int.from_bytes(part, "little")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise ValueError("expected a tf.Example; a number does not end")
