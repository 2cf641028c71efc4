"""Detect answers of a captioner that are no captions: empty, refusals, loops, leaks, another language, cut off."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from microdit.pipeline.content.caption_answers import OPENING, THINKING_OPEN, TITLE
from microdit.pipeline.content.caption_refusals import NO_IMAGE, REFUSAL

SURROGATES = re.compile("[\ud800-\udfff]")


# each letter of a script without spaces is a word
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+(?:['’]\w+)*")

ROLES = "assistant|user|human|system|model"
LEAKED = re.compile(
    r"<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|\A<s>|<s>\s*\Z"
    r"|<(?:unk|pad|bos|eos|cls|sep|image|video|image_placeholder|imagehere|im_(?:start|end|patch)|imgpad|global-img"
    r"|fake_token_around_image|end_of_utterance|start_of_turn|end_of_turn|image_soft_token|grounding|patch_index_\d+"
    r"|loc_?\d+|seg\d+|extra_id_\d+|row_\d+_col_\d+|0x[0-9a-f]{2})>"
    rf"|</?(?:box|ref|quad|point|poly|img|phrase|tool_call|function_call|output|instruction|{ROLES})(?:\s[^<>\n]{{0,80}})?>"
    r"|\A<(?:(?:more_)?detailed_)?caption>|\[/?INST\]|<</?SYS>>|\[(?:EOS|BOS|PAD|UNK|CLS|SEP|MASK)\]"
    rf"|\A(?:{ROLES})\s*\n|\n(?:{ROLES})\s*\n"
    rf"|(?:^|\n)(?:###\ *)?(?-i:USER|ASSISTANT|Human|Assistant):"
    r"|\n(?:###\ *)?(?:instructions?|response|input|question|answer):"
    r"|\A(?:question|q):[^\n]{0,300}\b(?-i:Answer|A):",
    re.IGNORECASE,
)
NOTHING = re.compile(
    r"\W*(?:none|null|undefined|n/a|nan|unknown|string|empty|no (?:captions?|descriptions?|answer|tags)"
    r"(?: (?:is )?(?:available|provided|found))?|(?:insert |your ){1,2}(?:caption|description)(?: here)?)\W*",
    re.IGNORECASE,
)
MOJIBAKE = re.compile(r"(?:Ã[\u00a0-\u00bf]|Â[\u00a0-\u00bf]|â€)")  # UTF-8 that was read as Latin-1
SAME_LETTERS = re.compile(r"(\S{1,8}?)\1{29,}")
ASSENT = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|absolutely|understood|got it|okay|alright|great|gerne|natürlich|bien sûr"
    r"|claro|certo|конечно|当然|好的|はい)\s*[!.,:。！，]+",
    re.IGNORECASE,
)
SMALL_TALK = re.compile(
    r"(?:\W*(?:sure|certainly|of course|hello|hi)\W+)?(?:i(?:['’]d be (?:happy|glad) to|['’]ll|['’]m here to| can)"
    r" help\b|(?:how|what) (?:can|may|would) (?:i|you)\b[^.!?]*\?"
    r"|let['’]s (?:describe|take a look|look at|analy[sz]e)\b"
    r"|here you (?:go|are)\b)[^.!?\n]*[.!?:]*(?:\s*(?:what|how|please|which)\b[^.!?\n]*[.!?]*)?\s*",
    re.IGNORECASE,
)
UNFINISHED = {  # words that nothing can end with
    "en": r"(?:a|an|the|and|or)",
    "de": r"(?:und|oder|ein|eine|einem|einen|einer)",
    "fr": r"(?:et|ou|un|une|le|les|des)",
    "es": r"(?:y|o|un|una|el|los|las)",
    "it": r"(?:e|o|un|una|il|gli)",
    "pt": r"(?:e|ou|um|uma|os)",
}

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
        A code to group by (`empty`, `not_text`, `no_image`, `refusal`, `leaked_tokens`, `boilerplate`, `loop`,
        `wrong_language`, `cut_off`), one line for a person.
    """
    words = WORD.findall(text)
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    if not words or NOTHING.fullmatch(text):
        return "empty", f"no caption in {shown!r}"
    if SURROGATES.search(text):
        return "not_text", "it has lone surrogates, which UTF-8 cannot write"
    if len(MOJIBAKE.findall(text)) > 1:
        return "not_text", f"it was decoded by a wrong encoding: {shown}"
    if "\ufffd" in text:
        return "not_text", f"it has U+FFFD, which stands for bytes that were no text: {shown}"
    if THINKING_OPEN.search(text):
        return "cut_off", f"its thinking does not end: {shown}"
    for reason, pattern in (("no_image", NO_IMAGE), ("refusal", REFUSAL)):
        if pattern.match(text):
            return reason, shown
    if leaked := LEAKED.search(text):
        return "leaked_tokens", f"{leaked[0].strip()!r} in {shown}"
    if _is_boilerplate(text):
        return "boilerplate", f"nothing follows it: {shown}"
    if phrase := (SAME_LETTERS.search(text) or [""])[0] or repeated([word.lower() for word in words]):
        return "loop", f"{phrase[:60]!r} again and again: {shown}"
    if (other := other_language(text, language)) is not None:
        return "wrong_language", f"{other}, expected {language}: {shown}"
    half = kind != "tags" and len(words) > 3 and _is_half(text, language)
    if half or (not finished and (kind == "tags" or not SENTENCE_END.search(text))):
        return "cut_off", f"no end after {len(words)} words: ...{text[-100:]}"
    return None


def _is_half(text: str, language: str) -> bool:
    """Recognise a sentence that breaks off, though the model ended by itself."""
    return text.endswith(",") or re.search(rf"\s{UNFINISHED.get(language, '(?!)')}\Z", text) is not None


def _is_boilerplate(text: str) -> bool:
    """Recognise an opening that no caption follows, and an object or a fence that no caption was found in."""
    opening = OPENING.match(text)
    empty = opening is not None and not WORD.search(text[opening.end() :])
    talk = ASSENT.fullmatch(text) is not None or SMALL_TALK.fullmatch(text) is not None
    titled = TITLE.fullmatch(text) is not None
    return empty or talk or titled or text.startswith("```") or (text[0] == "{" and text[-1] == "}" and '":' in text)


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
    """Return the ISO 639 codes of the languages that are detected."""
    from py3langid import rank

    return frozenset(str(language) for language, _ in rank("a"))
