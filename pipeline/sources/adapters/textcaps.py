"""`textcaps`: TextCaps' images, one zip for all splits, and its captions, five to an image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import TextcapsSource
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSource, Sample
from microdit.pipeline.sources.members import failed, is_image, one_line

LICENSE = "CC-BY-4.0"


class Textcaps(FileSource):
    """The adapter `textcaps`. Samples have the image ids; the caption is the first one, fields are `caption_1` to
    `caption_5`, and `split`."""

    adapter = "textcaps"

    def __init__(self, name: str, options: TextcapsSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self._captions: list[Listing] = []
        self.license = options.license or LICENSE
        self.terms = f"TextCaps: {LICENSE}, name its authors; the photos are OpenImages' (https://textvqa.org/textcaps)"

    def listing(self) -> Listing:
        pattern, what = self._options.captions, f"sources.{self.name}.captions"
        self._captions = [list_files(pattern.replace("{split}", split), what) for split in self._options.splits]
        return list_files(self._options.images, f"sources.{self.name}.images")

    def details(self) -> dict[str, Any]:
        return {"splits": self._options.splits, "captions": [found.identity for found in self._captions]}

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[Sample]:
        captions: dict[str, tuple[str, list[str]]] = {}
        split: str
        for split, found in zip(self._options.splits, self._captions, strict=True):
            for each in found.files:
                with local_copy(each, self._scratch) as copy:
                    for image, texts in read_captions(copy, f"sources.{self.name}.captions").items():
                        captions.setdefault(image, (split, texts))
        met = set()
        for member in members(path, lambda name: is_image(name) and stem(name)[0] in captions, MAX_BYTES):
            key = stem(member.name)[0]
            met.add(key)
            if member.data is None:
                yield failed(member, key)
                continue
            split, texts = captions[key]
            fields = {f"caption_{i}": text for i, text in enumerate(texts, 1)}
            yield Sample(key, member.data, texts[0], member.name, {**fields, "split": split})
        if len(self._listing.files) == 1:  # of several zips none has all images
            for key in captions:
                if key not in met:
                    yield Sample(key, None, reason="missing", detail="the captions name it, the zip lacks it")


def read_captions(path: Path, what: str) -> dict[str, list[str]]:
    """Captions by image id; the file has an entry for each caption, which repeats all of its image.

    Raises:
        RequestError: it is no such file.
    """
    found: dict[str, list[str]] = {}

    def entry(value: dict[str, Any]) -> Any:
        """Of an entry only what is needed: its lists of words are the larger part."""
        if "image_id" not in value:
            return value
        texts = [text for each in value.get("reference_strs") or () if (text := one_line(each))]
        known = found.setdefault(str(value["image_id"]), texts)
        if not texts and (text := one_line(value.get("caption_str"))):
            known.append(text)
        return None

    try:
        tree = json.loads(path.read_bytes(), object_hook=entry)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what}: {path.name} cannot be read as JSON: {error}") from None
    found = {image: texts for image, texts in found.items() if texts}
    if not isinstance(tree, dict) or "data" not in tree or not found:
        raise RequestError(f'{what}: {path.name} is no file of TextCaps: expected {{"data": [{{"image_id": ...}}]}}')
    return found
