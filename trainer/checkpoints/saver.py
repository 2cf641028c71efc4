"""Where checkpoints lie and how they get there: in a folder, or on a bucket (`bucket.py`); whole ones only.

FOLDER/step-00001200/model.safetensors ...        written as step-00001200.partial, synced, and renamed
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from microdit.model.checkpoint import CheckpointError
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.storage.store import open_store
from microdit.trainer.checkpoints.bucket import Bucket
from microdit.trainer.checkpoints.contents import Checkpoint, Snapshot, hours_of, superfluous
from microdit.trainer.checkpoints.folder import Folder
from microdit.trainer.processes import Team
from microdit.trainer.recipe import Recipe

Place: TypeAlias = Folder | Bucket


def open_place(recipe: Recipe) -> Place:
    """Where the checkpoints of a run go.

    Raises:
        RequestError: `checkpoints` is no folder, and of no known kind of bucket.
    """
    if recipe.checkpoints is None:
        return Folder(recipe.out / "checkpoints")
    try:
        store = open_store(recipe.checkpoints)
    except RequestError as error:
        raise RequestError(str(error).replace("corpus ", "checkpoints = ", 1)) from error
    return Bucket(store, recipe.out) if store.root is None else Folder(store.root)


def load_latest(place: Place, tell: Callable[[str], None], team: Team, resume: bool = True) -> Checkpoint | None:
    """The newest checkpoint that can be read, as the first process sees it; the others get its outline.

    `tell` hears of those that cannot be read. None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
        RequestError: there are some, and `resume` is false.
    """
    own: Checkpoint | None = None

    def find() -> Checkpoint | None:
        nonlocal own
        try:
            names = place.names()
        except OSError as error:
            raise CheckpointError(f"checkpoints in {place} cannot be listed: {error}") from error
        if names and not resume:
            raise RequestError(f"there are checkpoints in {place}: take another place, or go on with --resume auto")
        for name in names:
            try:
                own = place.read(name)
                return own.outline()
            except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                tell(f"checkpoint {place}/{name} cannot be read and is passed over: {error}")
        if names:
            raise CheckpointError(f"none of the {len(names)} checkpoints in {place} can be read: give another place")
        return None

    outline = team.from_first(find)
    return outline if own is None else own


class Saver:
    """Writes checkpoints in a thread, one after the other, while the run goes on.

    One that cannot be written (a full disk, a bucket that fails) is told to `tell`, and the run goes on: the last good
    one stays. At the end there is nobody to go on: `finish` raises. keep, keep_hours: as in `superfluous`.
    """

    def __init__(self, place: Place, keep: int, keep_hours: float | None, tell: Callable[[str], None]):
        self.place, self.keep, self.keep_hours, self.tell = place, keep, keep_hours, tell
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._step = 0

    def settle(self) -> None:
        """Wait for the one before: the memory holds one copy at a time."""
        try:
            self.finish()
        except CheckpointError as error:
            self.tell(f"{error}; the run goes on, and the checkpoint before it stays")

    def save(self, step: int, tensors: Snapshot, state: Mapping[str, Any], generate: Mapping[str, Any]) -> None:
        """Begin to write; after `settle`."""
        self._step = step
        self._writing = self._pool.submit(self._write, step, tensors, state, generate)

    def _write(self, step: int, tensors: Snapshot, state: Mapping[str, Any], generate: Mapping[str, Any]) -> None:
        self.place.write(step, tensors, state, generate)
        try:
            names = self.place.names()
            hours = [self._hours(name) for name in names] if self.keep_hours else [None] * len(names)
            for i in superfluous(hours, self.keep, self.keep_hours):
                self.place.remove(names[i])
            self.place.sweep()
        except (OSError, ValueError, KeyError) as error:
            self.tell(f"step {step}: not all that is left of older checkpoints could be removed: {error}")

    def _hours(self, name: str) -> float | None:
        try:
            return hours_of(self.place.state(name))
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None

    def finish(self) -> None:
        """Wait until what was begun is written.

        Raises:
            CheckpointError: it cannot be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            raise CheckpointError(f"the checkpoint of step {self._step} cannot be written: {error}") from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()
