"""Ask for captions: the prompt, the language, what is asked again."""

from typing import Any

from microdit.model.pretrained.prompts import default_prompt
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.content.caption_faults import fault, known_languages
from microdit.pipeline.corpus.attempt import Attempt
from microdit.pipeline.stages.captions.pictures import Ready

SCALARS = {"caption": "string", "tokens": "int32"}
AGAIN = 0.7  # the temperature, at least, with which a model is asked once more


def add_caption(
    attempt: Attempt, ready: Ready[Any], text: str, finished: bool, options: CaptionsColumn
) -> tuple[str, str] | None:
    """Add an answer as the sample's caption, white space as single spaces; or tell what is wrong with it."""
    bad = fault(text, finished, options.asked_kind, options.language)
    if bad is None:
        words = text.split()
        attempt.add(ready.row.row, ready.row.key, caption=" ".join(words), tokens=len(words))
    return bad


def asked_of(options: CaptionsColumn, prompt: str) -> dict[str, Any]:
    """What a declaration says of how captions are asked for."""
    names = ("temperature", "image_side", "language")
    asked = {name: getattr(options, name) for name in names}
    return {**asked, "prompt": prompt, "kind": options.asked_kind, "max_tokens": options.most_tokens}


def check_language(column: str, options: CaptionsColumn) -> None:
    """Raises RequestError if nothing is known of the language that is asked for."""
    if options.language not in known_languages():
        known = ", ".join(sorted(known_languages()))
        raise RequestError(f"columns.{column}.language = {options.language!r}: expected one of {known}")


def prompt_of(column: str, options: CaptionsColumn, family: str) -> str:
    if options.prompt is not None:
        return options.prompt
    try:
        return default_prompt(options.asked_kind, family)
    except ValueError as error:
        raise RequestError(f"columns.{column}: {error}") from error
