"""Options of the prompts that pictures are made from: the block `prompts:` of a source `synthesize`."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from microdit.pipeline.config.block import FieldError, Options

ORIGINS = ("path", "corpus", "templates")
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
"""Doubled braces stand for one; a single one opens or closes a placeholder."""
TAKEN = {
    "maker", "model", "revision", "seed", "variant", "steps", "guidance", "size", "prompt_source", "prompt_row",
    "license", "license_terms", "commercial_use",
}  # fmt: skip
"""Fields that a picture has of its maker."""
OF_PATH = ("column", "fields")
OF_CORPUS = ("captions", "where")
OF_TEMPLATES = ("lists",)


class PromptsConfig(Options):
    """Prompts from files (`path`), from the captions of a corpus (`corpus`), or from `templates`: one of them."""

    path: str | None = None
    """A pattern of files: .txt (a prompt a line), .tsv, .csv, .jsonl or .parquet, the first four also as .gz."""
    column: str | None = None
    """The column with the prompt, dotted inside of others; by default `prompt`, `caption` or `text`."""
    fields: dict[str, str] = Field(default={})
    """Further columns of those files that a picture keeps as fields, by the field's name."""

    corpus: str | None = None
    """Another corpus: a folder or `s3://bucket/prefix`."""
    captions: str | None = None
    """Its captions, as `captions/NAME`; by default the captions that came with its images."""
    where: str | None = None
    """SQL of a condition on its view `samples`, which chooses the samples to take; by default all that have a
    caption."""

    templates: list[str] = Field(default=[])
    """Prompts with `{NAME}` for an entry of a list: `a photo of a {animal}`. Every combination is one prompt; `{{` and
    `}}` stand for braces."""
    lists: dict[str, list[str] | str] = Field(default={})
    """Lists by name: their entries, or a text file with one a line."""

    min_words: int = Field(default=1, ge=1)
    """A prompt of fewer words is left out (`too_short`)."""
    max_words: int | None = Field(default=None, ge=1)
    """A prompt of more words is left out (`too_long`)."""
    max_characters: int = Field(default=4000, ge=1, le=100_000)
    """A longer prompt is left out (`too_long`)."""
    blocklist: list[str] | str = Field(default=[])
    """Words or phrases, or a text file with one a line: a prompt with one of them is left out (`blocked`), whatever its
    case."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Duplicates to drop: prompts equal to an earlier one but for case and spaces (`duplicate`), with `near` also
    those that share most runs of three words with one (`near_duplicate`: 0.8 of all that either has); `keep` drops
    none."""
    shuffle: int | None = None
    """A seed for the order of the prompts, and so for those that `limit` takes."""
    limit: int | None = Field(default=None, ge=1)
    """Take so many prompts at most, of those that are not left out."""

    @property
    def origin(self) -> str:
        """The one of `path`, `corpus` and `templates` that is given."""
        return next(name for name in ORIGINS if getattr(self, name))

    @field_validator("lists", "fields")
    @classmethod
    def _check_names(cls, named: dict[str, list[str] | str]) -> dict[str, list[str] | str]:
        for name in named:
            if not NAME.fullmatch(name):
                raise FieldError((name,), "a name is lower-case letters, digits and _, and begins with a letter", name)
            if name in TAKEN:
                raise FieldError((name,), "each picture has a field of this name already; take another", name)
        return named

    @model_validator(mode="after")
    def _check_origin(self) -> "PromptsConfig":
        given = [name for name in ORIGINS if getattr(self, name)]
        if len(given) != 1:
            expected = "expected one of path, corpus and templates"
            raise FieldError((given[0],) if given else (), expected, getattr(self, given[0]) if given else None)
        for origin, names in (("path", OF_PATH), ("corpus", OF_CORPUS), ("templates", OF_TEMPLATES)):
            for name in names:
                if origin != self.origin and getattr(self, name) != type(self).model_fields[name].default:
                    raise FieldError((name,), f"it is for {origin}, not for {self.origin}", getattr(self, name))
        if self.max_words is not None and self.max_words < self.min_words:
            raise FieldError(("max_words",), f"expected at least min_words = {self.min_words}", self.max_words)
        if self.captions is not None and not self.captions.startswith("captions/"):
            raise FieldError(("captions",), "expected a column as captions/NAME", self.captions)
        return self

    @model_validator(mode="after")
    def _check_templates(self) -> "PromptsConfig":
        used: set[str] = set()
        for number, template in enumerate(self.templates):
            for match in PLACEHOLDER.finditer(template):
                if match[0] in ("{{", "}}"):
                    continue
                at = f"character {match.start() + 1} of {template[:200]!r}"
                if match[1] is None:
                    raise FieldError(("templates", number), f"a brace alone at {at}; write it twice", template)
                if match[1] not in self.lists:
                    known = ", ".join(sorted(self.lists)) or "none"
                    raise FieldError(
                        ("templates", number), f"no list {match[1]!r}, which is asked for at {at} (lists: {known})",
                        template,
                    )  # fmt: skip
                used.add(match[1])
        for name, entries in self.lists.items():
            if name not in used:
                raise FieldError(("lists", name), f"no template has {{{name}}}", entries)
            if not entries:
                raise FieldError(("lists", name), "it is empty; expected entries, or a text file", entries)
        return self
