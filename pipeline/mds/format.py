"""MDS, the format of MosaicML Streaming (version 2), read and written: `index.json` and the shards that it names.

    shard    samples (n) | offsets (n + 1) | config (JSON) | sample | sample | ...
    sample   the size of each column that has no fixed one | the bytes of each column

All numbers are uint32, little-endian; offsets count from the beginning of the file; columns stand in the order of their
names. A shard may be packed with zstd as a whole. The library itself needs an old numpy and torchvision, and so it is
no dependency; what is written here has the bytes that it writes (tests/data/mds).

Nothing that is read is trusted: files lie below the folder, sizes are checked before anything is allocated, and values
are bytes. Decoding them is left to the caller, who refuses `pkl`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from microdit.pipeline.base.errors import RequestError, first_line

INDEX = "index.json"
MOST_INDEX = 1 << 28  # bytes of an index; a shard takes six hundred
MOST_SAMPLE = 1 << 26  # bytes of one sample; with an image of 512 px it has half a million
SIZE_LIMIT = 1 << 28  # bytes of a shard that is written: what the official scripts ask for
UINT32 = np.dtype("<u4")
BLOCK = 1 << 20


class DamagedShard(ValueError):
    """A shard that cannot be read: a file is missing, cut, or other than the index says."""


class DamagedSample(ValueError):
    """A sample that cannot be read; the shard's others can."""


# -- the index -------------------------------------------------------------------------------------------------------
class FileInfo(BaseModel):
    """A file of a shard; `basename` is its path below the folder of the index."""

    basename: str
    bytes: int = Field(ge=0, lt=2**32)
    hashes: dict[str, str] = {}

    @field_validator("basename")
    @classmethod
    def _below(cls, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name:
            raise ValueError(f"{name!r} is no path below the folder")
        return name


class ShardInfo(BaseModel):
    """A shard's entry of the index."""

    version: Literal[2]
    format: Literal["mds"]
    samples: int = Field(ge=0, lt=2**32)
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]
    """Bytes of the columns of fixed size; None or 0 of the others."""
    raw_data: FileInfo
    zip_data: FileInfo | None = None
    compression: str | None = None

    @model_validator(mode="after")
    def _columns_agree(self) -> "ShardInfo":
        names, sizes = self.column_names, self.column_sizes
        if len(set(names)) != len(names) or not len(names) == len(self.column_encodings) == len(sizes):
            raise ValueError(f"columns {names} with encodings {self.column_encodings} and sizes {sizes}")
        if any(size is not None and size < 0 for size in sizes):
            raise ValueError(f"column sizes {sizes}")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Encoding by column."""
        return dict(zip(self.column_names, self.column_encodings, strict=True))

    def below(self, folder: str) -> "ShardInfo":
        """Return the same entry as it is in the index of a folder that has this one's as its sub-folder `folder`."""
        moved = {
            name: info.model_copy(update={"basename": f"{folder}/{info.basename}"})
            for name in ("raw_data", "zip_data")
            if (info := getattr(self, name)) is not None
        }
        return self.model_copy(update=moved)


def is_mds(folder: Path) -> bool:
    """Check for an index in the folder, or below it."""
    return folder.is_dir() and next(folder.rglob(INDEX), None) is not None


def read_index(folder: Path) -> list[ShardInfo]:
    """Read the shards of a folder, in the index's order; without an index of its own, those of all folders below it.

    Raises:
        RequestError: there is no index, it is damaged, or it lacks a folder below it that has one.
    """
    indexed = sorted(path.parent.relative_to(folder) for path in folder.rglob(INDEX))
    if not indexed:
        raise RequestError(f"{folder}: there is no {INDEX} in it, nor below it; expected a folder of MDS shards")
    if indexed[0] != Path():
        return [shard.below(where.as_posix()) for where in indexed for shard in _read_index(folder / where / INDEX)]
    shards = _read_index(folder / INDEX)
    named = {PurePosixPath(shard.raw_data.basename).parent.as_posix() for shard in shards}
    for where in indexed[1:]:
        if where.as_posix() not in named and _read_index(folder / where / INDEX):
            raise RequestError(
                f"{folder / INDEX} names no shard of {where}, which has an index of its own: merge the indexes again, "
                f"or remove the upper {INDEX}, and all folders below are taken"
            )
    return shards


def _read_index(path: Path) -> list[ShardInfo]:
    try:
        if (size := path.stat().st_size) > MOST_INDEX:
            raise ValueError(f"{size} bytes, at most {MOST_INDEX} are read")
        index = json.loads(path.read_bytes())
        if not isinstance(index, dict) or index.get("version") != 2 or not isinstance(index.get("shards"), list):
            raise ValueError("it is no object with version 2 and a list of shards")
        return [ShardInfo.model_validate(shard) for shard in index["shards"]]
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "a shard"
        raise RequestError(f"{path} is no index of MDS shards: {where}: {fault['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no index of MDS shards: {first_line(error)}") from None


# -- reading a shard -------------------------------------------------------------------------------------------------
class MdsShard:
    """An open shard. Made by `open_shard`."""

    def __init__(self, file: BinaryIO, info: ShardInfo):
        self.info, self._file, self._size = info, file, info.raw_data.bytes
        self._dynamic = [i for i, size in enumerate(info.column_sizes) if not size]
        count = info.samples
        if (start := 4 * (count + 2)) > self._size:
            raise DamagedShard(f"{self._size} bytes cannot hold {count} samples")
        head = np.frombuffer(self._read(0, start), UINT32)
        if head[0] != count:
            raise DamagedShard(f"it begins with {head[0]} for the number of samples, the index says {count}")
        self._start, self._offsets = start, head[1:]

    def sizes(self, i: int) -> dict[str, int]:
        """Read the size in bytes of each column of sample i.

        Raises:
            DamagedSample: the sample's offsets or its sizes do not fit.
        """
        begin, end = (int(offset) for offset in self._offsets[i : i + 2])
        head = 4 * len(self._dynamic)
        if not self._start <= begin <= end - head or end > self._size:
            raise DamagedSample(f"sample {i} lies at {begin} to {end} of {self._size} bytes")
        if end - begin > MOST_SAMPLE:
            raise DamagedSample(f"sample {i} has {end - begin} bytes, at most {MOST_SAMPLE} are read")
        sizes = [int(size or 0) for size in self.info.column_sizes]
        for column, size in zip(self._dynamic, np.frombuffer(self._read(begin, head), UINT32).tolist(), strict=True):
            sizes[column] = size
        if (wanted := head + sum(sizes)) != end - begin:
            raise DamagedSample(f"sample {i} has {end - begin} bytes, its columns tell of {wanted}")
        return dict(zip(self.info.column_names, sizes, strict=True))

    def read(self, i: int, columns: Sequence[str]) -> list[bytes]:
        """Read some columns of sample i, as bytes.

        Raises:
            DamagedSample: as `sizes` does.
            DamagedShard: the file cannot be read there.
        """
        sizes = self.sizes(i)
        at = int(self._offsets[i]) + 4 * len(self._dynamic)
        offsets = {}
        for name, size in sizes.items():
            offsets[name] = at
            at += size
        return [self._read(offsets[name], sizes[name]) for name in columns]

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise DamagedShard(f"it cannot be read at {offset}: {first_line(error)}") from error
        if len(data) < size:
            raise DamagedShard(f"it ends at {offset + len(data)}, {self._size} bytes were expected")
        return data


@contextmanager
def open_shard(folder: Path, info: ShardInfo) -> Iterator[MdsShard]:
    """Open a shard and check its size and hashes. A packed one is unpacked into a temporary file.

    Raises:
        DamagedShard: the message names the file, and says what is wrong.
    """
    raw, packed = info.raw_data, info.zip_data
    info_of_file = raw if packed is None or (folder / raw.basename).exists() else packed
    path = folder / info_of_file.basename
    try:
        try:
            if not path.is_file():
                raise DamagedShard("there is no such file")
            file: BinaryIO = path.open("rb")
        except OSError as error:
            raise DamagedShard(f"it cannot be opened: {first_line(error)}") from error
        with file:
            if (size := os.fstat(file.fileno()).st_size) != info_of_file.bytes:
                raise DamagedShard(f"it has {size} bytes, the index says {info_of_file.bytes}")
            _check_hashes(file, info_of_file)
            if info_of_file is raw:
                yield MdsShard(file, info)
                return
            with tempfile.TemporaryFile() as unpacked:
                _unpack(path, info, unpacked)
                _check_hashes(unpacked, raw)
                yield MdsShard(unpacked, info)
    except DamagedShard as error:
        raise DamagedShard(f"{info_of_file.basename}: {error}") from error


def _unpack(path: Path, info: ShardInfo, target: BinaryIO) -> None:
    """Unpack a packed file, and never more bytes than the index says."""
    if (info.compression or "").partition(":")[0] != "zstd":
        raise DamagedShard(f"it is packed with {info.compression!r}; only zstd is read, unpack it beside it")
    left = info.raw_data.bytes
    with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
        while block := _read_block(stream, min(BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise DamagedShard(f"unpacked it has more than the {info.raw_data.bytes} bytes of the index")
            target.write(block)
    if left:
        raise DamagedShard(f"unpacked it has {left} bytes less than the {info.raw_data.bytes} of the index")
    target.flush()


def _read_block(file: Any, size: int) -> bytes:
    try:
        data: bytes = file.read(size)
    except (OSError, pa.ArrowException) as error:
        raise DamagedShard(f"it cannot be read: {first_line(error)}") from error
    return data


def _check_hashes(file: BinaryIO, info: FileInfo) -> None:
    digests = {name: make() for name in info.hashes if (make := hasher(name)) is not None}
    if not digests:
        return
    file.seek(0)
    while block := _read_block(file, BLOCK):
        for digest in digests.values():
            digest.update(block)
    for name, digest in digests.items():
        if digest.hexdigest() != info.hashes[name].lower():
            raise DamagedShard(f"its {name} is {digest.hexdigest()}, the index says {info.hashes[name]}")


def hasher(name: str) -> Callable[[], Any] | None:
    """Return a constructor of the hash of that name; None if it is not available (xxhash comes with `datasets`)."""
    if name in hashlib.algorithms_guaranteed and not name.startswith("shake_"):
        return lambda: hashlib.new(name)
    try:
        import xxhash
    except ImportError:
        return None
    return getattr(xxhash, name) if name in xxhash.algorithms_available else None


# -- writing ---------------------------------------------------------------------------------------------------------
class MdsWriter:
    """Write shards `shard.00000.mds`, ... into an existing folder; `close` adds the index.

    Args:
        columns: encoding by name, of no fixed size: `str`, `bytes`, `jpeg`.
        compression: None or `zstd`.
        hashes: names of hashlib, in alphabetical order.
        size_limit: bytes of a shard at most; only a shard of one sample may be larger.
    """

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, str],
        compression: Literal["zstd"] | None = None,
        hashes: Sequence[str] = (),
        size_limit: int = SIZE_LIMIT,
    ):
        self.folder, self._hashes, self._size_limit = folder, list(hashes), size_limit
        self._names = sorted(columns)
        self._config = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": self._hashes,
            "size_limit": size_limit,
            "column_names": self._names,
            "column_encodings": [columns[name] for name in self._names],
            "column_sizes": [None] * len(self._names),
        }
        self._head = json.dumps(self._config, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._samples: list[bytes] = []
        self._bytes = 0

    def write(self, sample: Mapping[str, bytes]) -> None:
        """Add a sample: the bytes of each column.

        Raises:
            ValueError: it has other columns, or is larger than a shard can be.
        """
        if sorted(sample) != self._names:
            raise ValueError(f"a sample has the columns {sorted(sample)}, expected {self._names}")
        values = [sample[name] for name in self._names]
        size = 4 * len(values) + sum(map(len, values))
        if (most := size + len(self._head) + 12) >= 2**32:
            raise ValueError(f"a sample of {size} bytes makes a shard of {most}; expected less than {2**32}")
        data = np.array([len(value) for value in values], UINT32).tobytes() + b"".join(values)
        if self._samples and self._size() + len(data) + 4 > self._size_limit:
            self._flush()
        self._samples.append(data)
        self._bytes += len(data)

    def close(self) -> None:
        """Write what is left, and the index."""
        if self._samples:
            self._flush()
        index = json.dumps({"version": 2, "shards": self._shards}, sort_keys=True).encode()
        _write_durably(self.folder / INDEX, [index])

    def _size(self) -> int:
        """Return bytes of the shard that the samples so far would make."""
        return 8 + 4 * len(self._samples) + len(self._head) + self._bytes

    def _flush(self) -> None:
        sizes = [len(sample) for sample in self._samples]
        start = 8 + 4 * len(sizes) + len(self._head)
        offsets = np.cumsum([start, *sizes]).astype(UINT32)
        parts = [np.array([len(sizes)], UINT32).tobytes(), offsets.tobytes(), self._head, *self._samples]
        name = f"shard.{len(self._shards):05}.mds"
        entry = {**self._config, "samples": len(sizes), "raw_data": self._file_info(name, parts), "zip_data": None}
        if self._config["compression"]:
            name += ".zstd"
            packed = pa.Codec("zstd", compression_level=3).compress(b"".join(parts), asbytes=True)
            parts = [packed]
            entry["zip_data"] = self._file_info(name, parts)
        _write_durably(self.folder / name, parts)
        self._shards.append(entry)
        self._samples, self._bytes = [], 0

    def _file_info(self, name: str, parts: Sequence[bytes]) -> dict[str, Any]:
        hashes = {}
        for algorithm in self._hashes:
            digest = hashlib.new(algorithm)
            for part in parts:
                digest.update(part)
            hashes[algorithm] = digest.hexdigest()
        return FileInfo(basename=name, bytes=sum(map(len, parts)), hashes=hashes).model_dump()


def merged_index(folder: Path, parts: Sequence[str]) -> bytes:
    """Merge the indexes of a folder's sub-folders into the folder's own."""
    shards = []
    for part in parts:
        for shard in json.loads((folder / part / INDEX).read_bytes())["shards"]:
            for name in ("raw_data", "zip_data"):
                if shard[name] is not None:
                    shard[name]["basename"] = f"{part}/{shard[name]['basename']}"
            shards.append(shard)
    return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()


def _write_durably(path: Path, parts: Sequence[bytes]) -> None:
    """Write a new file; its bytes are on the disk when this returns."""
    with path.open("xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
