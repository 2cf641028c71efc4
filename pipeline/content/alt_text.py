"""Clean alt-texts of web pages as the paper does for CC12M, with the rules of DeepFloyd-IF's caption processor.

Written from what that processor is known to do: markup, addresses, ids, file names, shop phrases and odd punctuation
are removed; the rest is lower-case words. The rules apply in order, each to the result of the one before. Every pattern
is bounded or free of nested repeats, so that a hostile text takes time linear in its length.
"""

import html
import re
from urllib.parse import unquote_plus

import ftfy

MAX_LENGTH = 4096  # characters; no useful caption is longer, and hostile markup takes time in the square of it
_URL = r"\b(?:https?://|www\.)[^\s<>\"']{1,2000}"
_HOST = r"\b[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){0,4}\.(?:com|co|ru|net|org|edu|gov|it|info)\b(?:/[^\s]{0,2000})?"


# pattern, replacement, reason
_FIRST = (
    (r"<person>", "person", "CC12M's replacement of a name"),
    (_URL, "", "addresses of pages"),
    (_HOST, "", "the same without a scheme"),
)

_RULES = (
    (r"@[\w]{1,100}\b", "", "names of accounts"),
    (r"[\u31c0-\u31ff\u3200-\u4dbf\u4e00-\u9fff\u31f0-\u31ff]{1,10000}", "", "Chinese and Japanese signs"),
    (r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
     r"\ufe63\uff0d]{1,10000}", "-", "every kind of dash"),
    (r"[`´«»“”¨]", '"', "every kind of double quote"),
    (r"[‘’]", "'", "every kind of single quote"),
    (r"&quot;?", "", "what is left of HTML's quotes"),
    (r"&amp", "", "and of its &"),
    (r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b", " ", "addresses of machines"),
    (r"\b\d:\d\d\s+$", "", "the number of an article at the end"),
    (r"\\n", " ", "line ends that were written out"),
    (r"#\d{1,3}\b", "", "short numbers with a #"),
    (r"#\d{5,50}\b", "", "long ones"),
    (r"\b\d{6,50}\b", "", "ids"),
    (r"\b[\S]{1,200}\.(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)\b", "", "names of files"),
    (r"[\"']{2,10000}", '"', "runs of quotes"),
    (r"\.{2,10000}", " ", "ellipses"),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]}{|\\/*]{1,10000}", " ", "signs that are not spoken"),
    (r" \. ", " ", "a lone dot"),
)  # fmt: skip

_LAST = (
    (r"\b[a-z]{1,3}\d{3,15}\b", "", "codes: jc6640"),
    (r"\b[a-z]{1,30}\d{1,30}[a-z]{1,30}\b", "", "codes: jc6640vc"),
    (r"\b\d{1,30}[a-z]{1,30}\d{1,30}\b", "", "codes: 6640vc231"),
    (r"\b(?:worldwide\s{1,5})?(?:free\s{1,5})?shipping\b", "", "shops"),
    (r"\b(?:free\s{1,5})?download(?:\s{1,5}free)?\b", "", "shops"),
    (r"\bclick\b\s{0,5}(?:for|on)\s{1,5}\w{1,50}", "", "click on this"),
    (r"\b(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)(?:\s{1,5}images?)?\b", "", "kinds of files"),
    (r"\bpage\s{1,5}\d{1,10}\b", "", "page 7"),
    (r"\b\d{0,10}[a-z]{1,10}\d{1,10}[a-z]{1,10}\d{1,10}[a-z0-9]{0,50}", " ", "codes: j2d1a2a"),
    (r"\b\d{1,10}\.?\d{0,10}[xх×]\d{1,10}\.?\d{0,10}\b", "", "sizes: 1000x1000"),
    (r"\b\s{1,20}:\s{1,20}", ": ", "white space before a colon"),
    (r"(\D[,./])\b", r"\1 ", "no space behind punctuation"),
    (r"\s{1,10000}", " ", "white space"),
)

_QUOTED = re.compile(r"^[\"'](.{1,4096})[\"']$", re.DOTALL)
_ENDS = re.compile(r"^[\'_,\-:]{1,100}|[\'_,\-:+]{1,100}$|^\.\S{1,100}$")
_TAG = re.compile(r"""<(?:[/?]?[a-z]|![a-z[])(?:[^<>"']|"[^"]*"|'[^']*')*+>""")
_MANY_DASHES = re.compile(r"[-_]")


def clean_caption(text: str) -> str:
    """Reduce a caption to lower-case words; empty if nothing is left. The rules are applied twice, as in the paper."""
    text = text[:MAX_LENGTH].encode("utf-8", "replace").decode()
    return _once(_once(text))


def _once(text: str) -> str:
    text = _apply(_FIRST, unquote_plus(text).strip().lower())
    text = _apply(_RULES, _without_markup(text))
    if len(_MANY_DASHES.findall(text)) > 3:  # the_name-of_a-file
        text = _MANY_DASHES.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = _apply(_LAST, text).strip()
    text = _QUOTED.sub(r"\1", text)
    return _ENDS.sub("", text.strip()).strip().encode("utf-8", "replace").decode()


def _apply(rules: tuple[tuple[str, str, str], ...], text: str) -> str:
    for pattern, replacement, _ in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _without_markup(text: str) -> str:
    """Remove the tags of a piece of HTML; incomplete ones stay.

    The standard library's parser raises at `<![x[`, and takes seconds for tags that are never closed.
    """
    parts, at = [], 0
    while (start := text.find("<", at)) >= 0:
        if text.startswith("<!--", start):
            end = close + 3 if (close := text.find("-->", start)) > 0 else 0
        else:
            end = tag.end() if (tag := _TAG.match(text, start)) else 0
        if end <= start + 1:  # it is not closed: a sign like any other
            end = start + 1
            parts.append(text[at:end])
        else:
            parts.append(text[at:start])
        at = end
    return html.unescape("".join([*parts, text[at:]]))
