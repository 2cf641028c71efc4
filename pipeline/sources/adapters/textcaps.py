"""`textcaps`: TextCaps' images, one zip for all splits, and its captions, five to an image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import TextcapsSource
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample, FileSource
from microdit.pipeline.sources.members import WHICH_IMAGES, failed, is_image, one_line

LICENSE = "CC-BY-4.0"


class Textcaps(FileSource):
    """The adapter `textcaps`.

    Keys are the image ids; the caption is the first one; fields: `caption_1` to `caption_5`, `split`.
    """

    adapter = "textcaps"
    fixed_options: ClassVar[dict[str, str]] = {"captions": WHICH_IMAGES}

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
        return {"splits": self._options.splits, "captions": [listing.identity for listing in self._captions]}

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        captions = self._read_captions()
        seen = set()
        for member in members(path, lambda name: is_image(name) and stem(name)[0] in captions, MAX_BYTES):
            key = stem(member.name)[0]
            seen.add(key)
            if member.data is None:
                yield failed(member, key)
                continue
            split, texts = captions[key]
            fields = {f"caption_{i}": text for i, text in enumerate(texts, 1)}
            yield FileSample(key, member.data, texts[0], member.name, {**fields, "split": split})
        if len(self._listing.files) == 1:  # of several zips none has all images
            for key in captions:
                if key not in seen:
                    yield FileSample(key, None, reason="missing", detail="the captions name it, the zip lacks it")

    def _read_captions(self) -> dict[str, tuple[str, list[str]]]:
        """Read the split and the captions of all images, by image id; the first split that has an image counts."""
        captions: dict[str, tuple[str, list[str]]] = {}
        for split, listing in zip(self._options.splits, self._captions, strict=True):
            for file in listing.files:
                with local_copy(file, self._scratch) as copy:
                    for image, texts in read_captions(copy, f"sources.{self.name}.captions").items():
                        captions.setdefault(image, (split, texts))
        return captions


def read_captions(path: Path, what: str) -> dict[str, list[str]]:
    """Read captions by image id from a file with an entry for each caption, which repeats all of its image.

    Raises:
        RequestError: the file is of another kind.
    """
    captions: dict[str, list[str]] = {}

    def take_entry(value: dict[str, Any]) -> Any:
        """Take the captions of an entry and drop it: its lists of words are the larger part of the file."""
        if "image_id" not in value:
            return value
        texts = [text for each in value.get("reference_strs") or () if (text := one_line(each))]
        known = captions.setdefault(str(value["image_id"]), texts)
        if not texts and (text := one_line(value.get("caption_str"))):
            known.append(text)
        return None

    try:
        tree = json.loads(path.read_bytes(), object_hook=take_entry)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what}: {path.name} cannot be read as JSON: {error}") from None
    captions = {image: texts for image, texts in captions.items() if texts}
    if not isinstance(tree, dict) or "data" not in tree or not captions:
        raise RequestError(f'{what}: {path.name} is no file of TextCaps: expected {{"data": [{{"image_id": ...}}]}}')
    return captions
