"""Objects under a root: a folder, or a bucket prefix on S3, GCS or Azure (docs/corpus.md, section 1).

obstore does the work on buckets, and listing and reading on a disk. Writing on a disk is done here, because obstore
links a file into place without syncing it first, so that a power cut could leave a commit with no bytes in it.
"""

import io
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import LocalStore, from_url

from pipeline.errors import RequestError

UNFINISHED = re.compile(r"#\d+$")
SCHEMES = ("s3", "gs", "az")


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
        self._backend: Any
        self._durable: set[Path] = set()
        if scheme in SCHEMES:
            self.url = text.rstrip("/")
            try:
                self._backend = from_url(self.url, **_options(scheme))
            except obstore.exceptions.BaseError as error:
                raise RequestError(
                    f"corpus {text!r}: {first_line(error)}; expected {scheme}://bucket/prefix and its credentials"
                ) from error
        elif "://" in text and scheme != "file":
            known = ", ".join(f"{s}://" for s in SCHEMES)
            raise RequestError(f"corpus {text!r}: scheme {scheme!r} is not known; give a folder, or one of {known}")
        else:
            self.root = Path(unquote(urlsplit(text).path) if scheme == "file" else text).expanduser().absolute()
            self.url = str(self.root)
            self._backend = LocalStore(self.root) if self.root.is_dir() else None

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.url,)

    @property
    def backend(self) -> Any:
        if self._backend is None:
            assert self.root is not None
            self.root.mkdir(parents=True, exist_ok=True)
            self._backend = LocalStore(self.root)
        return self._backend

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> None:
        """Write a whole object, durable, if and only if the name is free.

        Raises:
            FileExistsError: somebody wrote it before.
        """
        if self.root is not None:
            with self.scratch(name) as path:
                path.write_bytes(data)
                self.publish(name, path)
            return
        try:
            obstore.put(self.backend, name, data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            raise FileExistsError(name) from None

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
            path = Path(tempfile.mkdtemp(prefix="microdit-")) / Path(name).name
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
            if self.root is None:
                shutil.rmtree(path.parent, ignore_errors=True)

    def publish(self, name: str, path: Path) -> None:
        """Make a complete scratch file the object `name`, durable when this returns.

        Raises:
            FileExistsError: on a disk, if the name is taken (attempt names never are).
        """
        if self.root is None:
            obstore.put(self.backend, name, path)
            return
        final = self.root / name
        _sync(path)
        os.link(path, final)
        _sync(final.parent)

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; one that is already gone is no error."""
        if self.root is not None:
            for name in names:
                (self.root / name).unlink(missing_ok=True)
            return
        for start in range(0, len(names), 1000):
            batch = list(names[start : start + 1000])
            try:
                obstore.delete(self.backend, batch)
            except FileNotFoundError:  # GCS and Azure stop at the first one that is gone
                for name in batch:
                    with suppress(FileNotFoundError):
                        obstore.delete(self.backend, name)

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.root is not None:
            return (self.root / name).read_bytes()
        return bytes(obstore.get(self.backend, name).bytes())

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of an object from `start`."""
        return bytes(obstore.get_range(self.backend, name, start=start, length=length))

    def open(self, name: str) -> BinaryIO:
        """A seekable binary file over the object, read in blocks."""
        if self.root is not None:
            return (self.root / name).open("rb", 1 << 20)
        reader = obstore.open_reader(self.backend, name, buffer_size=4 << 20)
        return cast(BinaryIO, io.BufferedReader(_Raw(reader), 1 << 20))

    def exists(self, name: str) -> bool:
        try:
            obstore.head(self.backend, name)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects below the folder `prefix`, in no order; unfinished files of local writers are not objects."""
        if self.root is not None and not (self.root / prefix).is_dir():
            return
        for chunk in obstore.list(self.backend, prefix or None):
            for item in chunk:
                if not UNFINISHED.search(item["path"]):
                    yield ObjectInfo(item["path"], item["size"], item["last_modified"])

    def unfinished(self) -> Iterator[Path]:
        """Files that killed local writers left behind; none on a bucket."""
        if self.root is not None:
            for path in self.root.rglob("*#*"):
                if UNFINISHED.search(path.name):
                    yield path


class _Raw(io.RawIOBase):
    """obstore's reader as Python's io expects one; its own `read` gives no `bytes`."""

    def __init__(self, reader: Any):
        self._reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())

    def readinto(self, buffer: Any) -> int:
        data = memoryview(self._reader.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)


def first_line(error: Exception) -> str:
    """The first line of an error's text that says something: obstore's go on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _options(scheme: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "client_options": {"timeout": timedelta(seconds=120), "connect_timeout": timedelta(seconds=10)},
        "retry_config": {"max_retries": 8, "retry_timeout": timedelta(seconds=180)},
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
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
