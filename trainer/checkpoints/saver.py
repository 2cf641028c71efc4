"""The checkpoints of a run: the newest one found, new ones written while the run goes on, old ones removed."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from microdit.model.checkpoint import CheckpointError
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.storage.store import open_store
from microdit.trainer.checkpoints.bucket import BucketCheckpoints
from microdit.trainer.checkpoints.contents import Checkpoint, TensorSnapshot
from microdit.trainer.checkpoints.folder import FolderCheckpoints
from microdit.trainer.processes import Team
from microdit.trainer.recipe import Recipe

Checkpoints: TypeAlias = FolderCheckpoints | BucketCheckpoints
UNREADABLE = (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError)  # what a damaged one raises


def open_checkpoints(recipe: Recipe) -> Checkpoints:
    """Open the folder or the bucket that a recipe's checkpoints go to.

    Raises:
        RequestError: `checkpoints` is no folder, and of no known kind of bucket.
    """
    if recipe.checkpoints is None:
        return FolderCheckpoints(recipe.out / "checkpoints")
    try:
        store = open_store(recipe.checkpoints)
    except RequestError as error:
        raise RequestError(str(error).replace("corpus ", "checkpoints = ", 1)) from error
    return BucketCheckpoints(store, recipe.out) if store.root is None else FolderCheckpoints(store.root)


def load_latest(
    checkpoints: Checkpoints, say: Callable[[str], None], team: Team, resume: bool = True
) -> Checkpoint | None:
    """Read the newest checkpoint that can be read, as the first process sees it; the others get an outline.

    `say` is called with a message for each that cannot be read. None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
        RequestError: there are some, and `resume` is false.
    """

    def find() -> Checkpoint | None:
        try:
            names = checkpoints.names()
        except OSError as error:
            raise CheckpointError(f"checkpoints in {checkpoints} cannot be listed: {error}") from error
        if names and not resume:
            raise RequestError(
                f"there are checkpoints in {checkpoints}: take another folder, or go on with --resume auto"
            )
        for name in names:
            try:
                return checkpoints.read(name)
            except UNREADABLE as error:
                say(f"checkpoint {checkpoints}/{name} cannot be read and is passed over: {error}")
        if names:
            raise CheckpointError(
                f"none of the {len(names)} checkpoints in {checkpoints} can be read: give another folder"
            )
        return None

    return team.from_first(find)


class Saver:
    """Writes checkpoints in a thread, one after the other, while the run goes on.

    One that cannot be written (a full disk, a bucket that fails) is reported by `say`, and the run goes on: the last
    good one stays. At the end there is nobody to go on: `finish` raises. keep, keep_hours: as in `superfluous`.
    """

    def __init__(self, checkpoints: Checkpoints, keep: int, keep_hours: float | None, say: Callable[[str], None]):
        self.checkpoints, self.keep, self.keep_hours, self.say = checkpoints, keep, keep_hours, say
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._step, self._failing = 0, False
        self.saved = -1  # the last step that was written

    def settle(self) -> None:
        """Wait for the one before: the memory holds one copy at a time."""
        try:
            self.finish()
            self._failing = False
        except CheckpointError as error:
            if not self._failing:
                self.say(f"{error}; the run goes on and tries again with the next one, and the one before it stays")
            self._failing = True

    def save(
        self, step: int, tensors: TensorSnapshot, state: Mapping[str, Any], generate: Mapping[str, Any],
        remove: bool = True,
    ) -> None:  # fmt: skip
        """Begin to write; after `settle`. remove: those before that are not to be kept."""
        self._step = step
        self._writing = self._pool.submit(self._write, remove, step, tensors, state, generate)

    def _write(self, remove: bool, step: int, *contents: Any) -> None:
        self.checkpoints.write(step, *contents)
        try:
            if not remove:
                return
            names = self.checkpoints.names()
            hours = [self._hours(name) if self.keep_hours else None for name in names]
            for i in superfluous(hours, self.keep, self.keep_hours):
                self.checkpoints.remove(names[i])
            self.checkpoints.sweep()
        except (OSError, ValueError, KeyError) as error:
            self.say(f"step {step}: not all that is left of older checkpoints could be removed: {error}")

    def _hours(self, name: str) -> float | None:
        """Read how long the run had trained before a checkpoint; None where it does not say."""
        try:
            return float(self.checkpoints.state(name)["progress"]["seconds"]) / 3600
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
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
                self.saved = self._step
        except OSError as error:
            raise CheckpointError(f"the checkpoint of step {self._step} cannot be written: {error}") from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()


def superfluous(hours: Sequence[float | None], keep: int, keep_hours: float | None) -> list[int]:
    """Choose the checkpoints to remove: all but the newest `keep`, and the last one of every `keep_hours` of training.

    hours: of training before each of them, the newest first; None where it is not known.
    """
    parts = [None if keep_hours is None or h is None else int(h // keep_hours) for h in hours]
    return [i for i in range(keep, len(parts)) if parts[i] is None or parts[i] in parts[:i]]
