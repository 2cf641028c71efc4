"""Model files: a folder on this machine, or one commit of a Hugging Face Hub repository.

Both come back as a folder that holds the wanted files, with an `origin` that says which bytes they are. A branch, a tag
or the beginning of a hash is resolved to its commit before anything is downloaded, so that "main" is never what a
corpus remembers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BEGINNING = re.compile(r"[0-9a-f]{7,39}")  # of a commit's hash


class ModelFilesError(RuntimeError):
    """The files of a model cannot be had. The message names the model and says what to do."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model in `folder`.

    `revision` is the hub commit, or None for a folder of the user's own. `name` is the repository id or the folder's
    own name (not its path, which differs from machine to machine). `weights` are the files that were chosen for them.
    """

    folder: Path
    name: str
    revision: str | None
    weights: tuple[str, ...] = ()

    def matching(self, *patterns: str) -> list[str]:
        """The files that match any of the globs, sorted, as POSIX paths relative to the folder."""
        files = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return sorted(file for file in files if any(fnmatch(file, pattern) for pattern in patterns))

    def origin(self, *patterns: str) -> dict[str, str]:
        """What identifies the bytes: repository and commit, or a folder's name and a sha256 over the matching files."""
        if self.revision is not None:
            return {"repo": self.name, "revision": self.revision}
        digest = hashlib.sha256()
        for file in self.matching(*patterns):
            with (self.folder / file).open("rb") as stream:
                digest.update(f"{file}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return {"folder": self.name, "sha256": digest.hexdigest()}


def fetch(
    name_or_path: str | Path,
    patterns: Sequence[str],
    *,
    weights: Sequence[Sequence[str]] = (),
    revision: str | None = None,
) -> ModelFiles:
    """The files that match `patterns` (globs over paths in the repository) of a folder or a hub repository.

    weights: alternatives, the best first, each one a group of patterns; just the first one that the repository holds is
        taken, so that a repository with several copies of its weights is downloaded once.

    What the cache holds is not downloaded again; with a commit as `revision` and a full cache no network is needed.
    A connection that breaks is taken up where it broke. After a run that was ended, the files that were complete are
    kept and the others begin again: the client of huggingface_hub 2 keeps no partial files.

    Raises:
        ModelFilesError: no such repository or revision, or none of the weights in it; a gated repository without
            access; no connection.
        ValueError: `revision` together with a folder, or a name that is neither a folder nor `owner/name`.
    """
    files = _fetch(name_or_path, patterns, revision)
    if not weights:
        return files
    for group in weights:
        if files.revision is not None:  # the listing of a commit is kept, so that another group costs no request
            _fetch_hub(files.name, [*patterns, *group], files.revision)
        if found := files.matching(*group):
            return replace(files, weights=tuple(found))
    raise ModelFilesError(
        f"{name_or_path}{f' at {files.revision}' if files.revision else ''} holds no weights; expected one of "
        + ", ".join(group[0] for group in weights)
    )


def new_folder(path: str | Path) -> Path:
    """Make a folder to save a model in, so that nothing is overwritten and no older file is taken for a part of it.

    Raises:
        FileExistsError: there is something in it.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_loaded(what: str, files: ModelFiles, missing: Sequence[str]) -> None:
    """Refuses a model of which a part would be random, which its library but warns of.

    Raises:
        ModelFilesError: there are missing weights.
    """
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelFilesError(f"{what}: {files.weights[0]} lacks {len(missing)} of its model's weights: {some}")


def _fetch(name_or_path: str | Path, patterns: Sequence[str], revision: str | None) -> ModelFiles:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} was given with the folder {folder}: a folder has no revisions")
        return ModelFiles(folder, folder.resolve().name, None)
    repo = str(name_or_path)
    if not _REPO_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is neither an existing folder nor a hub repository id like 'owner/name'")
    return _fetch_hub(repo, patterns, revision)


def _fetch_hub(repo: str, patterns: Sequence[str], revision: str | None) -> ModelFiles:
    from huggingface_hub import errors, snapshot_download

    try:
        commit = _commit(repo, revision) if revision and _BEGINNING.fullmatch(revision) else revision
        snapshot = Path(snapshot_download(repo, revision=commit, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise ModelFilesError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login` or set "
            "HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelFilesError(
            f"the hub has no repository {repo} (or it is private and no token with access is set): check the name, "
            "or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelFilesError(f"{repo} has no revision {revision!r}: give a branch, a tag or a commit hash") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelFilesError(
            f"cannot download {repo} at revision {revision or 'main'}, and the cache does not hold it: "
            + reason[0].removeprefix("Got: ")
        ) from error
    return ModelFiles(snapshot, repo, snapshot.name)


def _commit(repo: str, beginning: str) -> str:
    """The hash that begins so, of the commits in the cache, else of those on `main`; if there is none, what was given.

    The hub itself takes nothing but whole hashes.
    """
    from huggingface_hub import HfApi, constants

    snapshots = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
    found = [folder.name for folder in snapshots.glob(f"{beginning}*")]
    found = found or [c.commit_id for c in HfApi().list_repo_commits(repo) if c.commit_id.startswith(beginning)]
    return found[0] if len(found) == 1 else beginning
