"""List the files that a pattern of a config stands for: local ones, of the hub, of a bucket, of a web server."""

import glob
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.secrets import without_secrets
from microdit.pipeline.files.hub import list_hub
from microdit.pipeline.files.patterns import choose, expand_braces, split_root
from microdit.pipeline.files.remote_file import Listing, RemoteFile, digest, listing
from microdit.pipeline.storage.bucket import SCHEMES, open_bucket


def list_files(pattern: str, what: str, revisions: Mapping[str, str] | None = None) -> Listing:
    """List the files that a pattern stands for. Listings of the hub and of buckets are cached by the process.

    Args:
        pattern: a local path, `hf://datasets/OWNER/NAME[@REVISION]/PATH`, `s3://bucket/key` or `https://...`. In it
            `*`, `?` and `[...]` stand for names within one folder and `**` for folders (but not on web servers, which
            cannot be listed), `{0000..0099}` and `{a,b}` for everything in the braces, each of which has to be there.
        what: the field of the config, for messages.
        revisions: by hub repository the revision to list, where the pattern names none.

    Raises:
        RequestError: nothing matches; a repository or revision is unknown; a gated one without access; no connection.
    """
    scheme, separator, rest = pattern.partition("://")
    if not separator:
        return _list_local(pattern, what)
    if scheme == "file":
        return _list_local(unquote(rest), what)
    if scheme == "hf":
        return list_hub(pattern, what, revisions or {})
    if scheme in SCHEMES:
        return _list_bucket(pattern, what, os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    if scheme in ("http", "https"):
        return _list_web(pattern, what)
    known = ", ".join(f"{each}://" for each in ("https", "hf", *SCHEMES))
    raise RequestError(f"{what} = {pattern!r}: scheme {scheme!r} is not known; give a local path, or one of {known}")


def _list_local(pattern: str, what: str) -> Listing:
    path = Path(pattern).expanduser().absolute()
    literal = path.exists()
    root = path.parent if literal else Path(split_root(str(path))[0] or "/")
    files: dict[str, RemoteFile] = {}
    for each in [str(path)] if literal else expand_braces(str(path), what):
        # the pattern is a whole one, not one below a folder
        paths = [Path(each)] if Path(each).exists() else map(Path, sorted(glob.glob(each, recursive=True)))  # noqa: PTH207
        folder = None
        before = len(files)
        for one in paths:
            if one.is_dir():
                folder = one
                continue
            try:
                stat = one.stat()
            except OSError as error:
                raise RequestError(f"{what} = {pattern!r}: {one}: {error.strerror}") from error
            name = one.relative_to(root).as_posix()
            files.setdefault(name, RemoteFile(name, str(one), stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}"))
        if len(files) == before and folder is not None:
            raise RequestError(
                f"{what} = {pattern!r}: {folder} is a folder; expected files, for example {folder}/*.tar"
            )
        if len(files) == before:
            raise RequestError(f"{what} = {pattern!r}: no file matches {each}; check the path")
    return listing(files.values(), {"files": digest((file.name, file.size) for file in files.values())})


def _list_web(pattern: str, what: str) -> Listing:
    urls, shown = list(dict.fromkeys(expand_braces(pattern, what))), without_secrets(pattern)
    for url in urls[:1]:
        parts = urlsplit(url)
        if not parts.hostname:
            raise RequestError(f"{what} = {shown!r}: it names no server; expected https://server/path")
        if "*" in parts.path or "[" in parts.path:
            raise RequestError(
                f"{what} = {shown!r}: a web server cannot be listed; write the names as in part-{{000..099}}.tar"
            )
    root, _ = split_root(pattern.partition("?")[0])
    names = [unquote(urlsplit(url).path) for url in urls]
    folder = unquote(urlsplit(root).path).rstrip("/") + "/"
    names = [name.removeprefix(folder).strip("/") for name in names]
    if len(set(names)) < len(names) or not all(names):  # they differ in host or query
        names = [without_secrets(url).partition("://")[2] for url in urls]
    if len(set(names)) < len(names):
        raise RequestError(f"{what} = {shown!r}: URLs differ in a password or signature alone; expected each file once")
    files = [RemoteFile(name, url) for name, url in zip(names, urls, strict=True)]
    return listing(files, {"files": digest((file.name,) for file in files)})


@lru_cache(maxsize=64)
def _list_bucket(pattern: str, what: str, endpoint: str | None) -> Listing:
    scheme, _, rest = pattern.partition("://")
    bucket, _, path = rest.partition("/")
    if not bucket or not path or path.endswith("/"):
        raise RequestError(f"{what} = {pattern!r}: expected {scheme}://bucket/path with the name of files, as *.tar")
    root, _ = split_root(path)
    try:
        pages = obstore.list(open_bucket(f"{scheme}://{bucket}", endpoint), root or None, chunk_size=1000)
        objects = {item["path"]: item for page in pages for item in page}
    except exceptions.BaseError as error:
        raise RequestError(
            f"{what} = {pattern!r}: the bucket cannot be listed: {first_line(error)}; check its name, the credentials "
            "(as for boto3) and the connection"
        ) from error
    names, unmatched = choose(expand_braces(path, what), list(objects))
    if unmatched is not None:
        raise RequestError(f"{what} = {pattern!r}: no object matches {scheme}://{bucket}/{unmatched}; check the path")
    files = []
    for key in names:
        item = objects[key]
        name = key.removeprefix(f"{root}/") if root else key
        files.append(RemoteFile(name, f"{scheme}://{bucket}/{key}", item["size"], item["e_tag"] or ""))
    return listing(files, {"files": digest((file.name, file.size, file.etag) for file in files)})
