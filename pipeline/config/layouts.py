"""Options of the layouts that people have: tars, parquet files, folders, JSON lines, TFRecords."""

from typing import Literal

from pydantic import Field, model_validator

from microdit.pipeline.config.block import FieldError
from microdit.pipeline.config.files import CaptionChoice, MappedOptions, text_member


def check_members(options: MappedOptions) -> None:
    """Refuse a caption or a field that is neither an extension nor a field of a json."""
    for option, path in options.paths().items():
        if not text_member(path)[0]:
            first, _, rest = option.partition(".")
            or_nothing = "json.FIELD or nothing" if option == "caption" else "or json.FIELD"
            expected = f"expected an extension such as txt, {or_nothing}"
            raise FieldError((first, rest) if rest else (first,), expected, path)


class WebdatasetSource(MappedOptions):
    """Tars of images with their texts beside them: members that share a name up to its first dot are a sample."""

    adapter: Literal["webdataset"]
    image: list[str] = Field(default=[])
    """Extensions of the image, of which the first that a sample has is taken; by default all formats that are read."""
    caption: str | list[CaptionChoice] = "txt"
    """The extension of the text (`txt`, `cap`, `output.txt`), or `json.FIELD` for a field of the json member, or empty
    for none; or several (see `MappedOptions`)."""
    keys: Literal["number", "member"] = "number"
    """A sample's key: the numbers of file and sample, which are always unique; or the name of its members, with the
    file's number in front if names begin again in each file."""

    @model_validator(mode="after")
    def _check_members(self) -> "WebdatasetSource":
        for number, extension in enumerate(self.image):
            if extension != extension.strip("./ \t") or not extension:
                raise FieldError(("image", number), "expected an extension such as jpg", extension)
        check_members(self)
        return self


class ParquetSource(MappedOptions):
    """Parquet files with images inside."""

    adapter: Literal["parquet"]
    image: str | None = None
    """The column with the image: bytes, or a struct of bytes and path; by default the only such column."""
    caption: str | list[CaptionChoice] = ""
    """The column with the caption, dotted inside of structs; empty for none; or several (see `MappedOptions`)."""
    key: str | None = None
    """The column with a sample's key; by default the numbers of file and row."""

    @model_validator(mode="after")
    def _check_joins(self) -> "ParquetSource":
        for number, join in enumerate(self.joins):
            if join.by == "key" and self.key is None:
                raise FieldError(
                    ("joins", number, "by"), "there is no key to look up; give key, or by: origin", join.by
                )
        return self


class FolderSource(MappedOptions):
    """A folder of pictures, nested or not, with their texts beside them or in one table."""

    adapter: Literal["folder"]
    files: str
    """The folder, here, in a bucket or on the hub (`hf://datasets/OWNER/NAME/FOLDER`); all pictures below are taken."""
    caption: str | list[CaptionChoice] = "txt"
    """The extension of the text beside a picture (`7.txt` of `7.jpg`), or `json.FIELD`, or `joined.NAME` of a table
    that is joined by the picture's path below the folder (`by: origin`) or its name without the extension."""
    unit_inputs: int = Field(default=2048, ge=1, le=65536)
    """Pictures of one folder that are read as a unit."""

    @model_validator(mode="after")
    def _check_texts(self) -> "FolderSource":
        check_members(self)
        return self


class JsonlSource(MappedOptions):
    """JSON lines, or a json with a list of objects, with pictures inside of them as base64, or beside them as files."""

    adapter: Literal["jsonl"]
    image: str = "image"
    """The field with the picture, dotted inside of objects: base64, a `data:` URL, or a path."""
    root: str | None = None
    """The folder that paths are seen from; by default that of the file."""
    caption: str | list[CaptionChoice] = "caption"
    """The field with the caption, dotted inside of objects; or several (see `MappedOptions`)."""
    key: str | None = None
    """The field with a sample's key; by default the numbers of file and line."""


class TfrecordSource(MappedOptions):
    """TFRecord files of `tf.Example`, plain or compressed with gzip."""

    adapter: Literal["tfrecord"]
    image: str = "image"
    """The feature with the picture's bytes."""
    caption: str | list[CaptionChoice] = "caption"
    """The feature with the caption; or several (see `MappedOptions`)."""
    key: str | None = None
    """The feature with a sample's key; by default the numbers of file and record."""
