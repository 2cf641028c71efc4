"""Keep the features of pictures on disk, by the hash of everything that they depend on."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

MOST_BYTES = 4 << 30  # of all files; the ones that were used longest ago are removed


def cached_features(folder: Path, *depends_on: object) -> np.ndarray | None:
    """Read the features (N, D) that were kept for these values; None if there are none."""
    path = _path(folder, depends_on)
    try:
        features = np.load(path, allow_pickle=False)
        path.touch()
    except (OSError, ValueError, EOFError):
        return None
    return features if features.ndim == 2 else None


def keep_features(folder: Path, features: np.ndarray, *depends_on: object) -> None:
    """Keep features, and remove old ones beyond `MOST_BYTES`; a full disk keeps none."""
    path = _path(folder, depends_on)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, features)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        return
    room = MOST_BYTES
    for each in sorted(folder.glob("*.npy"), key=lambda each: each.stat().st_mtime, reverse=True):
        room -= each.stat().st_size
        if room < 0:
            with suppress(OSError):
                each.unlink()


def _path(folder: Path, depends_on: tuple[object, ...]) -> Path:
    return folder / f"{hashlib.sha256(repr(depends_on).encode()).hexdigest()}.npy"
