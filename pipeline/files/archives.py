"""Read the members of untrusted tars and zips: streamed, every size bounded, names never used as paths.

A member that cannot be read has a reason instead of bytes: `too_large`, `not_a_file` (a link, a device), `encrypted`,
`unsupported`, `damaged_member`, `bomb`. Where the archive is damaged and nothing further can be read, the last member
has no name and the reason `damaged_archive`; those before it count. Only errors of this machine's disk are exceptions.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from microdit.pipeline.files.tars import BLOCK, Member, is_tar, tar_members
from microdit.pipeline.files.zips import is_zip, zip_members


def members(path: Path, wanted: Callable[[str], bool], max_bytes: int) -> Iterator[Member]:
    """Read the members of a tar, compressed or not, or of a zip, recognised by their first bytes.

    Args:
        wanted: predicate on names; other members are skipped.
        max_bytes: of a member; a longer one fails with `too_large`.
    """
    with path.open("rb") as file:
        zipped = not is_tar(file.read(BLOCK)) and is_zip(file)
    return (zip_members if zipped else tar_members)(
        path, lambda name: not is_of_macos(name) and wanted(name), max_bytes
    )


def is_of_macos(name: str) -> bool:
    """Tell what macOS adds to archives, beside every file, under the file's own extension."""
    return name.rpartition("/")[2].startswith("._") or "__MACOSX/" in name


def stem(name: str) -> tuple[str, str]:
    """Split a member's base name at its first dot, as webdataset does; the extension in lower case."""
    base, _, extension = name.rpartition("/")[2].partition(".")
    return base, extension.lower()
