"""One request for a file from some byte on, to the hub, a web server or a bucket. `download` decides on retries."""

import http.client
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
import requests
import urllib3
from obstore import exceptions

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.retry import retry_after
from microdit.pipeline.base.secrets import split_login, without_secrets
from microdit.pipeline.files.hub import explain_gated, hub_request, repository_of
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.storage.bucket import SCHEMES, open_bucket
from microdit.pipeline.storage.credentials import is_expired, wait_for_others

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0  # seconds for a connection; without a byte
CHUNK = 1 << 20  # bytes that are taken from a connection at once, at most
BLOCK = 16 << 20  # bytes of one request to a bucket
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
REFUSED = {401, 403, 410}
T = TypeVar("T")


class TransientError(Exception):
    """A try failed for a transient reason. `wait`: the seconds that the server asks for, if it does."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class ChangedError(TransientError):
    """The server's file is no longer the one whose beginning is on the disk."""


@dataclass(frozen=True)
class Version:
    """Size and validators of a file as a server states them, to detect a change between two requests."""

    size: int | None = None
    etag: str = ""
    modified: str = ""

    @property
    def validator(self) -> str:
        """The value for If-Range, which takes no weak ETag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def differs(self, other: "Version") -> bool:
        """Compare what both versions state; a size, ETag or date that one lacks is no difference."""
        pairs = ((self.size, other.size), (self.etag, other.etag), (self.modified, other.modified))
        first = next(((mine, theirs) for mine, theirs in pairs[1:] if mine and theirs), None)
        sizes = None not in pairs[0] and self.size != other.size
        return sizes or (first is not None and first[0] != first[1])


@dataclass(frozen=True)
class Transfer:
    """An open response: the bytes from `start` on, which is 0 if the server knows no ranges."""

    start: int
    version: Version
    chunks: Iterator[bytes]


@contextmanager
def transfer(file: RemoteFile, start: int, known: Version) -> Iterator[Transfer]:
    """Request a file from byte `start` on; `known` is the version of the part that is on the disk.

    Raises:
        TransientError: a transient failure. Also from `chunks`.
        RequestError: the server refuses.
        OSError: it has no such file, or the response is none to such a request.
    """
    if urlsplit(file.url).scheme in SCHEMES:
        yield _from_bucket(file, start)
        return
    url, headers, token = _request(file, start, known)
    with requests.Session() as session:
        try:
            # as `auth` it is dropped by a redirect to another host, and ~/.netrc does not replace it
            response = session.get(
                url, headers=headers, auth=_Token(token), stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)
            )
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise RequestError(f"{file.name}: {shown(file.url)} is no URL that can be fetched: {error}") from error
        except requests.exceptions.TooManyRedirects as error:
            raise OSError(f"{file.name}: {shown(file.url)}: {error}") from error
        except requests.exceptions.RequestException as error:
            raise TransientError(_reason(error)) from error
        _check_status(file, response, token is not None)
        sent = _content_range(response) if response.status_code == 206 else (0, _length(response))
        if sent is None or (sent[0] != start and sent[0] != 0):
            raise TransientError(f"asked for bytes from {start} on, answered {response.headers.get('Content-Range')!r}")
        first_byte, size = sent
        version = Version(size, response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""))
        yield Transfer(first_byte, version, _chunks(response))


def shown(url: str) -> str:
    """Shorten a URL for messages by its query, which may hold a signature, and by its password."""
    return without_secrets(url.partition("?")[0])


def _request(file: RemoteFile, start: int, known: Version) -> tuple[str, dict[str, str], str | None]:
    """Return the URL, the headers in lower case, and apart from them the Authorization header."""
    url, headers = file.url, {"User-Agent": "microdit"}
    if urlsplit(file.url).scheme == "hf":
        url, headers = hub_request(file.url)
    headers = {name.lower(): value for name, value in headers.items()}
    url, login = split_login(url)
    token = headers.pop("authorization", login)
    headers["accept-encoding"] = "identity"
    if start:
        headers["range"] = f"bytes={start}-"
        if not file.etag and known.validator:
            headers["if-range"] = known.validator
    return url, headers, token


def _from_bucket(file: RemoteFile, start: int) -> Transfer:
    if file.size is None:  # a picture that a line of a table names was not listed
        about = _of_bucket(file, lambda bucket, key: obstore.head(bucket, key))
        file = replace(file, size=about["size"], etag=about["e_tag"] or "")
    assert file.size is not None
    return Transfer(start, Version(file.size, file.etag), _blocks(file, start, file.size))


def _blocks(file: RemoteFile, start: int, size: int) -> Iterator[bytes]:
    for offset in range(start, size, BLOCK):
        options: dict[str, Any] = {"range": (offset, min(offset + BLOCK, size))}
        if file.etag:
            options["if_match"] = file.etag

        def get(bucket: Any, key: str, options: Any = options) -> bytes:
            return bytes(obstore.get(bucket, key, options=options).bytes())

        yield _of_bucket(file, get)


def _of_bucket(file: RemoteFile, request: Callable[[Any, str], T]) -> T:
    """Ask the bucket of a file; its errors become those of `transfer`."""
    parts = urlsplit(file.url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    address = f"{parts.scheme}://{parts.netloc}"
    bucket = open_bucket(address, endpoint)
    try:
        return request(bucket, file.url.split("/", 3)[3])
    except exceptions.PreconditionError as error:
        raise OSError(f"{file.name}: {file.url} is another file than when it was listed; start again") from error
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.name}: {file.url} is not there any more") from None
    except exceptions.BaseError as error:
        if parts.scheme == "s3" and is_expired(error):
            wait_for_others(address, bucket, error)
            open_bucket.cache_clear()
        elif isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            raise RequestError(
                f"{file.name}: {file.url} is refused: {first_line(error)}; check the credentials (as for boto3)"
            ) from error
        raise TransientError(first_line(error)) from error


class _Token(requests.auth.AuthBase):
    """Send the hub's token in the way in which requests sends passwords."""

    def __init__(self, header: str | None):
        self._header = header

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._header is not None:
            request.headers["Authorization"] = self._header
        return request


def _check_status(file: RemoteFile, response: requests.Response, token: bool) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    said = f"{status} {response.reason or ''}".strip()
    where = shown(file.url)
    from_hub = file.url.startswith("hf://")
    redirected = urlsplit(response.url).hostname != urlsplit((response.history or [response])[0].url).hostname
    if status in TRANSIENT or (from_hub and redirected and status in REFUSED):  # its links to the CDN are made again
        raise TransientError(f"answered {said}", _asked_wait(response))
    if status == 416:
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        raise ChangedError(f"the file has {size if size.isdecimal() else 'fewer'} bytes only")
    if status in REFUSED and from_hub:
        explanation = explain_gated(repository_of(file.url), token)
        raise RequestError(f"{file.name}: the hub refuses it ({said}): {explanation}")
    if status in REFUSED:
        raise RequestError(
            f"{file.name}: {where} is refused ({said}): the link has expired, or is not for you; "
            "get new links (or a new file of links) from the data set's own page and start again: what is done is kept"
        )
    if status == 404:
        raise FileNotFoundError(f"{file.name}: the server has no {where} (404)")
    raise OSError(f"{file.name}: {where} is answered with {said}")


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Read the body in chunks as they come, not decoded: some servers declare a .gz file as compressed content."""
    while True:
        try:
            chunk = response.raw.read1(CHUNK, decode_content=False)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise TransientError(_reason(error)) from error
        if not chunk:
            return
        yield chunk


def _content_range(response: requests.Response) -> tuple[int, int | None] | None:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    return (int(match[1]), None if match[2] == "*" else int(match[2])) if match else None


def _length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _asked_wait(response: requests.Response) -> float | None:
    """Return the seconds that the server asks to wait: by Retry-After, or by the hub's RateLimit header."""
    if header := response.headers.get("Retry-After", "").strip():
        return retry_after(header)
    window = re.search(r";\s*r=0\s*;\s*t=(\d{1,6})", response.headers.get("RateLimit", ""))
    return float(window[1]) if window and response.status_code == 429 else None


def _reason(error: BaseException) -> str:
    """Return the text of the innermost cause: the outer ones repeat the URL with its signature."""
    inner: Any = error
    while True:
        further = getattr(inner, "reason", None) or next((a for a in inner.args if isinstance(a, BaseException)), None)
        if not isinstance(further, BaseException):
            break
        inner = further
    text = str(inner).strip() or type(inner).__name__
    return f"{type(inner).__name__}: {text.splitlines()[0]}"[:300]
