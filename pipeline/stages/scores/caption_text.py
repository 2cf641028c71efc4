"""`scores/caption`: what can be said of a caption without a model of pictures."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import regex

from microdit.pipeline.config.scores import CaptionScores
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import latest, read_lines
from microdit.pipeline.stages.identity import carried_identity
from microdit.pipeline.stages.rows import attempts, commit_all, samples
from microdit.pipeline.stages.stage import ColumnSpec, Task

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


class CaptionQuality:
    """Scores of the captions of one column.

    - `characters`, and `words`: runs of letters and digits; in scripts without spaces each letter
    - `language`: ISO 639, as py3langid guesses it, and its `language_confidence`, 0 to 1: low where the text is short
    - `repetition`: as `repetition` says
    """

    device = "cpu"

    def __init__(self, name: str, options: CaptionScores):
        self.name, self._captions = name, f"captions/{options.captions}"
        stage = {"stage": "scores/caption", "version": 1, "captions": options.captions}
        stage |= {"model": carried_identity(name, "py3langid")}
        self.columns = {name: ColumnSpec(stage, SCALARS, (self._captions,))}
        self._language: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_language": None}

    def load(self) -> None:
        from microdit.model.pretrained.packaged import LanguageScorer

        self._language = self._language or LanguageScorer()

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        captions = latest(corpus, self._captions, task.ref)
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [captions])
            for row in samples(read_lines(corpus, captions), made, task, self._captions):
                caption = row.scalars["caption"]
                language, confidence = self._language(caption)
                words = words_of(caption)
                for attempt in made.values():
                    attempt.add(
                        row.row,
                        row.key,
                        characters=len(caption),
                        words=len(words),
                        language=language,
                        language_confidence=confidence,
                        repetition=repetition(words),
                    )
            return commit_all(made, task)


def words_of(text: str) -> list[str]:
    """The words of a text without regard to case."""
    return WORDS.findall(text.casefold())


def repetition(words: Sequence[str]) -> float:
    """Which share of the runs of three words came before, 0 to 1; 0 without such a run."""
    runs = [tuple(words[i : i + N]) for i in range(len(words) - N + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
