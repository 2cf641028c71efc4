"""Open a file that may be compressed as a stream of what is in it, with the bounds of `tars`."""

import io
from pathlib import Path
from typing import Any

from microdit.pipeline.files.tars import CHUNK, PackedStream


class UnpackedFile(io.RawIOBase):
    """The bytes of a file, decompressed if it is gzip, bzip2, xz or zstd.

    Raises:
        ArchiveError: while it is read: what is packed is damaged, or a bomb.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._stream = PackedStream(self._file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def unpacked(path: Path) -> io.BufferedReader:
    """Open a file for buffered reads; raises while it is read as `UnpackedFile`."""
    return io.BufferedReader(UnpackedFile(path), CHUNK)
