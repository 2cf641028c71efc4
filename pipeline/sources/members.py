"""What the adapters of archives share: members of one sample side by side, and samples of members without bytes."""

from collections.abc import Iterable, Iterator

from microdit.pipeline.files.archives import stem
from microdit.pipeline.files.tars import Member
from microdit.pipeline.sources.file_source import Sample

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp")


def is_image(name: str) -> bool:
    """Whether a member is called like an image; what it really is shows when it is decoded."""
    return stem(name)[1] in IMAGES


def grouped(members: Iterable[Member]) -> Iterator[tuple[str, Member, dict[str, Member]]]:
    """Neighbours whose names differ in the extension only: their name without it, the image, the others by extension.

    A member that tells that the archive ends here is an image of no name. Texts without an image are passed over. A
    name that comes twice begins another sample.
    """
    base, group = "", dict[str, Member]()

    def sample() -> Iterator[tuple[str, Member, dict[str, Member]]]:
        if (found := next((extension for extension in IMAGES if extension in group), None)) is not None:
            others = {extension: member for extension, member in group.items() if extension != found}
            yield base.rpartition("/")[2], group[found], others

    for member in members:
        if member.reason == "damaged_archive":
            yield from sample()
            yield "", member, {}
            group = {}
            continue
        name, extension = whole_stem(member.name), stem(member.name)[1]
        if group and (name != base or extension in group):
            yield from sample()
            group = {}
        base = name
        group[extension] = member
    yield from sample()


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
