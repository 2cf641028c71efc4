"""`coco`: COCO 2014 val, the images that generated ones are compared with; and which 30,000 of them.

There are many lists of "30K" and none is official; here a rule makes the list, so that all users have the same: of the
image ids in `captions_val2014.json` the 30,000 whose sha256 of `<seed>:<image id>` (both in decimal) is smallest, with
the seed 2014. A sample's caption, the prompt to generate from, is the first one of its image in that file.

A number is comparable with another one only if these are the same, too, so state them: the reference is the chosen
images themselves, short side resized to 256 (bicubic, antialiased) and the centre cropped to 256x256; generated images
are made at the model's size and brought to 256x256 the same way; CFG is the one that was used (the paper does not say
which one its FID has: give a sweep, 1.5 to 8, or 5, which its authors sample with).
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import CocoSource
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample, FileSource
from microdit.pipeline.sources.members import WHICH_IMAGES, failed, is_image, one_line

LICENSE = "CC-BY-4.0 (captions); images: Flickr Terms of Use"
CAPTIONS = "captions_val2014.json"
MAX_CAPTIONS = 1 << 30  # bytes
NUMBER = re.compile(r"(\d+)$")


class Coco(FileSource):
    """The adapter `coco`. Samples are called `COCO_val2014_<12 digits>`; fields: `caption_1` and so on, `image_id`."""

    adapter = "coco"
    fixed_options: ClassVar[dict[str, str]] = {"captions": WHICH_IMAGES}

    def __init__(self, name: str, options: CocoSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self._captions = Listing(())
        self.license = options.license or LICENSE
        self.terms = (
            "COCO: captions CC-BY-4.0, images under Flickr's terms; to judge by, not to train on "
            "(https://cocodataset.org/#termsofuse)"
        )

    def listing(self) -> Listing:
        self._captions = list_files(self._options.captions, f"sources.{self.name}.captions")
        return list_files(self._options.images, f"sources.{self.name}.images")

    def details(self) -> dict[str, Any]:
        options = self._options
        return {"choose": options.choose, "seed": options.seed, "captions": self._captions.identity}

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        what = f"sources.{self.name}.captions"
        with local_copy(self._captions.files[0], self._scratch) as copy:
            captions = read_captions(copy, what)
        chosen = choose(captions, self._options.choose, self._options.seed)
        seen: set[int | None] = set()
        for member in members(path, lambda name: is_image(name) and image_id(name) in chosen, MAX_BYTES):
            key, image = stem(member.name)[0], image_id(member.name)
            seen.add(image)
            if member.data is None or image is None:
                yield failed(member, key)
                continue
            fields = {f"caption_{i}": text for i, text in enumerate(captions[image], 1)}
            yield FileSample(key, member.data, captions[image][0], member.name, {**fields, "image_id": image})
        if len(self._listing.files) == 1:  # of several zips none has all images
            for image in sorted(chosen - seen):
                detail = "it is chosen, and not in the zip"
                yield FileSample(f"COCO_val2014_{image:012d}", None, reason="missing", detail=detail)


def choose(images: Collection[int], count: int | None, seed: int) -> set[int]:
    """Choose `count` of the image ids by the rule above; all if `count` is None or there are no more."""
    if count is None:
        return set(images)
    return set(sorted(images, key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())[:count])


def image_id(name: str) -> int | None:
    """Parse the number at the end of an image's name, None if there is none."""
    number = NUMBER.search(stem(name)[0])
    return int(number[1]) if number else None


def read_captions(path: Path, what: str) -> dict[int, list[str]]:
    """Read captions by image id, in the order of the file: `captions_val2014.json`, or a zip with it.

    Raises:
        RequestError: the file is neither.
    """
    with path.open("rb") as file:
        plain = file.read(64).lstrip()[:1] == b"{"
    data = path.read_bytes() if plain else None
    if data is None:
        for member in members(path, lambda name: name.rpartition("/")[2] == CAPTIONS, MAX_CAPTIONS):
            data = member.data
            break
    try:
        captions: dict[int, list[str]] = {}
        for entry in json.loads(data)["annotations"] if data is not None else ():
            if text := one_line(entry["caption"]):
                captions.setdefault(int(entry["image_id"]), []).append(text)
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise RequestError(
            f"{what}: {CAPTIONS} of {path.name} cannot be read: {type(error).__name__}: {error}"
        ) from None
    if not captions:
        raise RequestError(f"{what}: {path.name} has no {CAPTIONS}; expected it, or annotations_trainval2014.zip")
    return captions
