"""Small archives, and sources of them whose tables are dictionaries: what the tests of the named datasets share."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.sources import Input
from pipeline.sources.files import FileSource


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def empty(path: Path) -> Path:
    """A file that only has to be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def read_all(source: FileSource, *tables: Mapping[str, dict[str, Any]]) -> list[Input]:
    """All inputs, with these tables in the place of those that a build makes."""
    source._joined = list(tables)  # type: ignore[arg-type]
    return [item for unit in source.units() for item in source.read(unit, lambda ordinal: True)]


def by_key(source: FileSource, *tables: Mapping[str, dict[str, Any]]) -> dict[str, Input]:
    found = read_all(source, *tables)
    assert len({item.key for item in found}) == len(found)
    return {item.key: item for item in found}
