"""A server on loopback that behaves like the Hugging Face hub to the real `huggingface_hub` client.

Models and data sets with commits and branches; listing with pages; files with ETag, commit and ranges, large ones by a
redirect to another address, as the hub's CDN; gated and private repositories; connections that break or are slow;
answers that ask to come back later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

TOKEN = "hf_member"  # of an account that has accepted every licence
LARGE = (".safetensors", ".bin", ".tar", ".parquet", ".zip", ".tgz", ".gz")  # what the hub keeps in its object store

SIBLINGS = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs|commits)(?:/([^/]+))?(?:/(.+))?)?"
)

RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """`commits`: the files of each commit, by path. `refs`: the commit of each branch and tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


@dataclass(frozen=True)
class Request:
    """`file`: the path in its repository, if it is one's bytes that were asked for. `token`: what was sent along."""

    method: str
    path: str
    range: str | None
    status: int
    file: str = ""
    token: str = ""


class Hub:
    """The server. `url` is its endpoint, `requests` what it was asked for, `page` how many files a listing's page has.

    `faults`: for the end of a file's path, what happens to its next downloads, in order: ("cut", a number of bytes
    after which the connection breaks), ("status", what to answer), ("slow", bytes in each twentieth of a second), or
    ("other", the last bytes differ: they are that number). `busy`: the statuses that the next listings are answered
    with. Both ask to come back after `retry_after` seconds where the status is 429 or 503.
    """

    def __init__(self, page: int = 1000) -> None:
        self.page = page
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.faults: dict[str, list[tuple[str, int]]] = {}
        self.busy: list[int] = []
        self.retry_after = 1
        self.connections: list[socket.socket] = []
        self._blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server and close the connections that clients hold open."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes] | Path,
        *,
        kind: str = "models",
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
        commit: str | None = None,
    ) -> str:
        """Commit just these files, or those of a folder, to `branch` of a repository; return its hash."""
        if isinstance(files, Path):
            folder = files
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        repository = self.repositories.setdefault((kind, repo), Repository())
        repository.gated, repository.private = gated, private
        if commit is None:
            listing = "".join(f"{path} {hashlib.sha1(data).hexdigest()}\n" for path, data in sorted(files.items()))
            commit = hashlib.sha1(f"{repo} {len(repository.commits)}\n{listing}".encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[branch] = commit
        for data in files.values():
            self._blobs[hashlib.sha256(data).hexdigest()] = data
        return commit

    def downloads(self) -> list[str]:
        """List the paths of the files that were sent, in whole or in part, each once, in order."""
        return list(dict.fromkeys(r.file for r in self._sent()))

    def ranges(self, end: str) -> list[str | None]:
        """List the Range headers of the downloads of the file whose path has that end."""
        return [r.range for r in self._sent() if r.file.endswith(end)]

    def _sent(self) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.file and r.status in (200, 206)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client broke off
            super().handle()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self._path, self._file = url.path, ""
        if match := SIBLINGS.fullmatch(url.path):
            kind, repo, what, revision, path = match.groups()
            self._api(kind, repo, what, revision, path, parse_qs(url.query))
        elif match := RESOLVE.fullmatch(url.path):
            self._resolve("datasets" if match[1] else "models", match[2], unquote(match[3]), unquote(match[4]))
        elif url.path.startswith("/cdn/") and (data := self.hub._blobs.get(url.path.removeprefix("/cdn/"))) is not None:
            self._send_file(data, {"ETag": f'"{url.path.removeprefix("/cdn/")}"'}, parse_qs(url.query)["path"][0])
        else:
            self._error(404, "", f"no such address: {url.path}")

    # -- listings ----------------------------------------------------------------------------------------------------

    def _api(self, kind: str, repo: str, what: str, revision: str, path: str, query: dict[str, list[str]]) -> None:
        if self.hub.busy:
            return self._error(self.hub.busy.pop(0), "", "too many requests")
        repository = self._repository(kind, repo)
        if repository is None:
            return
        if what == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.refs.items()]
            return self._json({"branches": refs, "tags": [], "converts": []})
        commit = self._commit(repository, unquote(revision or "main"))
        if commit is None:
            return
        if what == "commits":
            hashes = list(repository.commits)
            earlier = reversed(hashes[: hashes.index(commit) + 1])
            about = {"authors": [], "date": "2024-07-21T00:00:00.000Z", "title": "-", "message": ""}
            return self._json([{"id": earlier_commit, **about} for earlier_commit in earlier])
        files = repository.commits[commit]
        if what == "tree":
            prefix = f"{unquote(path)}/" if path else ""
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            found = {name: data for name, data in sorted(files.items()) if name.startswith(prefix)}
            folders = {parent.as_posix() for name in found for parent in PurePosixPath(name).parents} - {"."}
            everything = sorted([*found, *(folder for folder in folders if folder.startswith(prefix))])
            names = [name for name in everything if recursive or "/" not in name.removeprefix(prefix)]
            if prefix and not found:
                return self._error(404, "EntryNotFound", f"{path} does not exist on {commit}", commit)
            start = int(query.get("cursor", ["0"])[0])
            page = [_entry(name, found.get(name)) for name in names[start : start + self.hub.page]]
            headers = {}
            if start + len(page) < len(names):
                rest = f"{self.hub.url}{self._path}?recursive={recursive}&cursor={start + len(page)}"
                headers["Link"] = f'<{rest}>; rel="next"'
            return self._json(page, headers)
        if what == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()).get("paths", [])
            return self._json([_entry(name, files[name]) for name in asked if name in files])
        siblings = [{"rfilename": name} for name in sorted(files)]
        gated = "manual" if repository.gated else False
        body = {"_id": commit[:24], "id": repo, "sha": commit, "siblings": siblings, "gated": gated, "tags": []}
        self._json({**body, "private": repository.private, "disabled": False, "downloads": 0, "likes": 0})

    # -- files -------------------------------------------------------------------------------------------------------

    def _resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        repository = self._repository(kind, repo)
        if repository is None:
            return
        commit = self._commit(repository, revision)
        if commit is None:
            return
        if repository.gated and not self._member():
            status = 403 if self.headers.get("Authorization") else 401
            return self._error(status, "GatedRepo", f"Access to {kind[:-1]} {repo} is restricted.", commit)
        data = repository.commits[commit].get(path)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found", commit)
        if not path.endswith(LARGE):
            return self._send_file(data, {"ETag": f'"{_entry(path, data)["oid"]}"', "X-Repo-Commit": commit}, path)
        digest = hashlib.sha256(data).hexdigest()
        location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest}?path={quote(path)}"
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
        self._send(302, {"Location": location, **linked}, b"")

    def _send_file(self, data: bytes, headers: dict[str, str], path: str) -> None:
        self._file = path
        faults = next((f for end, f in self.hub.faults.items() if path.endswith(end)), [])
        fault = faults.pop(0) if faults and self.command == "GET" else None
        if fault is not None and fault[0] == "status":
            return self._error(fault[1], "", "out of order")
        if fault is not None and fault[0] == "other":
            data = data[:-1] + bytes([fault[1]])
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        status, part, headers = 200, data, {**headers, "Accept-Ranges": "bytes"}
        if asked and (asked[1] or asked[2]) and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
            stop = min(len(data), int(asked[2]) + 1) if asked[1] and asked[2] else len(data)
            if start >= stop:
                return self._send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            status, part = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        cut = fault[1] if fault and fault[0] == "cut" else None
        self._send(status, headers, part, cut, slow=fault[1] if fault and fault[0] == "slow" else None)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _member(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, kind: str, repo: str) -> Repository | None:
        repository = self.hub.repositories.get((kind, repo))
        if repository is None or (repository.private and not self._member()):
            # to strangers the hub does not tell what is private from what is not there
            status = 404 if self._member() else 401
            self._error(status, "RepoNotFound", "Invalid username or password." if status == 401 else "Not found")
            return None
        return repository

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = revision if revision in repository.commits else repository.refs.get(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _json(self, body: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(body).encode())

    def _error(self, status: int, code: str, message: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        if status in (429, 503):
            headers["Retry-After"] = str(self.hub.retry_after)
        body = json.dumps({"error": message}).encode()
        self._send(status, {name: value for name, value in headers.items() if value}, body)

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes, cut: int | None = None, slow: int | None = None
    ) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        asked = self.headers.get("Range")
        self.hub.requests.append(Request(self.command, self._path, asked, status, self._file, token))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            step = slow or max(1, len(body))
            for start in range(0, len(body[:cut]), step):
                self.wfile.write(body[:cut][start : start + step])
                if slow is not None:
                    time.sleep(0.05)
        if cut is not None and cut < len(body):
            self.wfile.flush()
            self.close_connection = True


def _entry(path: str, data: bytes | None) -> dict[str, object]:
    """Describe a file for a listing, with git's hash of its blob; a folder if there is no data."""
    if data is None:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, an empty cache and no token, for the client in this process and its children."""
    from huggingface_hub import constants

    server = Hub()
    cache = tmp_path / "hub-cache"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server
    finally:
        server.close()
