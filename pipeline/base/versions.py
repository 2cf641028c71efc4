"""Name the software that makes a corpus' numbers: a mix of it under one fingerprint would go unseen."""

import hashlib
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("microdit", "torch", "transformers", "diffusers")


@cache
def versions() -> dict[str, str]:
    """Return the versions that are installed, and `code`: a hash of this package's own modules."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"code": _code()}


def differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """List in words how another machine's versions differ. Builds of one version (`+cpu`, `+cu128`) are equal."""
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name, "none"), theirs.get(name, "none")
        if mine.partition("+")[0] != other.partition("+")[0]:
            lines.append(f"{name} {other} there, {mine} here")
    return lines


def _code() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for path in sorted(Path(folder, name) for name in names if name.endswith(".py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
