"""The data objects of one shard: tars that stock webdataset reads, and parquet sidecars (docs/corpus.md, section 3)."""

import hashlib
import io
import math
import struct
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.quantise import Quantised, dequantise

ZIP_MEMBER = b"PK\3\4"
MOST_HEADER = 10_012  # bytes: numpy itself reads no `.npy` header longer than 10,000
_parser = threading.Lock()  # Python 3.11's parser counts its depth wrongly when threads take turns in it

# what every sidecar begins with; the column's own scalars follow
SIDECAR = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
    ]
)
SCALAR_TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}


def sidecar_schema(scalars: Mapping[str, str]) -> pa.Schema:
    """The parquet schema of a column's sidecar; `scalars` maps names to type names (`SCALAR_TYPES`)."""
    return pa.schema([*SIDECAR, *(pa.field(name, SCALAR_TYPES[kind]) for name, kind in scalars.items())])


class TarWriter:
    """A webdataset tar whose bytes depend on nothing but its samples."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._extensions: list[str] | None = None

    def add(self, key: str, members: Mapping[str, bytes]) -> tuple[int, int]:
        """Write one sample's members, `{extension: bytes}`; returns offset and size of the first one's data.

        Raises:
            ValueError: no members, other extensions than the samples before, or a name above 100 characters.
        """
        extensions = list(members)
        if not extensions or extensions != (self._extensions or extensions):
            raise ValueError(f"sample {key}: its members are {extensions}, expected {self._extensions or 'some'}")
        self._extensions = extensions
        offset, size = 0, -1
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
            if size < 0:
                offset, size = self._file.tell(), len(data)
            self._file.write(data)
            self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset, size

    def close(self) -> None:
        if not self._file.closed:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar, and whole records
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            self._file.close()


def read_tar(file: BinaryIO) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar in order, as (key, {extension: bytes}); the key ends at the first dot.

    Raises:
        tarfile.TarError: the tar is damaged.
        ValueError: a member is no regular file.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            name, _, extension = info.name.partition(".")
            if name != key:
                if key is not None:
                    yield key, members
                key, members = name, {}
            data = tar.extractfile(info) if info.isfile() else None
            if data is None:
                raise ValueError(f"{info.name} is no regular file")
            members[extension] = data.read()
    if key is not None:
        yield key, members


def write_table(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd")


def read_table(data: bytes) -> pa.Table:
    return pq.ParquetFile(io.BytesIO(data)).read()


def sidecar_table(rows: list[dict[str, Any]], scalars: Mapping[str, str]) -> pa.Table:
    """Rows (dictionaries; what is absent is null) as a sidecar, ordered by row.

    Raises:
        ValueError: if the rows are not exactly 0, 1, 2, ..., a key is there twice, or a scalar is not declared.
    """
    rows = sorted(rows, key=lambda row: row["row"])
    numbers = [row["row"] for row in rows]
    if numbers != list(range(len(rows))):
        raise ValueError(f"rows must be 0 to {len(rows) - 1} without gap or repetition, got {numbers[:8]}...")
    keys = Counter(row["key"] for row in rows)
    if len(keys) != len(rows):
        raise ValueError(f"key {keys.most_common(1)[0][0]!r} is there {keys.most_common(1)[0][1]} times in one shard")
    schema = sidecar_schema(scalars)
    if unknown := {name for row in rows for name in row}.difference(schema.names):
        raise ValueError(f"scalars {sorted(unknown)} are not declared; declared are {sorted(scalars)}")
    return pa.Table.from_pylist(rows, schema=schema)


def array_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def arrays_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as the bytes of a `.npz` file, not compressed; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), array_bytes(array))
    return buffer.getvalue()


def array_from_bytes(data: bytes) -> np.ndarray:
    """The array of any field of a sample: of a `.npy` file as it is, of a `.npz` file (quantised text) as float16.

    Never unpickles, and allocates no more than a few times what the file is long.

    Raises:
        ValueError: this is no such file, or its headers and its length disagree.
    """
    view = memoryview(data)
    return dequantise(_npz_arrays(view)) if view[:4] == ZIP_MEMBER else _npy_array(view).copy()


def array_view(data: memoryview) -> np.ndarray | Quantised:
    """As `array_from_bytes`, without a copy: the array, or the parts of quantised text, lie in `data`."""
    return Quantised.of(_npz_arrays(data)) if data[:4] == ZIP_MEMBER else _npy_array(data)


def _npz_arrays(data: memoryview) -> dict[str, np.ndarray]:
    """What a zip of `.npy` files holds, as `arrays_bytes` writes it: stored one behind the other."""
    found, at = {}, 0
    while data[at : at + 4] == ZIP_MEMBER and at + 30 <= len(data):
        flags, method, size, full, name, extra = struct.unpack_from("<2H8x2I2H", data, at + 6)
        start = at + 30 + name + extra
        if flags & 9 or method or size != full or start + size > len(data):
            raise ValueError(f"npz: the member at {at} is not stored plainly, or is cut")
        member = bytes(data[at + 30 : at + 30 + name]).decode("ascii", "replace").removesuffix(".npy")
        found[member] = _npy_array(data[start : start + size])
        at = start + size
    return found


def _npy_array(data: memoryview) -> np.ndarray:
    start = 12 if data[6:8] == b"\x02\x00" else 10
    start += int.from_bytes(data[8:start], "little")
    shape, fortran_order, dtype = _array_header(bytes(data[: min(start, MOST_HEADER)]))
    length = len(data) - start
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != length:
        raise ValueError(f"npy: {length} bytes behind a header that says {dtype} {shape}")
    array = np.frombuffer(data, dtype, offset=start) if length else np.empty(0, dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


@lru_cache(maxsize=256)  # a shard has a few different ones
def _array_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype that the beginning of a `.npy` file tells."""
    buffer = io.BytesIO(header)
    try:
        with _parser:
            version = np.lib.format.read_magic(buffer)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            return read(buffer)
    except Exception as error:  # numpy lets through whatever Python's parser and tokenizer raise
        raise ValueError(f"npy: its header cannot be read: {error}") from error


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
