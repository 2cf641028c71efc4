"""`openmoji`: the demo's source. OpenMoji drawings, prepared in a cache folder and fetched over HTTP from loopback."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import OpenmojiSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.sources.openmoji import server as demo_server
from microdit.pipeline.sources.openmoji.drawings import ATTRIBUTION, LICENSE
from microdit.pipeline.sources.source import Input


class Openmoji:
    """The adapter `openmoji`: `urls` with a list and a server of its own. The first use rasterises for ten seconds."""

    def __init__(self, name: str, options: OpenmojiSource):
        self.name, self._options = name, options
        self.terms = f"{LICENSE}: {ATTRIBUTION}"
        self._base: str | None = None

    @cached_property
    def prepared(self) -> demo_server.DemoSource:
        """The folder that is served; it is prepared if need be.

        Raises:
            RequestError: the cache folder cannot be written.
        """
        folder = cache_folder(self._options.cache) / f"openmoji-{self._options.limit or 'all'}"
        try:
            return demo_server.prepare(folder, self._options.limit)
        except OSError as error:
            raise RequestError(
                f"sources.{self.name}.cache: {folder} cannot be written ({error.strerror}); "
                f"name another folder: sources.{self.name}.cache=DIR"
            ) from error

    def captions_table(self, field: str = "caption") -> Path:
        """Return the table with this field, joined by origin: longer captions, or `plain` ones."""
        return self.prepared.plain if field == "plain" else self.prepared.captions

    def stage(self) -> dict[str, Any]:
        return {**self._urls().stage(), "adapter": "openmoji", "attribution": ATTRIBUTION}

    def units(self) -> list[str]:
        return self._urls().units()

    @contextmanager
    def running(self, corpus: Corpus, report: Callable[[str], None]) -> Iterator[None]:
        with demo_server.serve(self.prepared.folder) as self._base:
            try:
                yield
            finally:
                self._base = None

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        if self._base is None:
            raise RuntimeError(f"source {self.name} is read outside of its running(): nothing serves it")
        return self._urls().read(unit, wanted)

    def _urls(self) -> Urls:
        options = self._options
        base = self._base or "http://127.0.0.1/"
        fetch = options.fetch.model_copy(update={"allow_networks": [*options.fetch.allow_networks, "127.0.0.0/8"]})
        return Urls(self.name, self.prepared.list, options.unit_inputs, fetch, license=LICENSE, base=base)


def cache_folder(given: str | None) -> Path:
    """Return `given`, or `microdit` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    if given is not None:
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "microdit"
