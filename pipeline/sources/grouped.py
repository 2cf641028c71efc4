"""What the adapters of archives share: members of one sample side by side, and samples of members without bytes."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from pipeline.sources.archives import Member, stem
from pipeline.sources.files import Sample

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp")


def is_image(name: str) -> bool:
    """Whether a member is called like an image; what it really is shows when it is decoded."""
    return stem(name)[1] in IMAGES


def grouped(members: Iterable[Member]) -> Iterator[tuple[str, Member, dict[str, Member]]]:
    """Neighbours whose names differ in the extension only: their name without it, the image, the others by extension.

    A member that tells that the archive ends here is an image of no name. Texts without an image are passed over.
    """
    for (base, damaged), group in groupby(members, key=lambda m: (whole_stem(m.name), m.reason == "damaged_archive")):
        by_extension = {stem(member.name)[1]: member for member in group}
        if damaged:
            yield "", next(iter(by_extension.values())), {}
        elif (found := next((e for e in IMAGES if e in by_extension), None)) is not None:
            image = by_extension.pop(found)
            yield base.rpartition("/")[2], image, by_extension


def text_of(member: Member | None) -> str:
    """A text member's text on one line; empty if there is none."""
    return "" if member is None or member.data is None else " ".join(member.data.decode("utf-8", "replace").split())


def one_line(value: object) -> str:
    """A caption of a table on one line; empty if it is no text."""
    return " ".join(value.split()) if isinstance(value, str) else ""


def failed(member: Member, key: str) -> Sample:
    """The sample of a member that has no bytes."""
    return Sample(key, None, origin=member.name, reason=member.reason or "missing", detail=member.detail)


def whole_stem(name: str) -> str:
    """What the names of one sample's members have in common: the folder, and the name up to its first dot."""
    folder, slash, base = name.rpartition("/")
    return folder.removeprefix("./") + slash + base.partition(".")[0]
