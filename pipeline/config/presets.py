"""Replace `{preset: NAME}` in the sources of a config by the options of a published data set."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from microdit.pipeline.config.block import FieldError

OPTION = re.compile(r"\$\{(\w+)\}")


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Read the table of the presets by name; cached, so it must not be changed."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text("utf-8"))
    return found


def with_preset(source: str, given: Any) -> Any:
    """Return a source's options with those of its preset, which the given ones replace.

    Raises:
        FieldError: there is no such preset, or an option that it requires is not given.
    """
    if not isinstance(given, dict) or "preset" not in given:
        return given
    name = given["preset"]
    preset = presets().get(name) if isinstance(name, str) else None
    if preset is None:
        raise FieldError((source, "preset"), f"expected one of {', '.join(presets())}", name)
    options = {option: value for option, value in given.items() if option != "preset"}
    for option, message in preset.get("required", {}).items():
        if options.get(option) in (None, ""):
            raise FieldError((source, option), f"{name} requires this option: {message}", options.get(option))
    used = set(OPTION.findall(str(preset["block"])))
    block = _filled(preset["block"], options)
    return {**block, **{option: value for option, value in options.items() if option not in used}}


def _filled(value: Any, options: dict[str, Any]) -> Any:
    """Copy a block, with the options in place of their `${names}`."""
    if isinstance(value, dict):
        return {key: _filled(each, options) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, options) for each in value]
    return OPTION.sub(lambda match: str(options[match[1]]), value) if isinstance(value, str) else value
