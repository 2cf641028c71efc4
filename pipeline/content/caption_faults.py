"""Detect answers of a captioner that are no captions: empty, refusals, loops, leaks, another language, cut off."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from microdit.pipeline.content.caption_answers import OPENING, THINKING_OPEN

SURROGATES = re.compile("[\ud800-\udfff]")


# each letter of a script without spaces is a word
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+(?:['’]\w+)*")

# what a model does not do, where it refuses
DOES = (
    r"(?:see|view|assist|help|describe|identify|provide|access|analy[sz]e|generate|create|fulfil|caption"
    r"|process|interpret|determine|recogni[sz]e|open|display|continue|do\ (?:that|this)|answer|discuss|engage|comment"
    r"|produce|share|make|give|comply|offer|complete|directly|tell|read|write|look)"
)
REFUSAL = re.compile(
    rf"""\W*(?:(?:i['’]?m|i\ am)\ (?:really\ |very\ |so\ )?sorry\s*(?:[,.;:!—–-]|but\b|i\b|for\ (?:any
        |the\ conf|the\ inc)|$)
        (?!\s*(?:["”]|we\b|mom|dad|mum))
    | (?:sorry|apologies),?\ (?:but\ )?(?:i\ (?:can|could|am\ (?:not|un)|won|do|don)|i['’]m\ (?:not|un))
    | i\ apologi[sz]e\b
    | (?:unfortunately,?\ )?i\ (?:can(?:['’]?t|\ ?not)|could\ ?n['’]?t|won['’]?t)\ (?:\w+ly\ )?{DOES}\b
    | (?:unfortunately,?\ )?(?:i\ am|i['’]m)\ (?:not\ able|unable)\b
    | as\ an?\ (?:ai\b(?!\ (?:art|image|render))|artificial\ intelligence|(?:large\ )?language\ model|vision\b)
    | (?:es\ tut\ mir\ leid|tut\ mir\ leid),?\ (?:aber\ |ich\b|da)
    | (?:leider\ )?(?:ich\ )?kann\ ich\ (?:leider\ )?(?:nicht|keine)\b | ich\ kann\ (?:leider\ )?(?:nicht
        |keine|dabei)\b
    | (?:je\ suis\ )?désolée?,?\ (?:mais\ )?je\b | je\ ne\ (?:peux|suis)\ pas\b
    | lo\ siento,?\ (?:pero\b|no\b) | no\ puedo\ (?:ayudar|describir|identificar|ver|proporcionar)\b
    | (?:me\ )?desculpe,?\ (?:mas\b|não\b) | não\ posso\ (?:ajudar|descrever|identificar|ver)\b
    | mi\ dispiace,?\ (?:ma\b|non\b) | non\ posso\ (?:aiutar|descrivere|identificare|vedere)
    | (?:извините|простите|к\ сожалению),?\ (?:но\ )?я\b | я\ не\ могу\b
    | (?:很?抱歉|对不起|對不起)[，,]?\ *(?:但|但是)?我 | 我(?:无法|無法|不能)(?:看到|查看|描述|识别|提供|协助|帮助)
    | (?<![「『])申し訳(?:ありません|ございません) | (?<!["“'])죄송(?:합니다|하지만)
    )""",
    re.IGNORECASE | re.VERBOSE,
)

NO_IMAGE = re.compile(
    r"""\W*(?:(?:i['’]?m|i\ am)\ (?:\w+\ )?sorry[,.]?\s*|sorry[,.]?\s*|i\ apologi[sz]e[,.]?\s*
        |unfortunately[,.]?\s*)?(?:but\s+)?(?:
      i\ (?:do\ ?n['’]?o?t|can(?:['’]?t|\ ?not)|am\ not\ able\ to)\ (?:currently\ |actually\ )?(?:see|find
        |have)\ (?:any\ |an\ |the\ )?
        (?:image|picture|photo|attachment)s?\b(?!\ in\ the\ mirror)
    | (?:there\ (?:is|was|seems\ to\ be|appears\ to\ be)\ )?no\ (?:image|picture|photo)\ (?:was|is|has\ been
        |seems|appears)?\ ?(?:to\ be\ )?
        (?:been\ )?(?:attached|provided|uploaded|shared|included|given)\b(?=\W*(?:$|please|could|can|to\b
        |in\ your|with\ your|yet|for\ me|here|so))
    | (?:it\ )?(?:looks|seems|appears)\ (?:like|that|as\ if|as\ though)\ (?:no\ |the\ |an\ |your[ ]
        |you\b)[^.]{0,40}
        (?:attach|provid|upload|load|shar|includ|display|come\ through)
    | you\ (?:haven['’]t|have\ not|didn['’]t|did\ not)\ (?:\w+\ )?(?:attach|provid|upload|shar|includ)
    | (?:please|could\ you\ (?:please\ )?|can\ you\ (?:please\ )?)\ ?(?:re-?)?(?:upload|provide|share|attach
        |send)\ (?:me\ )?(?:the|an|your|a)\b
    | ich\ (?:sehe|kann)\ (?:leider\ )?kein(?:e|en)?\ (?:bild|foto)|es\ (?:wurde
        |ist)\ (?:leider\ )?kein\ bild\ (?:angehängt|hochgeladen|vorhanden|beigefügt)
    | bitte\ (?:laden\ sie|lade)\ [^.]{0,20}(?:bild|foto)
    | je\ ne\ vois\ (?:pas|aucune)\ (?:d['’])?(?:image|photo)|aucune\ image\ n['’]a\ été
        |veuillez\ (?:télécharger|fournir|joindre|partager)
    | no\ veo\ (?:ninguna|la)\ (?:imagen|foto)|por\ favor,?\ (?:sube|suba|proporciona|adjunta|comparte|envie
        |envia)
    | não\ (?:vejo|consigo\ ver)\ (?:nenhuma|a)\ (?:imagem|foto)|non\ vedo\ (?:alcuna|nessuna)\ (?:immagine
        |foto)
    | я\ не\ вижу\ (?:никакого\ )?(?:изображени|картинк|фото)|пожалуйста,?\ (?:загрузите|прикрепите|отправьте)
    | (?:我)?(?:没有|沒有|未能?|无法|無法|看不到)(?:看到|收到|查看)?(?:任何|您上传的|你上传的)?
        (?:图片|圖片|图像|圖像|照片)
    | 请(?:您)?(?:上传|提供|发送|重新上传)[^。]{0,10}(?:图|照)
    | 画像(?:が|は)(?:見え|見当たり|添付されてい|提供されてい|表示されてい|アップロードされてい)ませ
    | 画像を(?:アップロード|添付|提供|送信)して
    | 이미지(?:가|를)\ (?:보이지|첨부되지|제공되지|찾을\ 수|볼\ 수|업로드해|첨부해|제공해)
    )""",
    re.IGNORECASE | re.VERBOSE,
)

LEAKED = re.compile(
    r"<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|<(?:unk|pad|bos|eos|image|video|start_of_turn|end_of_turn|image_soft_token|loc_?\d+"
    r"|extra_id_\d+|0x[0-9A-Fa-f]{2})>|</?(?:box|ref|quad|point|poly|img|tool_call|function_call)>|\[/?INST\]|<</?SYS>>"
    r"|\A(?:assistant|<s>)\s*\n|(?:^|\n)(?:###\ *)?(?:ASSISTANT|USER|Human|Assistant):",
)
NOTHING = re.compile(r"\W*(?:none|null|undefined|n/a|nan)\W*", re.IGNORECASE)

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
    if phrase := repeated([word.lower() for word in words]):
        return "loop", f"{phrase[:60]!r} again and again: {shown}"
    if (other := other_language(text, language)) is not None:
        return "wrong_language", f"{other}, expected {language}: {shown}"
    if not finished and (kind == "tags" or not SENTENCE_END.search(text)):
        return "cut_off", f"no end after {len(words)} words: ...{text[-100:]}"
    return None


def _is_boilerplate(text: str) -> bool:
    """Recognise an opening that no caption follows, and an object or a fence that no caption was found in."""
    opening = OPENING.match(text)
    empty = opening is not None and not WORD.search(text[opening.end() :])
    return empty or text.startswith("```") or (text[0] == "{" and text[-1] == "}" and '":' in text)


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
