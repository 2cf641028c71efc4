"""Options that all sources of files have, and those of sources that say where captions and fields come from."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from microdit.pipeline.config.block import FieldError, Options

TEXT_MEMBER = re.compile(r"(?P<json>(?:[^.]+\.)*?json)(?P<field>(?:\.[^.]+)+)|(?P<text>[^.]+(?:\.[^.]+)*)")
"""Origin of a webdataset's text: a member by its extension, or a field of a json."""
JOINED = "joined."
"""Before the name of a joined table's field, where a caption comes from there."""


class ExpectedSize(Options):
    """State the published size of a data set, for `microdit plan`; reading does not depend on it."""

    inputs: int = Field(ge=1)
    files: int = Field(default=1, ge=1)
    bytes: float | None = Field(default=None, gt=0)


# A pattern of files is a path or a glob of this machine, `hf://datasets/OWNER/NAME[@REVISION]/GLOB`,
# `s3://bucket/prefix/GLOB`, or `https://host/name-{0000..0099}.tar`.
class FileOptions(Options):
    """Options of all sources whose units are files: tars, zips, parquet files."""

    limit: int | None = Field(default=None, ge=1)
    """Take so many inputs in all, evenly from the units, to try things."""
    units: int | list[str] | None = None
    """Read the first so many files only, or those of these names. A build with more goes on from there."""
    shuffle: int | None = None
    """A seed for the order in which files are read, and so for the ones that `units: 10` takes."""
    license: str = ""
    """The licence of every sample; by default the one that the dataset is published under."""
    terms: str = ""
    """The licence in a line for people: who may use it, and where it is accepted; by default `license`."""
    expected: ExpectedSize | None = None
    """Stated size of the whole, for `microdit plan` where files cannot be listed."""

    @model_validator(mode="after")
    def _check_units(self) -> "FileOptions":
        if self.units == [] or (isinstance(self.units, int) and self.units < 1):
            raise FieldError(("units",), "expected a number of files, or their names", self.units)
        return self


class JoinOptions(Options):
    """A table that is joined to the samples."""

    file: str
    """A pattern of .parquet, .jsonl(.gz), .csv or .tsv files, or of .json files with a list of objects."""
    key: str
    """The table's column with the key of a sample."""
    fields: dict[str, str] = Field(min_length=1)
    """Names of the sample's new fields, and the columns that they are taken from (dotted inside of structs)."""
    by: Literal["key", "origin"] = "key"
    """What the table's key is matched with: the sample's key in the dataset (of a webdataset the name of its members),
    or its origin in the file: the member with the image, a row's key, or without one `row-<number>`."""
    rows_of: Literal["beside", "all"] | None = None
    """Whose samples a table's file describes: those of the archive beside it (`a/7.parquet` of `a/7.tar`), or all; by
    default those beside it if every file of the table lies beside one."""


class CaptionChoice(Options):
    """One of several captions of a sample: `{NAME: WHERE}`, with `if` and `weight` or without."""

    name: str
    """The caption is a field of the sample, too, by this name."""
    path: str
    gate: str | None = None
    """`if`: where a value comes from without which, or with a false one, this caption is not taken."""
    weight: float | None = Field(default=None, gt=0)


class MappedOptions(FileOptions):
    """Options of the sources that say themselves where captions, fields and joined tables come from."""

    files: str
    """A pattern of the files: tars, or parquet files."""
    caption: str | list[CaptionChoice]
    """Where the caption comes from; `joined.NAME` is a field of a joined table. Of several, in
    `[{NAME: WHERE, if: WHERE}]`, the first that a sample has is taken; with a `weight` for each one is drawn, for a
    sample always the same."""
    texts: Literal["first", "longest", "join"] = "first"
    """Caption of a list of texts: the first one that is not empty, the longest, or all, joined by spaces."""
    fields: dict[str, str] = Field(default={})
    """Further fields of a sample, by name: where they come from, as the caption."""
    joins: list[JoinOptions] = Field(default=[])
    """Tables whose columns become further fields."""

    @field_validator("caption", mode="before")
    @classmethod
    def _read_choices(cls, caption: Any) -> Any:
        """Read `{NAME: WHERE, if: GATE, weight: 2}`, which may name several captions, as choices."""
        if not isinstance(caption, list | dict):
            return caption
        choices: list[Any] = []
        for entry in caption if isinstance(caption, list) else [caption]:
            if isinstance(entry, CaptionChoice) or (isinstance(entry, dict) and {"name", "path"} <= entry.keys()):
                choices.append(entry)
                continue
            names = [name for name in entry if name not in ("if", "weight")] if isinstance(entry, dict) else []
            if not names:
                raise FieldError((), "expected {NAME: WHERE}, with if: WHERE and weight: NUMBER or without", entry)
            about = {"gate": entry.get("if"), "weight": entry.get("weight")}
            choices += [{"name": str(name), "path": entry[name], **about} for name in names]
        if len({isinstance(c, dict) and c.get("weight") is None for c in choices}) > 1:
            raise FieldError((), "expected a weight for each caption, or for none", caption)
        return choices

    @model_validator(mode="after")
    def _check_names(self) -> "MappedOptions":
        """Refuse a name that several fields have, and captions of joined fields that no table has."""
        taken = set(self.fields)
        for number, join in enumerate(self.joins):
            for name in join.fields:
                if name in taken:
                    where = ("joins", number, "fields", name)
                    raise FieldError(where, "a field of this name is there already", join.fields[name])
                taken.add(name)
        for number, choice in enumerate(self.choices):
            if choice.name in taken:
                raise FieldError(("caption", number), "a field of this name is there already", choice.name)
            taken.add(choice.name)
        joined = {name for join in self.joins for name in join.fields}
        for path in [self.caption] if isinstance(self.caption, str) else [each.path for each in self.choices]:
            if path.startswith(JOINED) and path.removeprefix(JOINED) not in joined:
                known = ", ".join(sorted(joined)) or "none"
                raise FieldError(("caption",), f"expected the name of a joined field behind {JOINED} ({known})", path)
        return self

    @property
    def choices(self) -> list[CaptionChoice]:
        """The captions to choose from; none if there is one only."""
        return self.caption if isinstance(self.caption, list) else []

    def paths(self) -> dict[str, str]:
        """Return where values come from, by option: `caption`, `caption.0`, `caption.0.if`, `fields.NAME`."""
        paths = {f"fields.{name}": path for name, path in self.fields.items()}
        if isinstance(self.caption, str):
            paths["caption"] = self.caption
        for number, choice in enumerate(self.choices):
            paths[f"caption.{number}"] = choice.path
            if choice.gate is not None:
                paths[f"caption.{number}.if"] = choice.gate
        return {option: path for option, path in paths.items() if path and not path.startswith(JOINED)}


def text_member(path: str) -> tuple[str, str]:
    """Split where a text comes from into a member's extension and a json's field; two empty ones if it is neither."""
    match = TEXT_MEMBER.fullmatch(path)
    if match is None or (match["text"] or "").rpartition(".")[2] == "json":
        return "", ""
    return (match["json"] or match["text"]).lower(), (match["field"] or "").removeprefix(".")
