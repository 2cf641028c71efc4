"""`tfrecord`: TFRecord files of `tf.Example` messages."""

from collections.abc import Iterator
from pathlib import Path

from microdit.pipeline.config.layouts import TfrecordSource
from microdit.pipeline.content.text_bytes import NotTextError, decode_text
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.files.tars import Member
from microdit.pipeline.files.tfrecords import Feature, parse_example, records
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample
from microdit.pipeline.sources.mapped_source import MappedSource
from microdit.pipeline.sources.members import failed

ROOM = 8 << 20  # bytes of a record beside its picture


class Tfrecord(MappedSource):
    """The adapter `tfrecord`. Fields: those of the options, and those of the joined tables.

    A record fails without a picture (`missing`), if it is no `tf.Example` (`bad_value`), or damaged.
    """

    adapter = "tfrecord"

    def __init__(self, name: str, options: TfrecordSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self.has_names = options.key is not None
        self._paths = options.paths() | ({"key": options.key} if options.key else {})

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        for record in records(path, MAX_BYTES + ROOM):
            yield self._sample(record, file) if record.data is not None else failed(record, "")

    def _sample(self, record: Member, file: RemoteFile) -> FileSample:
        origin, image = f"record-{record.name}", self._options.image
        try:
            features, names = parse_example(record.data or b"", {image, *self._paths.values()})
        except ValueError as error:
            return FileSample("", None, origin=origin, reason="bad_value", detail=str(error))
        faults: dict[str, str] = {}
        values = {}
        for option, name in self._paths.items():
            values[option] = _value(features.get(name), option.removeprefix("fields."), faults)
        key = str(values.pop("key", None) or "")
        caption, fields = self.caption_and_fields(values, file, key, key or origin, faults)
        data = features.get(image)
        if not isinstance(data, bytes) or not data:
            known = ", ".join(sorted(names))[:300]
            detail = f"its feature {image!r} is no picture" if image in names else f"it has no {image!r}, but {known}"
            return FileSample(key, None, caption, origin, fields, "missing", detail)
        if len(data) > MAX_BYTES:
            detail = f"{len(data)} bytes, at most {MAX_BYTES} are read"
            return FileSample(key, None, caption, origin, fields, "too_large", detail)
        return FileSample(key, data, caption, origin, fields)


def _value(feature: Feature, name: str, faults: dict[str, str]) -> object:
    """Decode the texts of a feature; what is none is noted in `faults[name]`."""
    try:
        if isinstance(feature, bytes):
            return decode_text(feature)
        if isinstance(feature, list):
            return [decode_text(value) if isinstance(value, bytes) else value for value in feature]
    except NotTextError as error:
        faults[name] = str(error)
        return None
    return feature
