"""`diffusiondb`: DiffusionDB's zips; prompts from the json in each, scores and sizes from the one metadata table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from microdit.pipeline.config.sources import DiffusiondbSource
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample, FileSource
from microdit.pipeline.sources.members import NOT_TEXT, failed, is_image, one_line
from microdit.pipeline.tables.joins.spec import JoinSpec

LICENSE = "CC0-1.0"
ZIPS = {"2m": "images/part-*.zip", "large": "diffusiondb-large-part-{1,2}/part-*.zip"}
METADATA = {"2m": "metadata.parquet", "large": "metadata-large.parquet"}
KNOWN = ("image_nsfw", "prompt_nsfw", "width", "height")
BLURRED = 2.0  # Stable Diffusion's own filter had seen the image first
PLAIN = (int, float, str)
BY_SCORES = (
    "The scores say which images are taken. To keep fewer of those that are there, select by them, as in `microdit "
    'select CORPUS safe "SELECT source, shard, row FROM samples '
    "WHERE (nullif(fields, '') ->> 'image_nsfw')::FLOAT <= 0.1\"`"
)
PARAMETERS = {"se": "seed", "c": "cfg", "st": "steps", "sa": "sampler"}


class Diffusiondb(FileSource):
    """The adapter `diffusiondb`. Samples have the images' uuids; fields: the scores, `seed`, `cfg`, `steps`, `sampler`.

    Args:
        min_side: an image that is smaller by the metadata fails (`too_small`) before anything is decoded.
    """

    adapter = "diffusiondb"
    fixed_options: ClassVar[dict[str, str]] = dict.fromkeys(("image_nsfw", "prompt_nsfw", "tables"), BY_SCORES)

    def __init__(self, name: str, options: DiffusiondbSource, scratch: Path, min_side: int):
        super().__init__(name, options, scratch)
        self._options, self._min_side = options, min_side
        self.license = options.license or LICENSE
        self.terms = (
            f"DiffusionDB: {LICENSE}, free for any purpose; prompts and images are of Stable Diffusion's users "
            "(https://huggingface.co/datasets/poloclub/diffusiondb)"
        )

    def listing(self) -> Listing:
        return list_files(f"{self._root}/{ZIPS[self._options.subset]}", f"sources.{self.name}.root")

    def details(self) -> dict[str, Any]:
        return self._options.model_dump(include={"subset", "image_nsfw", "prompt_nsfw"})

    def tables(self) -> Sequence[JoinSpec]:
        options = self._options
        if options.image_nsfw is None and options.prompt_nsfw is None:
            return []
        listing = self.list_table(f"{self._root}/{METADATA[options.subset]}", f"sources.{self.name}.root")
        # by part, so that the rows of a zip lie side by side
        return [
            JoinSpec(
                listing,
                "parquet",
                "part_id/image_name",
                {name: name for name in KNOWN},
                what=f"sources.{self.name}",
                first_counts=True,
            )
        ]

    @property
    def _root(self) -> str:
        return self._options.root.rstrip("/")

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        table = self.table(0) if self.specs else None
        part = int(stem(file.name)[0].rpartition("-")[2])
        prompts, fault = read_part(path)
        seen = set()
        for member in members(path, is_image, MAX_BYTES):
            name = member.name.rpartition("/")[2]
            seen.add(name)
            key = stem(name)[0]
            if member.data is None:
                yield failed(member, key)
                continue
            entry = prompts.get(name, {})
            faults = dict[str, str]()
            prompt = one_line(entry.get("p"), "prompt", faults)
            row = None if table is None else table.get(f"{part}/{name}")
            scores = {score: (row or {}).get(score) for score in ("image_nsfw", "prompt_nsfw")}
            fields = {
                **{score: round(float(value), 6) for score, value in scores.items() if value is not None},
                **{long: value for short, long in PARAMETERS.items() if isinstance(value := entry.get(short), PLAIN)},
            }
            reason, detail = self._refused(row, scores) if table is not None else (None, "")
            if reason is None and not prompt:
                reason, detail = (
                    NOT_TEXT if faults else "no_caption",
                    faults.get("prompt") or fault or "its prompt is empty, or not in the part's json",
                )
            data = member.data if reason is None else None
            yield FileSample(key, data, prompt, member.name, fields, reason, detail)
        for name in sorted(prompts.keys() - seen):
            detail = "the part's json names it, the zip lacks it"
            yield FileSample(stem(name)[0], None, "", name, reason="missing", detail=detail)

    def _refused(self, row: Mapping[str, Any] | None, scores: Mapping[str, float | None]) -> tuple[str | None, str]:
        """Return the reason and detail why the metadata excludes an image; None and "" if it does not."""
        if row is None:
            return "no_scores", "the metadata has no row of it"
        for name, most in (("image_nsfw", self._options.image_nsfw), ("prompt_nsfw", self._options.prompt_nsfw)):
            score = scores[name]
            # the table's numbers have 32 bits: its 0.2 is a little more than ours. NaN is no leave
            if most is not None and not (score is not None and score <= float(np.float32(most))):
                note = ": blurred by Stable Diffusion's own filter" if score == BLURRED else ""
                return "nsfw", f"{name} is {score if score is None else round(score, 4)}, at most {most} is taken{note}"
        width, height = row.get("width"), row.get("height")
        if width is not None and height is not None and min(width, height) < self._min_side:
            return "too_small", f"{width}x{height}; the short side must have {self._min_side} pixels"
        return None, ""


def read_part(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Read the entries of a zip's json by the image's name, and the fault if there is no readable one."""
    for member in members(path, lambda name: stem(name)[1] == "json", MAX_BYTES):
        if member.data is None:
            return {}, f"the part's json cannot be read: {member.detail or member.reason}"
        try:
            entries = json.loads(member.data)
            return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}, ""
        except (ValueError, RecursionError, AttributeError) as error:
            return {}, f"the part's json cannot be read: {error}"
    return {}, "the zip has no json with prompts"
