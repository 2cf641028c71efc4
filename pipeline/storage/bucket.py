"""Objects in a bucket (S3, GCS, Azure), through obstore.

Requests are retried for longer than obstore does: a bucket that throttles slows a build and does not fail it.
"""

import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.retry import Backoff
from microdit.pipeline.base.threads import side_by_side
from microdit.pipeline.storage.credentials import is_expired, wait_for_others
from microdit.pipeline.storage.exclusive import ADVICE, ASKED, check_exclusive
from microdit.pipeline.storage.object_info import ObjectInfo

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az")
BLOCK = 4 << 20  # bytes that one request reads of a file on a bucket
PARTS = 3  # parts of an upload at once: each has to arrive within READ_TIMEOUT, on a slow line too
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte of the response, the sending of the request included
REQUEST_TIMEOUT = 300.0  # seconds for one request as a whole
PATIENCE = 300.0  # seconds after which no further try of a failing request begins
FIRST_PATIENCE = 30.0  # the same before the bucket's first response: its address may be wrong
PAUSE, LONGEST_PAUSE = 0.1, 20.0  # seconds before the second try, at most twice as long before each further one
FINAL = (  # errors that another try would not change; all others may be throttling, or the network
    exceptions.AlreadyExistsError,
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.UnknownConfigurationKeyError,
)
NOT_IMPLEMENTED = re.compile(r"\b501 Not Implemented\b|<Code>NotImplemented</Code>")
KEPT = timedelta(minutes=5)  # that obstore keeps credentials: boto3 renews those of roles ten minutes before their end
SCRATCH, OLD_SCRATCH = "microdit-scratch-", 24 * 3600.0  # seconds: no attempt may be committed that is half as old


class Bucket:
    """Immutable objects under `url`, which is `s3://bucket/prefix`, `gs://...` or `az://...`.

    Raises:
        RequestError: if the URL names no bucket.
    """

    root = None  # no folder of this machine

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._answered = False
        scheme = urlsplit(url).scheme
        if found := [character for character in "#?%" if character in url]:
            raise RequestError(
                f"corpus {url!r}: its prefix has {' and '.join(found)}, which programs read in different ways; "
                f"expected {scheme}://bucket/prefix of letters, digits, / . _ and -"
            )
        try:
            self._open()
        except exceptions.BaseError as error:
            raise RequestError(
                f"corpus {url!r}: {first_line(error)}; expected {scheme}://bucket/prefix and its credentials"
            ) from error

    def _open(self) -> None:
        """Open the bucket with the credentials that are found now."""
        scheme = urlsplit(self.url).scheme
        options = bucket_options(scheme)
        self._bucket: Any = from_url(self.url, **options)
        self._once: Any = from_url(self.url, **options | {"retry_config": {"max_retries": 0}})

    def __reduce__(self) -> tuple[type["Bucket"], tuple[str], dict[str, bool]]:
        return Bucket, (self.url,), {"_answered": self._answered}

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> None:
        """Write a whole object, durable, if and only if the name is free.

        A request whose response was lost may have succeeded: then the bucket refuses the retry because of our own
        bytes, and that is a success. If another writer wrote equal bytes meanwhile, both succeed: nothing differs.

        Raises:
            FileExistsError: the name was taken before.
        """
        tries = 0

        def put() -> None:
            nonlocal tries
            tries += 1
            try:
                obstore.put(self._once, name, data, mode="create")
            except exceptions.AlreadyExistsError:
                try:
                    ours = self.get(name) == data
                except FileNotFoundError:  # S3's 409: of concurrent requests none has succeeded yet
                    raise exceptions.GenericError("another request writes it at this moment") from None
                if tries == 1 or not ours:
                    raise FileExistsError(name) from None

        self._retry("write", name, put)

    def check_exclusive(self) -> None:
        """Write a probe twice: of two writers exactly one may win.

        Raises:
            RequestError: this storage cannot do that.
        """
        try:
            check_exclusive(self, f"probes/{os.urandom(16).hex()}")
        except exceptions.NotSupportedError as error:
            raise RequestError(f"corpus {self.url}: {ASKED}: {first_line(error)}. {ADVICE}") from error

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield a local path to write the object `name` at, before `publish`; it is removed afterwards."""
        sweep_scratch()
        path = Path(tempfile.mkdtemp(prefix=SCRATCH)) / Path(name).name
        try:
            yield path
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)

    def publish(self, objects: Mapping[str, Path]) -> None:
        """Upload complete scratch files, by the name of their object, side by side; all are durable on return."""
        list(side_by_side().map(self._upload, objects, objects.values()))

    def _upload(self, name: str, path: Path) -> None:
        def put() -> None:
            try:
                obstore.put(self._bucket, name, path, max_concurrency=PARTS)
            except FileNotFoundError as error:  # the response to the last request of a multipart upload was lost
                raise exceptions.GenericError(f"the upload in parts is gone: {first_line(error)}") from error

        self._retry("write", name, put)

    def renew(self, name: str, data: bytes) -> None:
        """Write a probe again, so that its time is now: the one kind of object that is overwritten."""
        self._retry("write", name, lambda: obstore.put(self._bucket, name, data))

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; one that is already gone is no error."""
        for start in range(0, len(names), 1000):
            batch = list(names[start : start + 1000])
            try:
                self._delete(batch[0], batch)
            except FileNotFoundError:  # GCS and Azure stop at the first absent object
                for name in batch:
                    with suppress(FileNotFoundError):
                        self._delete(name, [name])

    def _delete(self, name: str, batch: Sequence[str]) -> None:
        self._retry("delete", name, lambda: obstore.delete(self._bucket, batch))

    def _retry(self, what: str, name: str, request: Callable[[], T]) -> T:
        """Run a bucket request, retrying transient failures with exponential backoff.

        Raises:
            CredentialsExpired: the credentials have, and no others are found for a while.
            OSError: it failed for `PATIENCE` seconds.
        """
        backoff = Backoff(PAUSE, LONGEST_PAUSE, jitter=(0.5, 1.0))
        while True:
            bucket = self._bucket
            try:
                response = request()
            except exceptions.BaseError as error:
                if self.url.startswith("s3:") and is_expired(reason := self._reason(error)):
                    if bucket is self._bucket:  # no other thread has opened it again
                        wait_for_others(self.url, bucket, reason)
                        self._open()
                    continue
                if isinstance(error, FINAL):
                    raise
                if NOT_IMPLEMENTED.search(str(error)):
                    raise exceptions.NotSupportedError(first_line(error)) from error
                pause = backoff.next_pause(PATIENCE if self._answered else FIRST_PATIENCE)
                if pause is None:
                    raise OSError(
                        f"{self.url}/{name}: {backoff.failures} tries to {what} it failed in {backoff.waited:.0f} s, "
                        f"the last with: {first_line(error)}; check the network, and what the bucket allows"
                    ) from error
            else:
                self._answered = True
                return response
            time.sleep(pause)

    def _reason(self, error: Exception) -> Exception:
        """Return the error that says why a request was bad: the answer to a HEAD has no text."""
        if "performing HEAD" in str(error) and "400 Bad Request" in str(error):
            try:
                next(iter(obstore.list(self._once, chunk_size=1)), None)
            except exceptions.BaseError as listing:
                return listing
        return error

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        """Read the whole object.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._retry("read", name, lambda: bytes(obstore.get(self._bucket, name).bytes()))

    def get_buffer(self, name: str) -> memoryview:
        """Read the whole object without a copy. Raises as `get`."""
        return self._retry("read", name, lambda: memoryview(obstore.get(self._bucket, name).bytes()))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of an object from `start`.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._retry(
            "read", name, lambda: bytes(obstore.get_range(self._bucket, name, start=start, length=length))
        )

    def open(self, name: str) -> BinaryIO:
        """Open a seekable binary file over the object, read in blocks.

        Raises:
            FileNotFoundError: there is none.
        """
        size = self._retry("read", name, lambda: int(obstore.head(self._bucket, name)["size"]))
        return cast(BinaryIO, io.BufferedReader(_BucketFile(self, name, size), BLOCK))

    def exists(self, name: str) -> bool:
        try:
            self._retry("read", name, lambda: obstore.head(self._bucket, name))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List all objects below the folder `prefix`, in no order."""
        for item in self._pages(prefix):
            yield ObjectInfo(item["path"], item["size"], item["last_modified"])

    def names(self, prefix: str = "") -> Iterator[str]:
        """List the names alone."""
        yield from (item["path"] for item in self._pages(prefix))

    def _pages(self, prefix: str) -> Iterator[Any]:
        """List in requests of a thousand objects each; after a fault go on behind the last object seen."""
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

        while listed := self._retry("list", prefix, page):
            yield from listed
            last = listed[-1]["path"]

    def unfinished(self) -> Iterator[Path]:
        """Yield nothing: killed writers leave no files in a bucket."""
        return iter(())


class _BucketFile(io.RawIOBase):
    """A read-only raw file over an object; every read is one request."""

    def __init__(self, store: Bucket, name: str, size: int):
        self._store, self._name, self._size = store, name, size
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size}[whence]
        self._offset = max(offset + base, 0)
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._size - self._offset), 0)
        if length:
            buffer[:length] = self._store.get_range(self._name, self._offset, length)
            self._offset += length
        return length

    def readall(self) -> bytes:
        parts = iter(lambda: self.read(BLOCK), b"")
        return b"".join(parts)


@lru_cache(maxsize=16)
def open_bucket(url: str, endpoint: str | None) -> Any:
    """Open a whole bucket with obstore, once for each endpoint of the environment, which `endpoint` must be."""
    return from_url(url, **bucket_options(urlsplit(url).scheme))


def bucket_options(scheme: str) -> dict[str, Any]:
    """Make obstore's options for a bucket: time limits, its own retries, endpoint and credentials."""
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
        has_keys = bool(os.environ.get("AWS_ACCESS_KEY_ID"))
        has_region = bool(os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))
        if not (has_keys and has_region):  # profiles, instance roles and ~/.aws/config, as boto3 finds them
            import boto3
            from obstore.auth.boto3 import Boto3CredentialProvider

            session = boto3.Session()
            if not has_keys and session.get_credentials() is not None:
                options["credential_provider"] = Boto3CredentialProvider(session, ttl=KEPT)
            if not has_region:
                options["region"] = session.region_name or "us-east-1"
    return options


@cache
def sweep_scratch() -> None:
    """Remove the scratch folders of killed writers from this machine's temporary folder, once a process."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):  # another process was faster, or it is another user's
            if time.time() - folder.stat().st_mtime > OLD_SCRATCH:
                shutil.rmtree(folder)
