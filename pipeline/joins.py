from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.corpus import Corpus
from pipeline.sources.remote import Listing


@dataclass(frozen=True)
class JoinSpec:
    listing: Listing
    reader: str
    key: str
    fields: Mapping[str, str]
    key_of: str = ""


def build(corpus: Corpus, spec: JoinSpec, scratch: Path, say: Callable[[str], None]) -> None:
    raise NotImplementedError


class Joined:
    def __init__(self, store: Any, spec: JoinSpec):
        raise NotImplementedError

    def get(self, key: str) -> dict[str, Any] | None:
        raise NotImplementedError
