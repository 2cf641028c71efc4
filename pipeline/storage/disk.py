"""Objects in a folder, durable once they are written.

Plain files without obstore, which links a file to its name without syncing it first, so that a power cut could leave an
empty commit, and lists sixteen times slower.
"""

import errno
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import side_by_side
from microdit.pipeline.storage.exclusive import ADVICE, ASKED
from microdit.pipeline.storage.object_info import ObjectInfo

CANNOT = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK}  # of link and fsync
UNFINISHED = re.compile(r"#\d+$")


class Disk:
    """Immutable objects as files under the folder `root`."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)
        self._durable: set[Path] = set()

    def __reduce__(self) -> tuple[type["Disk"], tuple[str]]:
        return Disk, (self.url,)

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> None:
        """Write a whole object, durable, if and only if the name is free.

        Raises:
            FileExistsError: the name was taken before.
        """
        with self.scratch(name) as path:
            path.write_bytes(data)
            sync(path)
            os.link(path, self.root / name)
        sync((self.root / name).parent)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield a local path to write the object `name` at, before `publish`; it is removed afterwards."""
        final = self.root / name
        if final.parent not in self._durable:
            _make_durable_folder(final.parent, self.root)
            self._durable.add(final.parent)
        path = final.with_name(f"{final.name}#{random.SystemRandom().randrange(10**12)}")
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, objects: Mapping[str, Path]) -> None:
        """Turn complete scratch files, by the name of their object, into objects; all are durable on return.

        The files are synced concurrently: no reader opens an attempt's objects before its commit exists.

        Raises:
            FileExistsError: if a name is taken (attempt names never are).
        """
        for name, path in objects.items():
            os.link(path, self.root / name)
        files = [self.root / name for name in objects]
        list(side_by_side().map(sync, [*files, *{file.parent for file in files}]))

    def renew(self, name: str, data: bytes) -> None:
        """Set the time of a probe to now, and write it again if it is gone."""
        try:
            os.utime(self.root / name)
        except FileNotFoundError:
            self.create(name, data)

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; one that is already gone is no error."""
        for name in names:
            (self.root / name).unlink(missing_ok=True)

    def check_exclusive(self) -> None:
        """Check that of two writers of a name exactly one wins, and that names can be made durable.

        Raises:
            RequestError: this folder cannot do that.
        """
        try:
            with self.scratch("corpus.json") as path, self.scratch("corpus.json") as name:
                path.write_bytes(b"")
                os.link(path, name)
                sync(name.parent)
                with suppress(FileExistsError):
                    os.link(path, name)
                    raise RequestError(f"corpus {self.url}: {ASKED}: it overwrote a file. {ADVICE}")
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            raise RequestError(
                f"corpus {self.url}: this folder has no hard links, or cannot sync a folder ({error.strerror}): two "
                "writers would overwrite each other, and a power cut would lose what is done; use a folder on a local "
                "disk or on NFS (ext4, XFS, ZFS), or a bucket"
            ) from error

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        """Read the whole object.

        Raises:
            FileNotFoundError: there is none.
        """
        return (self.root / name).read_bytes()

    def get_buffer(self, name: str) -> memoryview:
        """Read the whole object. Raises as `get`."""
        return memoryview((self.root / name).read_bytes())

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of an object from `start`.

        Raises:
            FileNotFoundError: there is none.
        """
        with (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def open(self, name: str) -> BinaryIO:
        """Open a seekable binary file over the object.

        Raises:
            FileNotFoundError: there is none.
        """
        return (self.root / name).open("rb", 1 << 20)

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List all objects below the folder `prefix`, in no order; unfinished files of writers are not objects."""
        for name, entry in self._entries(prefix):
            with suppress(FileNotFoundError):  # deleted meanwhile
                about = entry.stat()
                yield ObjectInfo(name, about.st_size, datetime.fromtimestamp(about.st_mtime, UTC))

    def names(self, prefix: str = "") -> Iterator[str]:
        """List the names alone, without a stat of each file.

        Raises:
            RequestError: a link leads to a folder that it lies in.
        """
        return (name for name, _ in self._entries(prefix))

    def _entries(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """List the files below a folder. Raises as `names`."""
        folders = [prefix]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_symlink():
                        self._refuse_loop(name)
                    if entry.is_dir():
                        folders.append(name)
                    elif not UNFINISHED.search(name):
                        yield name, entry

    def _refuse_loop(self, name: str) -> None:
        """Raise RequestError if a link leads to a folder on its own path, or to one that the corpus lies in."""
        path = self.root / name
        try:
            target = path.resolve(strict=True)
        except FileNotFoundError:
            return
        except (OSError, RuntimeError):  # links that lead to each other
            target = path.parent.resolve()
        above = [folder.resolve() for folder in path.parents if folder.is_relative_to(self.root)]
        if target in above or self.root.resolve().is_relative_to(target):
            raise RequestError(f"corpus {self.url}: {name} is a link to a folder that it lies in; remove the link")

    def unfinished(self) -> Iterator[Path]:
        """Find files that killed writers left behind."""
        for path in self.root.rglob("*#*"):
            if UNFINISHED.search(path.name):
                yield path


def _make_durable_folder(folder: Path, root: Path) -> None:
    """Make a folder and its parents so that their names survive a power cut.

    Existing folders below the root are synced as well: another writer may have made one and not synced it yet.
    """
    parents = [folder, *folder.parents]
    missing = [path.parent for path in parents if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in dict.fromkeys([*parents[1 : parents.index(root) + 1], *missing]):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
