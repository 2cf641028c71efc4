"""Check that a storage lets exactly one of two writers win: all of a corpus rests on it.

The contract: docs/reference/corpus.md, section 1.
"""

from collections.abc import Sequence
from typing import Protocol

from microdit.pipeline.base.errors import RequestError

ASKED = "asked to write only where nothing is (on S3 a PUT with If-None-Match: *), this storage failed"
ADVICE = (
    "Two builds would destroy each other's work; use a storage that can: Amazon S3, Google Cloud Storage, Azure, a "
    "recent MinIO, Ceph or R2, or a folder"
)


class ExclusiveStore(Protocol):
    """The part of a store that is checked."""

    url: str

    def create(self, name: str, data: bytes) -> None:
        """Write an object if and only if the name is free."""

    def get(self, name: str) -> bytes:
        """Read an object."""

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects."""


def check_exclusive(store: ExclusiveStore, name: str) -> None:
    """Write the object `name` twice, with different bytes, and remove it: the second writer must be refused.

    Raises:
        RequestError: it was not, or the first one's bytes are gone.
    """
    store.create(name, b"first")
    try:
        store.create(name, b"second")
    except FileExistsError:
        refused = True
    else:
        refused = False
    kept = store.get(name) == b"first"
    store.delete([name])
    if not (refused and kept):
        what = "it overwrote an object" if not kept else "it answered that it wrote an object, and did not"
        raise RequestError(f"corpus {store.url}: {ASKED}: {what}. {ADVICE}")
