"""Detect answers of a captioner that are no captions: empty, refusals, loops, in another language, cut off."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

SURROGATES = re.compile("[\ud800-\udfff]")


# each letter of a script without spaces is a word
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+(?:['’]\w+)*")

REFUSAL = re.compile(
    r"""\W*(?:(?:i['’]?m|i\ am)\ (?:really\ |very\ |so\ )?sorry\b
    | (?:sorry|apologies),?\ (?:but\ )?i\b
    | i\ apologi[sz]e\b
    | (?:unfortunately,?\ )?i\ (?:can(?:['’]?t|\ ?not)|could\ ?n['’]?t|(?:am|['’]m)\ (?:not\ able|unable)|won['’]?t)\b
    | i['’]m\ (?:not\ able|unable)\b
    | as\ an?\ (?:ai|artificial\ intelligence|language\ model|vision)\b)""",
    re.IGNORECASE | re.VERBOSE,
)

SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]]*$")
REPEATS = 4  # of a phrase, one after the other: people write `very, very, very`
LONGEST_PHRASE = 40  # words
GRAM, LEAST_WORDS, LEAST_NEW = 4, 40, 0.5  # from so many words on, the share of four-word phrases that are new
MARGIN = 20.0
"""How much likelier (natural logarithm) another language must be: with it 3 of 1,000 English names of the length of
`Alaskan Malamute` are taken for another language, and a sentence of five words in another language is detected."""


def fault(text: str, finished: bool, kind: str, language: str) -> tuple[str, str] | None:
    """Judge an answer; None if it is a caption.

    Args:
        finished: the model ended by itself. One that was cut off may still end with a whole sentence.
        kind: of the caption; the last of `tags` may be half of a word.
        language: a code of `known_languages`.

    Returns:
        A code to group by (`empty`, `not_text`, `refusal`, `loop`, `wrong_language`, `cut_off`), one line for a person.
    """
    words = WORD.findall(text)
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    if not words:
        return "empty", f"no word in {shown!r}"
    if SURROGATES.search(text):
        return "not_text", "it has lone surrogates, which UTF-8 cannot write"
    if REFUSAL.match(text):
        return "refusal", shown
    if phrase := repeated([word.lower() for word in words]):
        return "loop", f"{phrase[:60]!r} again and again: {shown}"
    if (other := other_language(text, language)) is not None:
        return "wrong_language", f"{other}, expected {language}: {shown}"
    if not finished and (kind == "tags" or not SENTENCE_END.search(text)):
        return "cut_off", f"no end after {len(words)} words: ...{text[-100:]}"
    return None


def repeated(words: Sequence[str]) -> str:
    """Find a phrase that occurs `REPEATS` times in a row, or the commonest one of a text with few new phrases."""
    for length in range(1, min(LONGEST_PHRASE, len(words) // REPEATS) + 1):
        run = 0
        for i in range(len(words) - length):
            run = run + 1 if words[i] == words[i + length] else 0
            if run == length * (REPEATS - 1):
                return " ".join(words[i + 1 : i + 1 + length])
    if len(words) < LEAST_WORDS:
        return ""
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    if len(set(grams)) >= LEAST_NEW * len(grams):
        return ""
    return " ".join(Counter(grams).most_common(1)[0][0])


def other_language(text: str, wanted: str) -> str | None:
    """Detect the language of a text if it is much likelier than the wanted one; else None."""
    from py3langid import rank

    ranked = rank(text)
    likeliest, score = ranked[0]
    return str(likeliest) if score - dict(ranked)[wanted] > MARGIN else None


@lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """The ISO 639 codes of the languages that are detected."""
    from py3langid import rank

    return frozenset(str(language) for language, _ in rank("a"))
