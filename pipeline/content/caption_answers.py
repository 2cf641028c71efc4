"""Cut from a captioner's answer what stands around the caption: thinking, JSON, fences, polite openings and endings."""

import ast
import json
import re
import unicodedata

THOUGHT = r"(?:think|thinking|thoughts?|reasoning|analysis|reflection|scratchpad|planning|inner_monologue|seed:think)"
THINKING_END = re.compile(rf"</{THOUGHT}>|◁/think▷|<\|end_of_thought\|>|\[/THINK\]", re.IGNORECASE)
THINKING_OPEN = re.compile(
    rf"<{THOUGHT}>|◁think▷|<\|begin_of_thought\|>|\[THINK\]|<\|channel\|>\s*(?:analysis|commentary)", re.IGNORECASE
)
FINAL = re.compile(r"<\|channel\|>final[^<]{0,40}<\|message\|>|<\|begin_of_box\|>")  # of harmony's format; of a box
FINAL_END = re.compile(r"(?:<\|(?:return|end|end_of_box)\|>\s*)+\Z")
BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}{1,2}\Z")

FENCE = re.compile(r"\A(?:[^`\n]{0,200}:\s*)?```[\w+-]*[ \t]*\n?([^`]*?)\n?```\Z")
CAPTION_KEYS = ("caption", "description", "text", "image_description", "alt_text", "tags", "answer")
MOST_JSON = 1 << 16  # characters

WRAPPER = re.compile(
    r"\A<(answer|caption|description|response|output|result|final|final_answer|summary|p)>(.*)</\1>\Z",
    re.DOTALL | re.IGNORECASE,
)

QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "「": "」", "『": "』", "'": "'", "‘": "’"}
MARKS = {mark: mark for mark in ("**", "__", "*")}
APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")

CONTENT = (  # what an answer calls itself
    r"(?:(?:(?:image|picture|photo|detailed|short|brief|concise|suggested|final)\ ){0,3}"
    r"(?:captions?|descriptions?|tags|summary|alt[- ]text|keywords)"
    r"|beschreibung|bildbeschreibung|bildunterschrift|légende"
    r"|descripción|leyenda|descrição|legenda|descrizione|didascalia|описание|подпись)"
)
OF_IT = (
    r"(?:\ (?:of|for|des|de|della|dell|del|da)\ ?(?:l['’]|the|this|your)?\ ?"
    r"(?:image|picture|photo|scene|bild(?:es)?|imagen|imagem|immagine))"
)
LABEL = (
    r"(?:图片|圖片|图像|照片|画面)?(?:描述|说明|標題|标题|标签)|(?:画像の)?(?:キャプション|説明文?|タイトル)"
    r"|(?:이미지\ )?(?:설명|캡션|제목)|(?:final\ )?answer|output|response"
)
HERE = (
    r"(?:here(?:['’]s|\ is|\ are)|(?:this|below)\ is|i['’]ll|let\ me|hier\ ist|hier\ sind|voici|aquí\ (?:tienes|está)"
    r"|aqui\ está|ecco|вот)"
)
OPENING = re.compile(
    rf"""\W{{0,40}}(?:[^:\n.!]{{0,60}}[!,.]\s*)??
    (?:{HERE}\b[^:\n.]{{0,80}}?\b{CONTENT}\b[^:\n.]{{0,80}}[:：]
    | the\ {CONTENT}\ (?:for\ (?:this|the)\ \w+\ )?(?:is|could\ be|would\ be|might\ be)\s*:
    | (?:sure|certainly|of\ course|absolutely),?\ i(?:['’]d|['’]ll|\ can|\ would)\b[^:\n.]{{0,80}}:)[*_]*\s*
    | \W{{0,40}}(?:{CONTENT}{OF_IT}?|{LABEL})\s*[\]*]*\s*(?:[:：]|=(?=\s*["'“])|(?<=\]))[*_]*\s*
    | \W{{0,40}}(?:当然|好的|没问题)[！!，,。][^：:\n。]{{0,30}}[：:]\s*
    | \W{{0,40}}(?:以下是|这是)[^：:\n。]{{0,20}}(?:描述|说明|标题)[^：:\n。]{{0,10}}[：:]\s*
    | \W{{0,40}}(?:もちろん(?:です)?|はい)[、。！!][^：:\n。]{{0,40}}[：:。]\s*
    | \W{{0,40}}(?:以下は|こちらは)[^：:\n。]{{0,30}}(?:説明|キャプション)[^：:\n。]{{0,10}}[：:。]\s*
    | (?:sure|okay|certainly),?\ here\ you\ (?:go|are)\s*[:.!]\s*""",
    re.IGNORECASE | re.VERBOSE,
)
INTERJECTION = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|absolutely)\s*!\s*(?=\S)|(?:好的|当然)[！!，,]\s*", re.IGNORECASE
)
ENDING = re.compile(
    r"""(?<=[.!?。！？*"\s])(?:let\ me\ know\ (?:if|how|what)|(?:i\ )?hope\ (?:this|that)\ helps
    |feel\ free\ to\ (?:ask|reach)
    |is\ there\ anything\ else|would\ you\ like\ me\ to|do\ you\ (?:want|need)\ me\ to
    |if\ you\ (?:need|have|would\ like|want)\ (?:any|more|further)\b
    |\(?(?:word|token)\ count:|[\[(]?end\ of\ (?:caption|description)
    |lass\ (?:es\ )?mich\ wissen|ich\ hoffe,\ das\ hilft|n['’]hésitez\ pas|j['’]espère\ que\ cela
    |espero\ que\ (?:esto|isso|te)|avísame\ si|如果(?:您|你)(?:需要|还有)
    |希望(?:这|对)(?:您|你|个|能)?)[^\n]{0,300}\Z""",
    re.IGNORECASE | re.VERBOSE,
)
HEADING = re.compile(  # a line that names what follows
    rf"(?:#{{1,6}}[ \t]+|\*\*)[^\n]{{0,40}}\b{CONTENT}{OF_IT}?[ \t]*[:：]?[ \t]*(?:\*\*)?[:：]?[ \t]*\n\s*",
    re.IGNORECASE,
)
TITLE = re.compile(rf"\W*{CONTENT}{OF_IT}?\W*", re.IGNORECASE)
BULLET = re.compile(r"^[ \t]*(?:[-*•][ \t]+|#{1,6}[ \t]+)", re.MULTILINE)
NUMBERED = re.compile(r"^[ \t]*\d{1,2}[.)][ \t]+", re.MULTILINE)
LISTED = re.compile(r"[ \t]*(?:[-*•]|\d{1,2}[.)])[ \t]+([^\n]{0,80}[^\n.!?。])[ \t]*")  # a few words of a list
BOLD = re.compile(r"\*\*(\S(?:[^*\n]{0,400}\S)?)\*\*")
INVISIBLE = frozenset("\ufeff\u200b\u2060\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


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
    for pattern in (HEADING, OPENING, INTERJECTION):
        if (opening := pattern.match(text)) and re.search(r"\w", text[opening.end() :]):
            text = _closed(text, opening.end()).strip()
    if (ending := ENDING.search(text)) and re.search(r"\w", text[: ending.start()]):
        text = text[: ending.start()].strip()
    return _unquoted(_plain(_unwrapped(text)))


def _closed(text: str, start: int) -> str:
    """Cut an opening, and what closes a mark that it has opened: `[Caption: ...]`, `**Caption: ...**`."""
    for mark, end in (("[", "]"), ("(", ")"), ("**", "**"), ("*", "*")):
        opening, rest = text[:start], text[start:]
        if opening.count(mark) % 2 and end not in opening.partition(mark)[2] and rest.count(end) == 1:
            return rest.replace(end, "")
    return text[start:]


def _plain(text: str) -> str:
    """Take the marks of Markdown away: headings, bullets, numbers of a list, bold. Listed words get commas."""
    lines = [line for line in text.splitlines() if line.strip()]
    listed = [item for line in lines if (item := LISTED.fullmatch(line))]
    if 1 < len(listed) == len(lines):
        return BOLD.sub(r"\1", ", ".join(item[1].strip(" ,") for item in listed))
    if BULLET.match(text) or "\n" in text:
        text = BULLET.sub("", text)
    if text[:2] in ("1.", "1)"):
        text = NUMBERED.sub("", text)
    return BOLD.sub(r"\1", text).strip()


def _unquoted(text: str) -> str:
    """Take a text out of quotes that stand around the whole of it, and around nothing else."""
    for opening, closing in (QUOTES | MARKS).items():
        if len(text) > 2 * len(opening) and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            bare = APOSTROPHE.sub("", inner)
            if opening not in bare and closing not in bare and re.search(r"\w", bare):
                return inner.strip()
    return text


def _without_thinking(text: str) -> str:
    """Cut thinking that has an end; the opening may be a part of the prompt, and be missing."""
    if finals := [match.end() for match in FINAL.finditer(text)]:
        return FINAL_END.sub("", text[finals[-1] :])
    if boxed := BOXED.match(text):
        return boxed[1]
    ends = [match.end() for match in THINKING_END.finditer(text)]
    if not ends:
        return text
    after, opening = text[ends[-1] :], THINKING_OPEN.search(text)
    return after if opening is None or re.search(r"\w", after) else text[: opening.start()]


def strip_controls(text: str) -> str:
    """Remove control characters but white space, byte order marks, and what is not seen or turns the direction."""
    return "".join(c for c in text if c.isspace() or (unicodedata.category(c) != "Cc" and c not in INVISIBLE))


def _unwrapped(text: str) -> str:
    """Take the text out of a fence, a tag or a JSON object, where nothing stands beside it."""
    if fence := FENCE.match(text):
        return fence[1].strip()
    if wrapper := WRAPPER.match(text):
        return wrapper[2].strip()
    if text[:1] in ("{", "[") and text[-1:] in ("}", "]") and len(text) <= MOST_JSON:
        for parse in (json.loads, ast.literal_eval):  # some write Python's quotes
            try:
                return _caption_in(parse(text)) or text
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
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
