"""Make one file of an archive that is split (`gen.tar.gz.00`, `gen.tar.gz.01`), in listings and to be read."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.remote_file import Listing, RemoteFile, digest, listing
from microdit.pipeline.files.scratch import make_scratch

PART = re.compile(
    r"(.+\.(?:tgz|zip|tar(?:\.(?:gz|bz2|xz|zst))?))[.-](?:part[-_.]?)?([0-9]{1,4}|[a-z]{2})", re.IGNORECASE
)
PREFIX = "microdit-parts-"
BLOCK = 4 << 20


def with_parts_joined(found: Listing, what: str) -> Listing:
    """Make one file of those that an archive was split into; a listing without such files stays as it is.

    Raises:
        RequestError: a part is absent; `what` is the field of the config.
    """
    parts: dict[str, list[tuple[str, RemoteFile]]] = {}
    whole = []
    for file in found.files:
        match = PART.fullmatch(file.name)
        if match is None or match[2].lower() in ("gz", "xz"):
            whole.append(file)
        else:
            parts.setdefault(match[1], []).append((match[2], file))
    if not parts:
        return found
    for name, pieces in parts.items():
        _check_order(name, [number for number, _ in pieces], what)
        files = tuple(file for _, file in pieces)
        sizes = [file.size for file in files]
        size = None if None in sizes else sum(size or 0 for size in sizes)
        etag = digest((file.name, file.size, file.etag) for file in files)
        whole.append(RemoteFile(name, files[0].url, size, etag, files))
    return listing(whole, found.identity)


def _check_order(name: str, numbers: list[str], what: str) -> None:
    """Refuse parts that are not consecutive; that the last ones are there the archive itself tells."""
    places = [int(number) if number.isdigit() else _of_letters(number) for number in numbers]
    first = 1 if places[0] == 1 else 0
    if places != list(range(first, first + len(places))):
        raise RequestError(
            f"{what}: of the parts of {name} some are absent: there are {', '.join(numbers[:20])}; get the others too"
        )


def _of_letters(letters: str) -> int:
    """Compute the number of the endings of `split`: aa, ab, ..."""
    first, second = (ord(letter) - ord("a") for letter in letters.lower())
    return 26 * first + second


@contextmanager
def joined_copy(file: RemoteFile, scratch: Path) -> Iterator[Path]:
    """Yield the path of a file on this machine, as `local_copy`; of one in parts that of a copy in one piece.

    Each part is removed when it is in the copy, so the disk holds the whole file and one part.
    """
    if not file.parts:
        with local_copy(file, scratch) as path:
            yield path
        return
    make_scratch(scratch)
    with TemporaryDirectory(dir=scratch, prefix=PREFIX) as folder:
        whole = Path(folder) / "whole"
        with whole.open("wb") as to:
            for part in file.parts:
                with local_copy(part, scratch) as path, path.open("rb") as of:
                    while block := of.read(BLOCK):
                        alive()
                        to.write(block)
        yield whole
