"""Read images and texts of archives' members, for the adapters of archives."""

from collections.abc import Mapping

from microdit.pipeline.content.text_bytes import NotTextError, checked_text, decode_text
from microdit.pipeline.files.archives import stem
from microdit.pipeline.files.tars import Member
from microdit.pipeline.sources.file_source import FileSample

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")


NOT_TEXT = "not_text"
WHICH_IMAGES = (
    "They say which images of the zip are taken. Other captions of the same images are another column, as in "
    "captions/mine: {join: TABLE, by: key}"
)
"""Why a source's file of captions cannot be corrected, if images without one are no inputs."""


def is_image(name: str) -> bool:
    """Tell an image by the last extension of a member's name; its content is checked when it is decoded."""
    return extension_of(name) in IMAGES


def extension_of(name: str) -> str:
    """Return the last extension of a member's name: `jpg` of `22.05.jpg`."""
    return stem(name)[1].rpartition(".")[2]


def text_of(member: Member | None, name: str, faults: dict[str, str]) -> str:
    """Decode a text member onto one line; empty if there is none, or it is no text: `faults[name]` then says why."""
    if member is None or member.data is None:
        return ""
    try:
        return " ".join(decode_text(member.data).split())
    except NotTextError as error:
        faults[name] = str(error)
        return ""


def one_line(value: object, name: str = "", faults: dict[str, str] | None = None) -> str:
    """Put a caption of a table on one line; empty if it is no text. A text that is none is noted in `faults[name]`."""
    try:
        return " ".join(checked_text(value).split()) if isinstance(value, str) else ""
    except NotTextError as error:
        if faults is not None:
            faults[name] = str(error)
        return ""


def fault_fields(faults: Mapping[str, str]) -> dict[str, str]:
    """Make the field `not_text`, which tells a captions column why a sample lacks a text; none without faults."""
    text = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    return {NOT_TEXT: text} if text else {}


def failed(member: Member, key: str) -> FileSample:
    """Make the failed sample of a member without bytes."""
    return FileSample(key, None, origin=member.name, reason=member.reason or "missing", detail=member.detail)


def whole_stem(name: str) -> str:
    """Return what the names of one sample's members have in common: the folder, and the name up to its first dot."""
    folder, slash, base = name.rpartition("/")
    return folder.removeprefix("./") + slash + base.partition(".")[0]
