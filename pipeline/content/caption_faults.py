"""What a captioner says that is no caption: empty, a refusal, a loop, in another language, cut off."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

SURROGATES = re.compile("[\ud800-\udfff]")


# each letter of what is written without spaces is a word
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
REPEATS = 4  # of a phrase, one behind the other: people write `very, very, very`
LONGEST_PHRASE = 40  # words
GRAM, LEAST_WORDS, LEAST_NEW = 4, 40, 0.5  # of so many words or more, the share of four-word phrases that are new
MARGIN = 20.0
"""How much likelier (natural logarithm) another language must be: 3 of 1,000 English names, of the length of `Alaskan
Malamute`, are taken for another language with it; a sentence of five words in one is found."""


def fault(text: str, finished: bool, kind: str, language: str) -> tuple[str, str] | None:
    """What is wrong with an answer: a code to group by (`empty`, `not_text`, `refusal`, `loop`, `wrong_language`,
    `cut_off`) and one line for a person; None if it is a caption.

    Args:
        finished: the model ended by itself. One that did not may end with a sentence all the same.
        kind: of `tags` the last one may be half of a word.
        language: a code of `known_languages`.
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
    if (found := other_language(text, language)) is not None:
        return "wrong_language", f"{found}, expected {language}: {shown}"
    if not finished and (kind == "tags" or not SENTENCE_END.search(text)):
        return "cut_off", f"no end after {len(words)} words: ...{text[-100:]}"
    return None


def repeated(words: Sequence[str]) -> str:
    """A phrase that is there `REPEATS` times, one behind the other; or the commonest of a text that says little new."""
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
    """The language that a text is in, if it is much likelier than the wanted one."""
    from py3langid import rank

    found = rank(text)
    likeliest, score = found[0]
    return str(likeliest) if score - dict(found)[wanted] > MARGIN else None


@lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """Codes of ISO 639."""
    from py3langid import rank

    return frozenset(str(language) for language, _ in rank("a"))
