"""Ask a model for captions: the prompt, the language, and which answers are captions."""

from typing import Any

from microdit.model.pretrained.prompts import default_prompt
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.content.caption_answers import clean_answer
from microdit.pipeline.content.caption_faults import fault, known_languages
from microdit.pipeline.stages.rows import Outcome, Output, RowFailure

SCALARS = {"caption": "string", "tokens": "int32"}
AGAIN = 0.7  # the temperature, at least, with which a rejected answer is asked for again


def judge(text: str, finished: bool, options: CaptionsColumn) -> Outcome:
    """Turn a model's answer into a caption, white space as single spaces, or say what is wrong with it.

    What stands around the caption is cut (`clean_answer`).
    """
    text = clean_answer(text)
    rejected = fault(text, finished, options.asked_kind, options.language)
    return RowFailure(*rejected) if rejected is not None else caption_output(" ".join(text.split()))


def caption_output(caption: str) -> Output:
    """Return what a captions column stores: the caption, and its number of words."""
    return Output({"caption": caption, "tokens": len(caption.split())})


def asked_of(options: CaptionsColumn, prompt: str) -> dict[str, Any]:
    """Return the part of a declaration that says how captions are asked for."""
    names = ("temperature", "image_side", "language")
    asked = {name: getattr(options, name) for name in names}
    return {**asked, "prompt": prompt, "kind": options.asked_kind, "max_tokens": options.most_tokens}


def check_language(column: str, options: CaptionsColumn) -> None:
    """Check that captions in the asked language can be recognised.

    Raises:
        RequestError: they cannot.
    """
    if options.language not in known_languages():
        known = ", ".join(sorted(known_languages()))
        raise RequestError(f"columns.{column}.language = {options.language!r}: expected one of {known}")


def prompt_of(column: str, options: CaptionsColumn, family: str) -> str:
    """Return the prompt that is given, or the default one of a family of captioners.

    Raises:
        RequestError: the family gives no such captions.
    """
    if options.prompt is not None:
        return options.prompt
    try:
        return default_prompt(options.asked_kind, family)
    except ValueError as error:
        raise RequestError(f"columns.{column}: {error}") from error
