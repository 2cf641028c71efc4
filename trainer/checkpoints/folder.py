"""Checkpoints in a folder of this machine.

FOLDER/step-00001200/model.safetensors ...        written as step-00001200.partial, synced, and renamed
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from microdit.model.loading import checkpoint_folders
from microdit.pipeline.base.folder_lock import folder_lock
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.storage.disk import sync
from microdit.trainer.checkpoints import contents
from microdit.trainer.checkpoints.contents import Checkpoint, TensorSnapshot, folder_name


class FolderCheckpoints:
    """Checkpoints as folders below `root`."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def locked(self, say: Callable[[str], None]) -> Any:
        return folder_lock(self.root, "run")

    def names(self) -> list[str]:
        """List the checkpoints, the newest first."""
        return [folder.name for folder in checkpoint_folders(self.root)]

    def state(self, name: str) -> dict[str, Any]:
        return contents.parse_state((self.root / name / "state.json").read_bytes())

    def read(self, name: str) -> Checkpoint:
        folder, state = self.root / name, self.state(name)
        listed = [(folder / file, expected, file) for file, expected in state.get("files", {}).items()]
        list(threaded(lambda one: contents.check_file(*one), listed))
        return contents.read(folder, state, str(folder))

    def write(self, step: int, tensors: TensorSnapshot, state: Mapping[str, Any], generate: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, durable when this returns. A kill, or a full disk, leaves those before.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob("step-*.partial"):  # of a kill
            shutil.rmtree(left)
        final = self.root / folder_name(step)
        partial = self.root / f"{final.name}.partial"
        partial.mkdir()
        try:
            names = contents.file_names(tensors)
            for name in names:
                contents.write_file(partial / name, name, tensors, generate)
            files = dict(zip(names, threaded(lambda name: contents.listed(partial / name), names), strict=True))
            (partial / "state.json").write_text(contents.state_text(step, state, files))
            for path in (*partial.iterdir(), partial):
                sync(path)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if final.exists():  # of a run that went back to an older checkpoint because this one could not be read
            shutil.rmtree(final)
        partial.rename(final)
        sync(self.root)

    def remove(self, name: str) -> None:
        # renamed first, so that a kill leaves no half folder under a checkpoint's name
        shutil.rmtree((self.root / name).rename(self.root / f"{name}.partial"))

    def sweep(self) -> None:
        """Do nothing: `write` removes what kills left."""
