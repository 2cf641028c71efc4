"""Model files: a folder on this machine, or one commit of a Hugging Face Hub repository.

Both come back as a folder that holds the wanted files, with an `origin` that says which bytes they are. A branch, a tag
or the beginning of a hash is resolved to its commit before anything is downloaded, so that "main" is never what a
corpus remembers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from microdit.model.pretrained.config_bounds import check_config, check_size
from microdit.model.strict_json import read_json

Fingerprint = dict[str, Any]  # JSON that identifies a model's numbers; a column's declaration holds it
ModelConfig = dict[str, Any]  # JSON of a model's own config files

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
        """List the files that match any of the globs, sorted, as POSIX paths relative to the folder."""
        files = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return sorted(file for file in files if any(fnmatch(file, pattern) for pattern in patterns))

    def origin(self, *patterns: str) -> dict[str, str]:
        """Identify the bytes: by repository and commit, or by a folder's name and a sha256 over the matching files."""
        if self.revision is not None:
            return {"repo": self.name, "revision": self.revision}
        digest = hashlib.sha256()
        for file in self.matching(*patterns):
            with (self.folder / file).open("rb") as stream:
                digest.update(f"{file}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return {"folder": self.name, "sha256": digest.hexdigest()}

    def read_json(self, file: str) -> ModelConfig:
        """Read the object in a JSON file.

        Raises:
            ModelFilesError: it holds none.
        """
        try:
            config = read_json(self.folder / file)
        except ValueError as error:
            raise self.damaged(file, error) from error
        if not isinstance(config, dict):
            raise self.damaged(file, ValueError("it is no JSON object"))
        if Path(file).name.endswith("config.json"):
            try:
                check_config(config)
            except ValueError as error:
                raise self.damaged(file, error) from error
        return config

    def check_size(self, build: Callable[[], Any]) -> None:
        """Refuse a config that describes a larger model than the files of weights can hold.

        build: makes the model; called on the meta device.

        Raises:
            ModelFilesError: it does, or it describes none.
        """
        size = sum((self.folder / file).stat().st_size for file in self.weights)
        try:
            check_size(build, size)
        except ValueError as error:
            raise self.damaged("its config", error) from error

    def damaged(self, file: str, error: Exception) -> ModelFilesError:
        """Make the error for a file that cannot be read."""
        if _wants_code(error):
            return self._with_code()
        return ModelFilesError(f"{self.name}: {file} is damaged ({reason(error)}); {self._remedy()}")

    @contextmanager
    def own_code_refused(self) -> Iterator[None]:
        """Refuse files that name Python code of their own, where transformers itself has no such class.

        Instead of a tokenizer's own class transformers would take a general one without a word: other tokens.

        Raises:
            ModelFilesError: they do.
        """
        import transformers

        tokenizer = self.read_json("tokenizer_config.json") if self.matching("tokenizer_config.json") else {}
        if "auto_map" in tokenizer and not hasattr(
            transformers, str(tokenizer.get("tokenizer_class", "AutoTokenizer"))
        ):
            raise self._with_code()
        try:
            yield
        except ValueError as error:
            if not _wants_code(error):
                raise
            raise self._with_code() from None

    def _with_code(self) -> ModelFilesError:
        named = [file for file in self.matching("*config.json") if "auto_map" in self.read_json(file)]
        return ModelFilesError(
            f"{self.name}: {' and '.join(named) or 'its config'} names Python code of its own (auto_map), which is "
            "never run here; take a model whose class transformers itself has"
        )

    def check_loaded(self, missing: Sequence[str]) -> None:
        """Refuse a model of which some weights would be random, of which its library only warns.

        Raises:
            ModelFilesError: there are missing weights.
        """
        if missing:
            some = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
            lacks = f"{self.weights[0]} lacks {len(missing)} of its model's weights: {some}"
            raise ModelFilesError(f"{self.name}: {lacks}; {self._remedy()}")

    def _remedy(self) -> str:
        if self.revision is None:
            return f"put a whole copy into {self.folder}"
        return f"remove {self.folder.parent.parent}, and it is downloaded again"


def fetch(
    name_or_path: str | Path,
    patterns: Sequence[str],
    *,
    weights: Sequence[Sequence[str]] = (),
    revision: str | None = None,
) -> ModelFiles:
    """Fetch the files that match `patterns` (globs over paths in the repository) of a folder or a hub repository.

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
        if matching := files.matching(*group):
            return replace(files, weights=tuple(matching))
    raise ModelFilesError(
        f"{name_or_path}{f' at {files.revision}' if files.revision else ''} holds no weights; expected one of "
        + ", ".join(group[0] for group in weights)
    )


def require(files: ModelFiles, *needed: Sequence[str], weights: Sequence[Sequence[str]]) -> None:
    """Refuse a model that lacks files, before any of its weights is downloaded.

    Checks the folder; of a repository the cache, and if that is not enough the hub's list of the commit's files.
    Nothing is downloaded but the index of weights in several files.

    needed: groups of patterns; of each group one file has to be there.
    weights: alternatives, as in `fetch`. The first one of which anything is there has to be whole: its index and all
        files that this names.

    Raises:
        ModelFilesError: something is missing; the message names all of it.
    """
    if not (lacks := _lacking(files, files.matching("*"), needed, weights)):
        return
    if files.revision is None:
        raise ModelFilesError(f"{files.name} lacks {', '.join(lacks)}; {files._remedy()}")
    from huggingface_hub import HfApi, errors

    what = f"{files.name} at {files.revision}"
    try:
        lacks = _lacking(files, HfApi().list_repo_files(files.name, revision=files.revision), needed, weights)
    except (errors.HTTPError, OSError) as error:  # no connection, or HF_HUB_OFFLINE
        here = f"the cache lacks {', '.join(lacks)} of {what}"
        raise ModelFilesError(f"{here}, and the hub cannot be asked for it: {reason(error)}") from error
    if lacks:
        raise ModelFilesError(f"{what} lacks {', '.join(lacks)}: give another revision or repository")


def _lacking(
    files: ModelFiles, there: Sequence[str], needed: Sequence[Sequence[str]], weights: Sequence[Sequence[str]]
) -> list[str]:
    """Name what is missing among the files `there`."""

    def some(patterns: Sequence[str]) -> bool:
        return any(fnmatch(file, pattern) for pattern in patterns for file in there)

    lacks = [" or ".join(group) for group in needed if not some(group)]
    chosen = next((group for group in weights if some(group)), None)
    if chosen is None:
        return [*lacks, "weights (" + " or ".join(group[0] for group in weights) + ")"]
    index = chosen[0]
    if not index.endswith(".index.json"):
        return lacks
    if index not in there:
        return [*lacks, index]
    if files.revision is not None:
        _fetch_hub(files.name, [index], files.revision)
    parts = files.read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise files.damaged(index, ValueError("it has no weight_map from names to files"))
    folder = index.rpartition("/")[0]
    named = sorted({f"{folder}/{part}" if folder else part for part in parts.values()})
    return [*lacks, *(part for part in named if part not in there)]


def new_folder(path: str | Path) -> Path:
    """Make an empty folder to save a model in: no file is overwritten, and no older one is taken for a part of it.

    Raises:
        FileExistsError: there is something in it.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _wants_code(error: Exception) -> bool:
    """Recognise transformers' refusal to run code of a model's own folder."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def file_sha256(file: Path, what: str) -> str:
    """Hash a file of weights: 64 hexadecimal digits.

    Raises:
        ModelFilesError: it cannot be read; the message begins with `what`.
    """
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelFilesError(f"{what} {file}: {reason(error)}; give the path of the file") from error


def reason(error: Exception) -> str:
    """Say in one line why a file could not be read; without torch's advice, which is to unpickle it all the same."""
    if isinstance(error, UnpicklingError):
        return "something in it is no tensor"
    return (str(error).strip() or repr(error)).splitlines()[0]


def _fetch(name_or_path: str | Path, patterns: Sequence[str], revision: str | None) -> ModelFiles:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder, which has no revisions: leave out revision={revision!r}")
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
    """Complete the beginning of a hash, by the commits in the cache, else by those on `main`; else return it as it is.

    The hub itself takes nothing but whole hashes.

    Raises:
        HfHubHTTPError: the hub's answer is an error.
    """
    from huggingface_hub import HfApi, constants, errors

    snapshots = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
    commits = [folder.name for folder in snapshots.glob(f"{beginning}*")]
    try:
        commits = commits or [c.commit_id for c in HfApi().list_repo_commits(repo) if c.commit_id.startswith(beginning)]
    except errors.HfHubHTTPError:
        raise
    except Exception:  # the HTTP library's, which is another one in other versions: nothing answers
        return beginning  # the cache may know a branch of this name; if not, whoever downloads it says so
    return commits[0] if len(commits) == 1 else beginning
