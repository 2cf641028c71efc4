"""`scores/caption`: scores of a caption's text."""

from collections.abc import Callable, Sequence
from functools import partial

import regex

from microdit.pipeline.config.scores import CaptionScores
from microdit.pipeline.corpus.rows import Row
from microdit.pipeline.stages.identity import carried_identity
from microdit.pipeline.stages.row_stage import Compute, RowStage
from microdit.pipeline.stages.rows import Scalars
from microdit.pipeline.stages.stage import ColumnSpec

SCALARS = {
    "characters": "int32",
    "words": "int32",
    "language": "string",
    "language_confidence": "float32",
    "repetition": "float32",
}


# where no spaces are written every letter is a word: else a loop of them would be one long word
DENSE = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORDS = regex.compile(rf"{DENSE}\p{{M}}*|(?:(?!{DENSE})[\p{{L}}\p{{M}}\p{{N}}'’])+")
N = 3


def caption_score_stage(name: str, options: CaptionScores) -> RowStage:
    """Make the stage of `scores/caption`: `caption_scores` of one captions column."""
    stage = {"stage": "scores/caption", "version": 1, "captions": options.captions}
    stage |= {"model": carried_identity(name, "py3langid")}
    return RowStage(name, ColumnSpec(stage, SCALARS, (f"captions/{options.captions}",)), "cpu", _load)


def _load() -> Compute:
    from microdit.model.pretrained.packaged import LanguageScorer

    return partial(_score_row, LanguageScorer())


def _score_row(language: Callable[[str], tuple[str, float]], row: Row) -> Scalars:
    return caption_scores(row.scalars["caption"], language)


def caption_scores(caption: str, language: Callable[[str], tuple[str, float]]) -> Scalars:
    """Score a caption.

    - `characters`, and `words`: runs of letters and digits; in scripts without spaces each letter
    - `language`: ISO 639, as py3langid guesses it, and its `language_confidence`, 0 to 1: low where the text is short
    - `repetition`: as the function `repetition` says
    """
    code, confidence = language(caption)
    words = words_of(caption)
    return {
        "characters": len(caption),
        "words": len(words),
        "language": code,
        "language_confidence": confidence,
        "repetition": repetition(words),
    }


def words_of(text: str) -> list[str]:
    """Split a text into words, casefolded."""
    return WORDS.findall(text.casefold())


def repetition(words: Sequence[str]) -> float:
    """Compute the share of runs of three words that occurred before, 0 to 1; 0 without such a run."""
    runs = [tuple(words[i : i + N]) for i in range(len(words) - N + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
