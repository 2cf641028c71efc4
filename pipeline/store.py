"""Objects under a root: a folder, or a bucket prefix on S3, GCS or Azure (docs/corpus.md, section 1).

obstore does the work on buckets, and what it gives up is tried again here: a bucket that throttles slows a build and
does not fail it. On a disk plain files do, because obstore links a file into place without syncing it first, so that a
power cut could leave a commit with no bytes in it, and lists sixteen times slower.
"""

import io
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

from pipeline.errors import RequestError

UNFINISHED = re.compile(r"#\d+$")
SCHEMES = ("s3", "gs", "az")
SCRATCH, OLD_SCRATCH = "microdit-scratch-", 24 * 3600.0  # seconds: no attempt may be committed that is half as old
BLOCK = 4 << 20  # bytes that one request reads of a file on a bucket
PARTS = 3  # parts of an upload at once: each has to get through in READ_TIMEOUT, on a slow line too

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte of an answer, the sending of the request included
REQUEST_TIMEOUT = 300.0  # seconds for one request as a whole
PATIENCE = 300.0  # seconds after which a request that fails again and again is given up
FIRST_PATIENCE = 30.0  # the same until the bucket has answered once: its address may be wrong
PAUSE, LONGEST_PAUSE = 0.1, 20.0  # seconds before the second try, at most twice as long before each further one
FINAL = (  # answers that another try would not change; everything else may be throttling, or the network
    exceptions.AlreadyExistsError,
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.UnknownConfigurationKeyError,
)

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: its name under the root, its size in bytes, and when it was written."""

    name: str
    size: int
    modified: datetime


class Store:
    """Immutable objects under a root `url`.

    Args:
        url: a folder, or `s3://bucket/prefix`, `gs://...`, `az://...`. Credentials of S3 are those of boto3
            (environment, profile, instance role); `AWS_ENDPOINT_URL` names another server than Amazon's.

    Raises:
        RequestError: if the URL is of no known kind, or names no bucket.
    """

    def __init__(self, url: str | Path):
        text = str(url)
        scheme = urlsplit(text).scheme
        self.root: Path | None = None
        self._bucket: Any = None
        self._once: Any = None
        self._answered = False
        self._durable: set[Path] = set()
        if scheme in SCHEMES:
            self.url = text.rstrip("/")
            options = bucket_options(scheme)
            try:
                self._bucket = from_url(self.url, **options)
                self._once = from_url(self.url, **options | {"retry_config": {"max_retries": 0}})
            except exceptions.BaseError as error:
                raise RequestError(
                    f"corpus {text!r}: {first_line(error)}; expected {scheme}://bucket/prefix and its credentials"
                ) from error
        elif "://" in text and scheme != "file":
            known = ", ".join(f"{s}://" for s in SCHEMES)
            raise RequestError(f"corpus {text!r}: scheme {scheme!r} is not known; give a folder, or one of {known}")
        else:
            self.root = Path(unquote(urlsplit(text).path) if scheme == "file" else text).expanduser().absolute()
            self.url = str(self.root)

    def __reduce__(self) -> tuple[type["Store"], tuple[str], dict[str, bool]]:
        return Store, (self.url,), {"_answered": self._answered}

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> None:
        """Write a whole object, durable, if and only if the name is free.

        A request whose answer was lost may have been carried out: then the bucket refuses the next one because of our
        own bytes, and we have won. If another writer wrote equal bytes meanwhile, both are told so: nothing differs.

        Raises:
            FileExistsError: somebody wrote it before.
        """
        if self.root is not None:
            with self.scratch(name) as path:
                path.write_bytes(data)
                sync(path)
                os.link(path, self.root / name)
            sync((self.root / name).parent)
            return
        asked = 0

        def put() -> None:
            nonlocal asked
            asked += 1
            try:
                obstore.put(self._once, name, data, mode="create")
            except exceptions.AlreadyExistsError:
                try:
                    ours = self.get(name) == data
                except FileNotFoundError:  # S3's 409: requests met, and none has won yet
                    raise exceptions.GenericError("another request writes it at this moment") from None
                if asked == 1 or not ours:
                    raise FileExistsError(name) from None

        self._patiently("write", name, put)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A local path to write the object `name` at, before `publish`; removed afterwards."""
        if self.root is not None:
            final = self.root / name
            if final.parent not in self._durable:
                _make_durable_folder(final.parent, self.root)
                self._durable.add(final.parent)
            path = final.with_name(f"{final.name}#{random.SystemRandom().randrange(10**12)}")
        else:
            _sweep_scratch()
            path = Path(tempfile.mkdtemp(prefix=SCRATCH)) / Path(name).name
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
            if self.root is None:
                shutil.rmtree(path.parent, ignore_errors=True)

    def publish(self, objects: Mapping[str, Path]) -> None:
        """Make complete scratch files, by the name of their object, objects; all are durable when this returns.

        What is waited for, a disk's syncs or a bucket's answers, is waited for side by side: nobody reads an attempt's
        objects before its commit is there.

        Raises:
            FileExistsError: on a disk, if a name is taken (attempt names never are).
        """
        if self.root is None:
            list(_side_by_side().map(self._upload, objects, objects.values()))
            return
        for name, path in objects.items():
            os.link(path, self.root / name)
        files = [self.root / name for name in objects]
        list(_side_by_side().map(sync, [*files, *{file.parent for file in files}]))

    def _upload(self, name: str, path: Path) -> None:
        def put() -> None:
            try:
                obstore.put(self._bucket, name, path, max_concurrency=PARTS)
            except FileNotFoundError as error:  # the answer to the last request of an upload in parts was lost
                raise exceptions.GenericError(f"the upload in parts is gone: {first_line(error)}") from error

        self._patiently("write", name, put)

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; one that is already gone is no error."""
        if self.root is not None:
            for name in names:
                (self.root / name).unlink(missing_ok=True)
            return
        for start in range(0, len(names), 1000):
            batch = list(names[start : start + 1000])
            try:
                self._patiently("delete", batch[0], partial(obstore.delete, self._bucket, batch))
            except FileNotFoundError:  # GCS and Azure stop at the first one that is gone
                for name in batch:
                    with suppress(FileNotFoundError):
                        self._patiently("delete", name, partial(obstore.delete, self._bucket, name))

    def _patiently(self, what: str, name: str, request: Callable[[], T]) -> T:
        """What a request to a bucket answers; one that fails in passing is made again, later and later.

        Raises:
            OSError: it failed for `PATIENCE`.
        """
        began, pause, tries = time.monotonic(), PAUSE, 0
        while True:
            tries += 1
            try:
                answer = request()
            except FINAL:
                raise
            except exceptions.BaseError as error:
                waited = time.monotonic() - began
                if waited + pause > (PATIENCE if self._answered else FIRST_PATIENCE):
                    raise OSError(
                        f"{self.url}/{name}: {tries} tries to {what} it failed in {waited:.0f} s, the last with: "
                        f"{first_line(error)}; check the network, and what the bucket allows"
                    ) from error
            else:
                self._answered = True
                return answer
            time.sleep(pause * random.uniform(0.5, 1.0))  # not all workers at once
            pause = min(2 * pause, LONGEST_PAUSE)

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.root is not None:
            return (self.root / name).read_bytes()
        return self._patiently("read", name, lambda: bytes(obstore.get(self._bucket, name).bytes()))

    def get_buffer(self, name: str) -> memoryview:
        """As `get`, without a copy of what came from a bucket."""
        if self.root is not None:
            return memoryview((self.root / name).read_bytes())
        return self._patiently("read", name, lambda: memoryview(obstore.get(self._bucket, name).bytes()))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of an object from `start`.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.root is not None:
            with (self.root / name).open("rb") as file:
                file.seek(start)
                return file.read(length)
        return self._patiently(
            "read", name, lambda: bytes(obstore.get_range(self._bucket, name, start=start, length=length))
        )

    def open(self, name: str) -> BinaryIO:
        """A seekable binary file over the object, read in blocks.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.root is not None:
            return (self.root / name).open("rb", 1 << 20)
        size = self._patiently("read", name, lambda: int(obstore.head(self._bucket, name)["size"]))
        return cast(BinaryIO, io.BufferedReader(_Raw(self, name, size), BLOCK))

    def exists(self, name: str) -> bool:
        if self.root is not None:
            return (self.root / name).is_file()
        try:
            self._patiently("read", name, lambda: obstore.head(self._bucket, name))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects below the folder `prefix`, in no order; unfinished files of local writers are not objects."""
        if self.root is None:
            for item in self._pages(prefix):
                yield ObjectInfo(item["path"], item["size"], item["last_modified"])
            return
        for name in self.names(prefix):
            with suppress(FileNotFoundError):  # deleted meanwhile
                about = (self.root / name).stat()
                yield ObjectInfo(name, about.st_size, datetime.fromtimestamp(about.st_mtime, UTC))

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names alone of what `list` gives: on a disk without a look at each file."""
        if self.root is None:
            yield from (item["path"] for item in self._pages(prefix))
            return
        folders = [prefix]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir():
                        folders.append(name)
                    elif not UNFINISHED.search(name):
                        yield name

    def _pages(self, prefix: str) -> Iterator[Any]:
        """What a bucket lists: one request for every thousand objects; after a fault it goes on behind the last one."""
        pages: Any = None
        last: str | None = None

        def page() -> Any:
            nonlocal pages
            if pages is None:
                pages = iter(obstore.list(self._bucket, prefix or None, offset=last, chunk_size=1000))
            try:
                return next(pages, None)
            except BaseException:
                pages = None
                raise

        while found := self._patiently("list", prefix, page):
            yield from found
            last = found[-1]["path"]

    def unfinished(self) -> Iterator[Path]:
        """Files that killed local writers left behind; none on a bucket."""
        if self.root is not None:
            for path in self.root.rglob("*#*"):
                if UNFINISHED.search(path.name):
                    yield path


class _Raw(io.RawIOBase):
    """An object on a bucket as Python's io expects a file: every read is a request of its own."""

    def __init__(self, store: Store, name: str, size: int):
        self._store, self._name, self._size = store, name, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._size - self._at), 0)
        if length:
            buffer[:length] = self._store.get_range(self._name, self._at, length)
            self._at += length
        return length

    def readall(self) -> bytes:
        parts = iter(lambda: self.read(BLOCK), b"")
        return b"".join(parts)


def first_line(error: Exception) -> str:
    """The first line of an error's text that says something: obstore's go on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def bucket_options(scheme: str) -> dict[str, Any]:
    """What every bucket is opened with by obstore: time limits, its own tries, address and credentials."""
    options: dict[str, Any] = {
        "client_options": {
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT),
            "read_timeout": timedelta(seconds=READ_TIMEOUT),
            "timeout": timedelta(seconds=REQUEST_TIMEOUT),
        },
        "retry_config": {
            "max_retries": 3,
            "retry_timeout": timedelta(seconds=60),
            "backoff": {"init_backoff": timedelta(seconds=PAUSE), "max_backoff": timedelta(seconds=LONGEST_PAUSE)},
        },
    }
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["endpoint"] = endpoint
            options["client_options"]["allow_http"] = endpoint.startswith("http://")
        if not os.environ.get("AWS_ACCESS_KEY_ID"):  # profiles and instance roles, as boto3 finds them
            import boto3
            from obstore.auth.boto3 import Boto3CredentialProvider

            session = boto3.Session()
            if session.get_credentials() is not None:
                options["credential_provider"] = Boto3CredentialProvider(session)
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            options["region"] = "us-east-1"
    return options


def _make_durable_folder(folder: Path, root: Path) -> None:
    """Make a folder and its parents so that their names survive a power cut.

    Below the root also those that were there: another writer may have made one a moment ago and not synced it yet.
    """
    parents = [folder, *folder.parents]
    missing = [path.parent for path in parents if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in dict.fromkeys([*parents[1 : parents.index(root) + 1], *missing]):
        sync(path)


@cache
def _side_by_side() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="publish")


@cache
def _sweep_scratch() -> None:
    """Once a process: remove what killed writers to buckets left in this machine's temporary folder."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):  # another process was faster, or it is another user's
            if time.time() - folder.stat().st_mtime > OLD_SCRATCH:
                shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
