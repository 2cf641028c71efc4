"""The files of data sets on the Hugging Face Hub: which there are, at which commit, and where their bytes are."""

import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.retry import Backoff, retry_after
from microdit.pipeline.files.patterns import choose, expand_braces, split_root
from microdit.pipeline.files.remote_file import Listing, RemoteFile, digest, listing

PLACE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?/(.+)")
BEGINNING = re.compile(r"[0-9a-f]{7,39}")  # of a commit's hash, which the hub itself takes only whole
TRIES, PAUSE = 4, 1.0  # of a request; seconds before the second, twice as many before each further one
LONGEST_WAIT = 600.0  # seconds that the hub may ask for
PASSING = (408, 429, 500, 502, 503, 504)
T = TypeVar("T")


@lru_cache(maxsize=64)
def list_hub(pattern: str, what: str, endpoint: str, token: str) -> Listing:
    """The files of a repository at the commit that its revision is now, page after page.

    Of a gated repository one file is asked for, so that whoever has no access learns it here and not hours later.

    Raises:
        RequestError: as `list_files`.
    """
    from huggingface_hub import HfApi, errors, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    match = PLACE.fullmatch(pattern)
    if match is None or match[3].endswith("/"):
        raise RequestError(
            f"{what} = {pattern!r}: expected hf://datasets/OWNER/NAME/FILES or "
            "hf://datasets/OWNER/NAME@REVISION/FILES, where FILES may be as data/*.tar"
        )
    repo, revision, path = match[1], (match[2] or "main").replace("%2F", "/"), match[3]
    api = HfApi(endpoint=endpoint, token=token or False)
    root, _ = split_root(path)
    try:
        if BEGINNING.fullmatch(revision):
            commits = _retry(lambda: [c.commit_id for c in api.list_repo_commits(repo, repo_type="dataset")])
            revision = next((commit for commit in commits if commit.startswith(revision)), revision)
        about = _retry(lambda: api.dataset_info(repo, revision=revision, expand=["sha", "gated"]))
        commit = about.sha or revision
        try:
            tree = _retry(
                lambda: list(
                    api.list_repo_tree(repo, root or None, recursive=True, revision=commit, repo_type="dataset")
                )
            )
        except errors.EntryNotFoundError:  # no such folder
            tree = []
        entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        names, without = choose(expand_braces(path, what), list(entries))
        if without is not None:
            raise RequestError(
                f"{what} = {pattern!r}: {repo} has no file {without} at {commit[:12]}; "
                f"see https://huggingface.co/datasets/{repo}/tree/{commit}"
            )
        if about.gated:
            first = hf_hub_url(repo, names[0], repo_type="dataset", revision=commit, endpoint=endpoint)
            _retry(lambda: get_hf_file_metadata(first, token=token or False, endpoint=endpoint))
    except errors.GatedRepoError as error:
        raise RequestError(f"{what} = {pattern!r}: {gated(repo, bool(token))}") from error
    except errors.RepositoryNotFoundError as error:
        raise RequestError(
            f"{what} = {pattern!r}: the hub has no data set {repo} (or it is private and no token with access is set): "
            "check the name, or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RequestError(
            f"{what} = {pattern!r}: {repo} has no revision {revision!r}; give a branch, a tag or a commit hash"
        ) from error
    except RequestError:
        raise
    except Exception as error:
        if not _of_the_network(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            raise RequestError(
                f"{what} = {pattern!r}: the hub does not accept the token: {reason}; run `hf auth login`, or set "
                "HF_TOKEN to one that may read this data set"
            ) from error
        raise RequestError(
            f"{what} = {pattern!r}: the hub does not answer at {endpoint}: {reason}; check the connection, and "
            "HF_ENDPOINT and HF_HUB_OFFLINE if they are set"
        ) from error
    files = []
    for name in names:
        entry = entries[name]
        etag = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        files.append(RemoteFile(name, f"hf://datasets/{repo}@{commit}/{name}", entry.size, etag))
    return listing(files, {"repo": repo, "revision": commit, "files": digest((name,) for name in names)})


def hub_request(url: str) -> tuple[str, dict[str, str]]:
    """The address and the headers to ask for a file of a listing with."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    match = PLACE.fullmatch(url)
    assert match is not None and match[2], url
    address = hf_hub_url(match[1], match[3], repo_type="dataset", revision=match[2])
    return address, build_hf_headers(library_name="microdit")


def gated(repo: str, token: bool) -> str:
    """What to tell one who may not read a gated repository."""
    who = "your token's account has not accepted" if token else "there is no token of an account that accepted"
    return (
        f"{repo} is gated, and {who} its terms: accept them at https://huggingface.co/datasets/{repo}, then run "
        "`hf auth login` or set HF_TOKEN to a token of that account that may read gated repositories"
    )


def _retry(request: Callable[[], T]) -> T:
    """Run a request to the hub, retrying transient failures, after the time that the hub asks for if it does."""
    backoff = Backoff(PAUSE, tries=TRIES)
    while True:
        try:
            return request()
        except Exception as error:
            response = getattr(error, "response", None)
            passing = _of_the_network(error) if response is None else response.status_code in PASSING
            pause = backoff.next_pause() if passing else None
            if pause is None:
                raise
            asked = retry_after(response.headers.get("Retry-After")) if response is not None else None
        time.sleep(pause if asked is None else min(asked, LONGEST_WAIT))


def _of_the_network(error: Exception) -> bool:
    # httpx in version 1 of the client, httpx2 in version 2; neither is ours to import
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
