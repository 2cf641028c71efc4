"""Keep bytes that wait for their turn on disk."""

import tempfile


class Spool:
    """A nameless temporary file, which is gone with the process; its room is free again once all of it was taken."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._left = 0
        self.size = 0

    def put(self, data: bytes) -> tuple[int, int]:
        """Write the bytes; return where they are."""
        self._file.seek(self.size)
        self._file.write(data)
        offset = self.size
        self.size += len(data)
        self._left += 1
        return offset, len(data)

    def take(self, where: tuple[int, int]) -> bytes:
        """Read bytes back, once."""
        self._file.seek(where[0])
        data = self._file.read(where[1])
        self._left -= 1
        if not self._left:
            self._file.truncate(0)
            self.size = 0
        return data

    def close(self) -> None:
        self._file.close()
