"""Know the licence of a model: from a table of known ones, else from its model card."""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from microdit.model.pretrained.hub import ModelFiles

CARD = "README.md"
MAX_CARD = 1 << 20  # bytes
NON_COMMERCIAL = re.compile(r"non-?commercial|research|(?:^|[-_ ])nc(?:$|[-_ ])", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """A model's licence."""

    name: str
    """Empty if it is not known."""
    commercial: bool | None = None
    """It allows commercial use; None if that is not known."""
    terms: str = ""
    """Where it can be read."""

    def describe(self) -> str:
        """Name it for people."""
        if not self.name:
            return "no licence is stated: see the model's own terms"
        notice = " (non-commercial use only)" if self.commercial is False else ""
        return f"{self.name}{notice}{f', {self.terms}' if self.terms else ''}"


@dataclass(frozen=True)
class KnownModel:
    """Entry of the table of known models: the licence, and the steps and guidance that it is made for."""

    licence: Licence
    steps: int | None = None
    guidance: float | None = None


@cache
def _table() -> dict[str, KnownModel]:
    text = files(__package__).joinpath("known_models.yaml").read_text()
    return {
        name.lower(): KnownModel(
            Licence(entry["license"], entry["commercial"], entry["terms"]), entry.get("steps"), entry.get("guidance")
        )
        for name, entry in yaml.safe_load(text).items()
    }


def known_model(repo: str) -> KnownModel | None:
    """Look a repository up in the table."""
    name = repo.lower()
    return next((model for start, model in _table().items() if name.startswith(start)), None)


def licence_of(stated: str, repo: str, model: ModelFiles | None) -> Licence:
    """Return the licence that the config states, that the table knows, or that the model card names.

    Args:
        stated: in the config; empty for none.
        repo: the model's name on the hub, or a folder's.
        model: files with the model card among them, if there is one.
    """
    known = known_model(repo)
    if stated:
        return Licence(stated, False if NON_COMMERCIAL.search(stated) else None)
    if known is not None:
        return known.licence
    if model is None:
        return Licence("")
    name = _card_licence(model.folder / CARD)
    terms = f"https://huggingface.co/{model.name}" if model.revision is not None else ""
    return Licence(name, False if NON_COMMERCIAL.search(name) else None, terms if name else "")


def _card_licence(path: Path) -> str:
    """Return the licence in the head of a model card; empty if it names none."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CARD).decode("utf-8", "replace")
    except OSError:
        return ""
    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError):
        return ""
    if not isinstance(head, dict):
        return ""
    name = head.get("license_name") if head.get("license") in (None, "other") else head["license"]
    return str(name or head.get("license") or "")[:200]
