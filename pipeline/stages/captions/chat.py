"""Asking a server that speaks as OpenAI's does about one image: retries, bounds, and what an answer may be."""

import asyncio
import base64
import json
import re
from dataclasses import dataclass
from typing import Any

import aiohttp

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.retry import Backoff, retry_after

TRIES = 6
FIRST_WAIT = 1.0  # seconds before the second try; twice as long before each further one
LONGEST_WAIT = 60.0  # also where the server asks for more
REQUEST_SECONDS = 180.0
MOST_BYTES = 1 << 20  # of an answer
SECRET = 8  # characters of a key that is one; servers without keys are given words like EMPTY
USED_UP = re.compile("insufficient_quota|billing_hard_limit|credit balance", re.IGNORECASE)  # a 429 that stays
PASSING = (408, 409, 425, 429, *range(500, 600))  # these statuses may be others a moment later


class BadAnswer(ValueError):
    """Unusable answer for this image: `reason` is a code to group by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Unanswered(BadAnswer):
    """The server did not answer, so often as it was asked; it may another time."""


@dataclass(frozen=True)
class Reply:
    """Reply of the server, and the tokens that it read and wrote (None: not reported)."""

    text: str
    ended: str | None
    """Its `finish_reason`: `stop`, `length` (it was cut at `max_tokens`), or something that is no end of an answer."""
    read: int | None
    wrote: int | None

    @property
    def finished(self) -> bool:
        """The model ended by itself."""
        return self.ended == "stop"


def request(model: str, prompt: str, jpeg: bytes, max_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
    """Build the body of a request. A server that knows no seeds leaves them out of account."""
    image = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": prompt}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed % (1 << 31),
    }


async def ask(session: aiohttp.ClientSession, url: str, key: str | None, body: dict[str, Any]) -> Reply:
    """Send a request to `url` + /chat/completions until it is answered, at most `TRIES` times.

    What the server says is kept without the key, which some repeat in their errors.
    Between two tries it waits as long as Retry-After says, else twice as long as before, up to `LONGEST_WAIT`.

    Raises:
        Unanswered: it was not, for a reason that may pass: busy, broken, slow.
        BadAnswer: the server rejects this request, or its reply is not a chat completion.
        RequestError: it would answer no other request: the key, the URL or the model is wrong, or nothing is left
            of what was paid.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    backoff = Backoff(FIRST_WAIT, jitter=(0.75, 1.25), tries=TRIES)
    while True:
        asked = None
        try:
            async with session.post(
                f"{url.rstrip('/')}/chat/completions",
                json=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
                allow_redirects=False,
            ) as response:
                data = without_key(await _bounded(response), key)
                if response.status == 200:
                    return parse(data)
                fault = (f"http_{response.status}", data[:200].decode("utf-8", "replace"))
                asked = retry_after(response.headers.get("Retry-After"))
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            name = "timeout" if isinstance(error, TimeoutError) else "connection"
            words = without_key(f"{type(error).__name__}: {error}".encode(), key)
            fault, status = (name, words.decode("utf-8", "replace")), PASSING[0]
        alive()
        if status not in PASSING:
            if status in (400, 413, 415, 422):
                raise BadAnswer(*fault)
            raise RequestError(f"endpoint {url}: it answers {status}: {fault[1]}; check the URL, the model and the key")
        if status == 429 and USED_UP.search(fault[1]):
            raise RequestError(f"endpoint {url}: it answers 429: {fault[1]}; add credit there, and run this again")
        pause = backoff.next_pause()
        if pause is None:
            raise Unanswered(*fault)
        await asyncio.sleep(min(asked or pause, LONGEST_WAIT))


def without_key(data: bytes, key: str | None) -> bytes:
    """Replace an API key in a server's words, also as JSON spells it."""
    if key is None or len(key) < SECRET:
        return data
    plain = json.dumps(key)[1:-1]
    for spelled in (key, plain, plain.replace("/", "\\/")):
        data = data.replace(spelled.encode("utf-8", "surrogateescape"), b"[API key]")
    return data


def parse(data: bytes) -> Reply:
    """Parse a chat completion.

    Raises:
        BadAnswer: it is none.
    """
    shown = data[:200].decode("utf-8", "replace")
    try:
        found = json.loads(data)
        if isinstance(found, dict) and found.get("error") and not found.get("choices"):
            raise BadAnswer("bad_answer", f"error: {_text(found['error'])[:200]}")
        choice = found["choices"][0]
        text, reason = _content(choice["message"]["content"]), choice.get("finish_reason")
        usage = found.get("usage")
        usage = usage if isinstance(usage, dict) else {}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, BadAnswer):
            raise
        raise BadAnswer("bad_answer", f"{type(error).__name__}: {error}: {shown}"[:500]) from None
    ended = reason if isinstance(reason, str) else None
    return Reply(text.strip(), ended, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _content(content: Any) -> str:
    """Return the text of a message, which may come as a list of parts.

    Raises:
        TypeError: it is no text.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        return "".join(part if isinstance(part, str) else _content(part["text"]) for part in content if _is_text(part))
    raise TypeError(f"content is {type(content).__name__}")


def _is_text(part: Any) -> bool:
    """Tell the parts that are text from those that are thinking and the like."""
    return isinstance(part, str) or part.get("type", "text") in ("text", "output_text")


def _text(error: Any) -> str:
    """Return the server's words about an error."""
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else json.dumps(error)


def _count(usage: dict[str, Any], name: str) -> int | None:
    found = usage.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    found = b""
    while chunk := await response.content.read(MOST_BYTES):
        found += chunk
        if len(found) > MOST_BYTES:
            raise BadAnswer("too_long", f"an answer of more than {MOST_BYTES} bytes")
    return found
