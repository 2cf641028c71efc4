"""Cut from a captioner's answer what stands around the caption: thinking, JSON, fences, polite openings and endings."""

import json
import re
import unicodedata

THINKING_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE)
THINKING_OPEN = re.compile(r"<(?:think|thinking|thought|reasoning)>|◁think▷|<\|begin_of_thought\|>", re.IGNORECASE)

FENCE = re.compile(r"\A```[\w+-]*[ \t]*\n?(.*?)\n?```\Z", re.DOTALL)
CAPTION_KEYS = ("caption", "description", "text", "image_description", "alt_text", "tags", "answer")
MOST_JSON = 1 << 16  # characters

WRAPPER = re.compile(r"\A<(answer|caption|description|response)>(.*)</\1>\Z", re.DOTALL | re.IGNORECASE)

CONTENT = (  # what an answer calls itself
    r"(?:captions?|descriptions?|tags|summary|alt[- ]text|keywords"
    r"|beschreibung|bildbeschreibung|bildunterschrift|légende"
    r"|descripción|leyenda|descrição|legenda|descrizione|didascalia|описание|подпись)"
)
HERE = (
    r"(?:here(?:['’]s|\ is|\ are)|(?:this|below)\ is|i['’]ll|let\ me|hier\ ist|hier\ sind|voici|aquí\ (?:tienes|está)"
    r"|aqui\ está|ecco|вот)"
)
OPENING = re.compile(
    rf"""\W*(?:(?:sure(?:\ thing)?|certainly|of\ course|absolutely|okay|bien\ sûr|natürlich|gerne?|claro(?:\ que\ sí)?
        |por\ supuesto|certamente|certo|конечно)\s*[!,.]\s*)?
    (?:{HERE}\b[^:\n.]{{0,80}}?\b{CONTENT}\b[^:\n.]{{0,80}}[:：]
    | {CONTENT}\s*\**\s*[:：]
    | (?:当然|好的|没问题)[！!，,。][^：:\n。]{{0,30}}[：:]
    | (?:以下是|这是)[^：:\n。]{{0,20}}(?:描述|说明|标题)[^：:\n。]{{0,10}}[：:]
    | (?:もちろん(?:です)?|はい)[、。！!][^：:\n。]{{0,40}}[：:。]
    | (?:以下は|こちらは)[^：:\n。]{{0,30}}(?:説明|キャプション)[^：:\n。]{{0,10}}[：:。])[\s*_]*""",
    re.IGNORECASE | re.VERBOSE,
)
INTERJECTION = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|absolutely)\s*!\s*(?=\S)|(?:好的|当然)[！!，,]\s*", re.IGNORECASE
)
ENDING = re.compile(
    r"""(?<=[.!?。！？*"\s])(?:let\ me\ know\ (?:if|how|what)|(?:i\ )?hope\ (?:this|that)\ helps
    |feel\ free\ to\ (?:ask|reach)
    |is\ there\ anything\ else|would\ you\ like\ me\ to|do\ you\ (?:want|need)\ me\ to
    |if\ you\ (?:need|have|would\ like|want)\ (?:any|more|further)\b)[^\n]*\Z""",
    re.IGNORECASE | re.VERBOSE,
)


def clean_answer(text: str) -> str:
    """Cut what is no part of the caption from an answer; an answer that is nothing else keeps its opening.

    Thinking that does not end, and tokens of a chat template, stay: `caption_faults.fault` refuses them.
    """
    text = strip_controls(text).strip()
    text = _without_thinking(text).strip()
    for _ in range(3):  # fences around JSON around a wrapped text
        inner = _unwrapped(text)
        if inner == text:
            break
        text = inner
    for pattern in (OPENING, INTERJECTION):
        if (opening := pattern.match(text)) and re.search(r"\w", text[opening.end() :]):
            text = text[opening.end() :].strip()
    if (ending := ENDING.search(text)) and re.search(r"\w", text[: ending.start()]):
        text = text[: ending.start()].strip()
    return _unwrapped(text)


def _without_thinking(text: str) -> str:
    """Cut thinking that has an end; the opening may be a part of the prompt, and be missing."""
    ends = [match.end() for match in THINKING_END.finditer(text)]
    if not ends:
        return text
    after, opening = text[ends[-1] :], THINKING_OPEN.search(text)
    return after if opening is None or re.search(r"\w", after) else text[: opening.start()]


def strip_controls(text: str) -> str:
    """Remove control characters but white space, and byte order marks."""
    return "".join(c for c in text if c.isspace() or (unicodedata.category(c) != "Cc" and c != "\ufeff"))


def _unwrapped(text: str) -> str:
    """Take the text out of a fence, a tag or a JSON object, where nothing stands beside it."""
    if fence := FENCE.match(text):
        return fence[1].strip()
    if wrapper := WRAPPER.match(text):
        return wrapper[2].strip()
    if text[:1] in ("{", "[") and text[-1:] in ("}", "]") and len(text) <= MOST_JSON:
        try:
            return _caption_in(json.loads(text)) or text
        except (ValueError, RecursionError):
            return text
    return text


def _caption_in(value: object) -> str:
    """Find the one caption of a JSON value, or the tags of a list; else an empty text."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, dict):
        known = [value[key] for key in CAPTION_KEYS if key in value] or (
            list(value.values()) if len(value) == 1 else []
        )
        return _caption_in(known[0]) if known and not isinstance(known[0], dict) else ""
    return ""
