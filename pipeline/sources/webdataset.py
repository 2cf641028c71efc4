"""`webdataset`: tars of images with their texts beside them, whatever the names inside, from wherever they lie."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.joins import JoinSpec
from pipeline.source_options import JoinOptions, WebdatasetSource
from pipeline.sources.archives import Member, members, stem
from pipeline.sources.files import MAX_BYTES, FileSource, Sample
from pipeline.sources.grouped import IMAGES, failed, grouped, text_of
from pipeline.sources.remote import Listing, RemoteFile, list_files


class Webdataset(FileSource):
    """The adapter `webdataset`. Fields are those that are asked for, and those of the tables joined."""

    adapter = "webdataset"

    def __init__(self, name: str, options: WebdatasetSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options

    def listing(self) -> Listing:
        return list_files(self._options.files, f"sources.{self.name}.files")

    def details(self) -> dict[str, Any]:
        return self._options.model_dump(include={"image", "caption", "fields", "keys"}) | {
            "joins": [join.by for join in self._options.joins]
        }

    def tables(self) -> Sequence[JoinSpec]:
        return self._tables

    @cached_property
    def _tables(self) -> list[JoinSpec]:
        return join_specs(self._options.joins, self.name)

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[Sample]:
        options = self._options
        images = tuple(extension.lower().lstrip(".") for extension in options.image) or IMAGES
        wanted = {*images, *(place.partition(".")[0] for place in (options.caption, *options.fields.values()) if place)}
        found = members(path, lambda name: stem(name)[1] in wanted, MAX_BYTES)
        for base, image, others in grouped(found, images):
            if image.reason is not None:
                yield failed(image, base)
                continue
            parsed, fault = parsed_json(others.get("json"))
            texts = {"txt": text_of(others.get("txt")), "json": parsed}
            fields = {name: plain(inside(texts, place)) for name, place in options.fields.items()}
            for i, join in enumerate(options.joins):
                fields |= self.table(i).get(base if join.by == "key" else image.name) or {}
            fields = {name: value for name, value in fields.items() if value is not None}
            key = base if options.keys == "member" else ""
            if fault:
                yield Sample(key, None, "", image.name, fields, "damaged_json", fault)
                continue
            caption = as_text(inside(texts, options.caption)) if options.caption else ""
            yield Sample(key, image.data, caption, image.name, fields)


def join_specs(joins: Sequence[JoinOptions], source: str) -> list[JoinSpec]:
    """The tables of a source's `joins`."""
    specs = []
    for number, join in enumerate(joins):
        listing = list_files(join.file, f"sources.{source}.joins.{number}.file")
        reader = "parquet" if listing.files[0].name.endswith(".parquet") else "jsonl"
        specs.append(JoinSpec(listing, reader, join.key, join.fields, what=f"sources.{source}.joins.{number}"))
    return specs


def parsed_json(member: Member | None) -> tuple[dict[str, Any], str]:
    """The object in a json member (empty without one), and what is wrong with it."""
    if member is None or member.data is None:
        return {}, "" if member is None else f"{member.name}: {member.detail}"
    try:
        found = json.loads(member.data)
    except (ValueError, RecursionError) as error:
        return {}, f"{member.name}: {error}"
    return (found, "") if isinstance(found, dict) else ({}, f"{member.name}: expected an object")


def inside(values: Any, place: str) -> Any:
    """What is at a dotted place inside of dicts; None if nothing is."""
    if isinstance(values, dict) and place in values:
        return values[place]
    first, dot, rest = place.partition(".")
    return inside(values.get(first), rest) if dot and isinstance(values, dict) else None


def plain(value: Any) -> str | int | float | bool | None:
    """A field's value: plain ones as they are, others as JSON."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def as_text(value: Any) -> str:
    """A caption on one line; of a list of captions the first."""
    if isinstance(value, list) and value:
        value = value[0]
    return " ".join(value.split()) if isinstance(value, str) else ""
