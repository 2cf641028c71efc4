"""Choose a sample's caption among several: by gates, and by order or by weights."""

import hashlib
from collections.abc import Mapping, Sequence

from microdit.pipeline.config.files import JOINED, CaptionChoice, MappedOptions
from microdit.pipeline.sources.joined_fields import Plain, as_text

FALSE = ("", "0", "0.0", "false", "no", "none", "null", "nan")


def captions_of(
    options: MappedOptions, values: Mapping[str, object], tables: Mapping[str, Plain], faults: dict[str, str]
) -> dict[str, str]:
    """Return the captions of a sample by name, without the empty ones and those whose gate is false.

    Args:
        values: by the options of `MappedOptions.paths`.
        tables: the fields of the joined tables.
        faults: get what is wrong with texts, by the caption's name.
    """
    captions: dict[str, str] = {}
    for number, choice in enumerate(options.choices):
        if choice.gate is not None and not is_true(_value(f"caption.{number}.if", choice.gate, values, tables)):
            continue
        found: dict[str, str] = {}
        if text := as_text(_value(f"caption.{number}", choice.path, values, tables), found, options.texts):
            captions[choice.name] = text
        if found:
            faults[choice.name] = found["caption"]
    return captions


def choose(choices: Sequence[CaptionChoice], captions: Mapping[str, str], sample: str) -> str:
    """Take the first caption of the choices, or draw one by their weights; empty if there is none.

    Args:
        sample: the sample's name, which alone the draw depends on.
    """
    there = [choice for choice in choices if choice.name in captions]
    total = sum(choice.weight or 0.0 for choice in there)
    digest = hashlib.sha256(sample.encode("utf-8", "surrogatepass")).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * total
    for choice in there:
        point -= choice.weight or 0.0
        if point < 0 or choice.weight is None:
            return captions[choice.name]
    return captions[there[-1].name] if there else ""


def is_true(value: object) -> bool:
    """Tell whether a gate is open: true, a number but zero, or a text that does not say no."""
    return str(value).strip().lower() not in FALSE


def _value(option: str, path: str, values: Mapping[str, object], tables: Mapping[str, Plain]) -> object:
    return tables.get(path.removeprefix(JOINED)) if path.startswith(JOINED) else values.get(option)
