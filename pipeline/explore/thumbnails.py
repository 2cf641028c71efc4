"""Small pictures in a folder of this machine: those used last stay, up to a bound."""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from threading import Lock

MOST_BYTES = 4 << 30  # a tenth of what is free if that is less
LEFT = 0.8  # of the bound that is left when room is made
NAME = 64  # characters of a file's name


class ThumbnailFolder:
    """At most `most` bytes of small pictures. A folder that cannot be written keeps none."""

    def __init__(self, folder: Path, most: int | None = None):
        self.folder = folder
        self._lock = Lock()
        self._size: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.most = min(MOST_BYTES, shutil.disk_usage(folder).free // 10) if most is None else most
        except OSError:
            self.most = 0

    @staticmethod
    def key(*parts: object) -> str:
        """Name a picture by what it is made of."""
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def get(self, key: str) -> bytes | None:
        """Read a picture, if it is there."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data or None

    def put(self, key: str, data: bytes) -> None:
        """Keep a picture; it appears at once or not at all."""
        if len(data) > self.most:
            return
        path = self._path(key)
        part = path.with_name(f"{key}#{os.urandom(4).hex()}")
        try:
            path.parent.mkdir(exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except OSError:  # a full disk, for one: the page needs no copy
            with suppress(OSError):
                part.unlink(missing_ok=True)
            return
        with self._lock:
            if self._size is None or self._size + len(data) > self.most:
                self._size = self._make_room()
            else:
                self._size += len(data)

    def _make_room(self) -> int:
        """Remove what was used longest ago if there is too much; returns the bytes that are left."""
        files = []
        for path in self.folder.glob("??/*"):
            with suppress(OSError):  # another process has removed it
                about = path.stat()
                files.append((about.st_mtime, about.st_size, path))
        size = sum(file[1] for file in files)
        if size <= self.most:
            return size
        for _, taken, path in sorted(files):
            if size <= LEFT * self.most:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
            size -= taken
        return size


def cache_folder() -> Path:
    """Name the folder of what pages of this machine keep: `microdit/explore` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "microdit" / "explore"
