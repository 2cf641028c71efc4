"""Name the columns of a list of URLs, and hold what a line of it says."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from microdit.pipeline.config.sources import UrlsSource

URL_NAMES = ("url", "image_url", "img_url", "imageurl", "image_link", "image", "link", "uri", "src")
CAPTION_NAMES = ("caption", "text", "top_caption", "alt_text", "alt", "title", "description", "prompt")
Column = str | int
FIELD = "fields."


@dataclass(frozen=True)
class ListColumns:
    """Columns that are asked for, by name or by number from 1."""

    url: Column | None = None
    caption: Column | None = None
    """Empty: the list has none."""
    more: tuple[tuple[str, Column], ...] = ()
    """Further ones: `fields.NAME`, `md5`, `sha256`."""

    @classmethod
    def of(cls, options: UrlsSource) -> "ListColumns":
        more = [(FIELD + name, column) for name, column in options.fields.items()]
        more += [(name, column) for name in ("md5", "sha256") if (column := getattr(options, name)) is not None]
        return cls(options.url, options.caption, tuple(more))

    def names(self) -> list[str]:
        """List the columns that are asked for by name."""
        asked = [self.url, self.caption, *(column for _, column in self.more)]
        return [column for column in asked if isinstance(column, str) and column]


@dataclass(frozen=True)
class ListRow:
    """Values of a line of a list."""

    url: str
    caption: object
    more: Mapping[str, object] = field(default_factory=dict)

    def fields(self) -> list[tuple[str, object]]:
        """List the further columns that become fields, by their names."""
        return [(name.removeprefix(FIELD), value) for name, value in self.more.items() if name.startswith(FIELD)]

    def checksums(self) -> list[tuple[str, str]]:
        """List the checksums that the bytes must have, by algorithm.

        Raises:
            ValueError: one is none.
        """
        found = []
        for name, digits in (("md5", 32), ("sha256", 64)):
            value = self.more.get(name)
            text = value.strip().lower() if isinstance(value, str) else value
            if text in (None, ""):
                continue
            if not isinstance(text, str) or len(text) != digits or set(text) - set("0123456789abcdef"):
                raise ValueError(f"{name}: expected {digits} hexadecimal digits, found {str(value)[:80]!r}")
            found.append((name, text))
        return found
