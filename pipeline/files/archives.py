"""Members of tars and zips that nobody vouches for: streamed, every size bounded, names never taken for paths.

What cannot be given is a member with a reason: `too_large`, `not_a_file` (a link, a device), `encrypted`,
`unsupported`, `damaged_member`, `bomb`. A place behind which nothing can be read gives a last member without a name,
`damaged_archive`, and what came before it counts. Only errors of this machine's disk are exceptions.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from microdit.pipeline.files.tars import BLOCK, Member, is_tar, tar_members
from microdit.pipeline.files.zips import is_zip, zip_members


def members(path: Path, wanted: Callable[[str], bool], max_bytes: int) -> Iterator[Member]:
    """The members of a tar, packed or not, or of a zip: the file's bytes tell which, not its name.

    Args:
        wanted: whether a name's bytes are asked for; other members are passed over.
        max_bytes: of a member; a longer one fails with `too_large`.
    """
    with path.open("rb") as file:
        zipped = not is_tar(file.read(BLOCK)) and is_zip(file)
    return (zip_members if zipped else tar_members)(path, wanted, max_bytes)


def stem(name: str) -> tuple[str, str]:
    """Webdataset's rule: the last part of a name up to its first dot, and the extension behind it, lower case."""
    base, _, extension = name.rpartition("/")[2].partition(".")
    return base, extension.lower()
