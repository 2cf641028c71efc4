"""Files of data sets on the Hugging Face Hub: list them at a commit, and find the address of their bytes."""

import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.retry import Backoff, retry_after
from microdit.pipeline.files.patterns import choose, expand_braces, split_root
from microdit.pipeline.files.remote_file import Listing, RemoteFile, digest, listing

if TYPE_CHECKING:  # the library is slow to import, and only hf:// patterns need it
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?/(.+)")
SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")  # the hub itself takes whole hashes only
TRIES, PAUSE = 4, 1.0  # of a request; seconds before the second, twice as many before each further one
LONGEST_WAIT = 600.0  # seconds that the hub may ask for
TRANSIENT = (408, 429, 500, 502, 503, 504)
T = TypeVar("T")


def list_hub(pattern: str, what: str, revisions: Mapping[str, str]) -> Listing:
    """List the files of a repository at the commit that its revision is now, with the user's endpoint and token.

    Where the pattern names no revision, it is that of `revisions`, by repository, or `main`.

    In a gated repository one file is requested, so that a user without access learns it here and not hours later.

    Raises:
        RequestError: as `list_files`.
    """
    from huggingface_hub import constants, get_token

    match = ADDRESS.fullmatch(pattern)
    if match is not None and match[2] is None and match[1] in revisions:
        pattern = f"hf://datasets/{match[1]}@{revisions[match[1]]}/{match[3]}"
    return _list_cached(pattern, what, constants.ENDPOINT, get_token() or "")


@lru_cache(maxsize=64)
def _list_cached(pattern: str, what: str, endpoint: str, token: str) -> Listing:
    from huggingface_hub import HfApi

    match = ADDRESS.fullmatch(pattern)
    if match is None or match[3].endswith("/"):
        raise RequestError(
            f"{what} = {pattern!r}: expected hf://datasets/OWNER/NAME/FILES or "
            "hf://datasets/OWNER/NAME@REVISION/FILES, where FILES may be as data/*.tar"
        )
    repo, revision, path = match[1], (match[2] or "main").replace("%2F", "/"), match[3]
    api = HfApi(endpoint=endpoint, token=token or False)
    try:
        commit, is_gated = _resolve(api, repo, revision)
        entries = _list_tree(api, repo, commit, split_root(path)[0])
        names, unmatched = choose(expand_braces(path, what), list(entries))
        if unmatched is not None:
            raise RequestError(
                f"{what} = {pattern!r}: {repo} has no file {unmatched} at {commit[:12]}; "
                f"see https://huggingface.co/datasets/{repo}/tree/{commit}"
            )
        if is_gated:
            _check_access(api, repo, commit, names[0])
    except Exception as error:
        if (explanation := _explain(error, api, repo, revision)) is None:
            raise
        raise RequestError(f"{what} = {pattern!r}: {explanation}") from error
    files = [_remote_file(entries[name], repo, commit) for name in names]
    return listing(files, {"repo": repo, "revision": commit, "files": digest((name,) for name in names)})


def _resolve(api: "HfApi", repo: str, revision: str) -> tuple[str, bool]:
    """Return the commit that a branch, a tag or the beginning of a hash is now, and whether the repository is gated."""
    if SHORT_COMMIT.fullmatch(revision):
        commits = _retry(lambda: [c.commit_id for c in api.list_repo_commits(repo, repo_type="dataset")])
        revision = next((commit for commit in commits if commit.startswith(revision)), revision)
    info = _retry(lambda: api.dataset_info(repo, revision=revision, expand=["sha", "gated"]))
    return info.sha or revision, bool(info.gated)


def _list_tree(api: "HfApi", repo: str, commit: str, folder: str) -> "dict[str, RepoFile]":
    """List all files below a folder by path, page after page; none if there is no such folder."""
    from huggingface_hub import errors
    from huggingface_hub.hf_api import RepoFile

    def pages() -> "list[RepoFile]":
        tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        return [entry for entry in tree if isinstance(entry, RepoFile)]

    try:
        return {entry.path: entry for entry in _retry(pages)}
    except errors.EntryNotFoundError:
        return {}


def _check_access(api: "HfApi", repo: str, commit: str, name: str) -> None:
    """Request the metadata of one file, as only a user who accepted the terms may.

    Raises:
        GatedRepoError: no access.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, name, repo_type="dataset", revision=commit, endpoint=api.endpoint)
    _retry(lambda: get_hf_file_metadata(url, token=api.token, endpoint=api.endpoint))


def _explain(error: Exception, api: "HfApi", repo: str, revision: str) -> str | None:
    """Return what is wrong and what to do; None if the error is neither the hub's nor the network's."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return explain_gated(repo, bool(api.token))
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no data set {repo} (or it is private and no token with access is set): "
            "check the name, or run `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; give a branch, a tag or a commit hash"
    if not _of_the_network(error):
        return None
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    response = getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403):
        return (
            f"the hub does not accept the token: {reason}; run `hf auth login`, or set "
            "HF_TOKEN to one that may read this data set"
        )
    return (
        f"the hub does not answer at {api.endpoint}: {reason}; check the connection, and "
        "HF_ENDPOINT and HF_HUB_OFFLINE if they are set"
    )


def _remote_file(entry: "RepoFile", repo: str, commit: str) -> RemoteFile:
    etag = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
    return RemoteFile(entry.path, f"hf://datasets/{repo}@{commit}/{entry.path}", entry.size, etag)


def hub_request(url: str) -> tuple[str, dict[str, str]]:
    """Return the https address of a listed file, and the headers to request it with."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    match = ADDRESS.fullmatch(url)
    assert match is not None and match[2], url
    address = hf_hub_url(match[1], match[3], repo_type="dataset", revision=match[2])
    return address, build_hf_headers(library_name="microdit")


def repository_of(url: str) -> str:
    """Return OWNER/NAME of a listed file's URL."""
    match = ADDRESS.fullmatch(url)
    assert match is not None, url
    return match[1]


def explain_gated(repo: str, token: bool) -> str:
    """Explain to a user who may not read a gated repository how to get access."""
    who = "your token's account has not accepted" if token else "there is no token of an account that accepted"
    return (
        f"{repo} is gated, and {who} its terms: accept them at https://huggingface.co/datasets/{repo}, then run "
        "`hf auth login` or set HF_TOKEN to a token of that account that may read gated repositories"
    )


def _retry(request: Callable[[], T]) -> T:
    """Run a request to the hub, retrying transient failures after the time that the hub asks for, if it asks."""
    backoff = Backoff(PAUSE, tries=TRIES)
    while True:
        try:
            return request()
        except Exception as error:
            response = getattr(error, "response", None)
            transient = _of_the_network(error) if response is None else response.status_code in TRANSIENT
            pause = backoff.next_pause() if transient else None
            if pause is None:
                raise
            asked = retry_after(response.headers.get("Retry-After")) if response is not None else None
        time.sleep(pause if asked is None else min(asked, LONGEST_WAIT))


def _of_the_network(error: Exception) -> bool:
    # httpx in version 1 of the client, httpx2 in version 2; neither is ours to import
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
