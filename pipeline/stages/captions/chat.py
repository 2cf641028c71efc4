"""Asking a server that speaks as OpenAI's does about one image: retries, bounds, and what an answer may be."""

import asyncio
import base64
import json
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
PASSING = (408, 409, 425, 429, *range(500, 600))  # these statuses may be others a moment later


class BadAnswer(ValueError):
    """What came for this image is no answer: `reason` is a code to group by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Unanswered(BadAnswer):
    """The server did not answer, so often as it was asked; it may another time."""


@dataclass(frozen=True)
class Reply:
    """What the server said, whether it came to an end, and the tokens that it read and wrote (None: it did not say)."""

    text: str
    finished: bool
    read: int | None
    wrote: int | None


def request(model: str, prompt: str, jpeg: bytes, max_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
    """The body of a request. A server that knows no seeds leaves them out of account."""
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

    Between two tries it waits as long as Retry-After says, else twice as long as before, up to `LONGEST_WAIT`.

    Raises:
        Unanswered: it was not, for a reason that may pass: busy, broken, slow.
        BadAnswer: the server takes this request for wrong, or its answer is none.
        RequestError: it would answer no other request: the key, the URL or the model is wrong.
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
                data = await _bounded(response)
                if response.status == 200:
                    return parse(data)
                fault = (f"http_{response.status}", data[:200].decode("utf-8", "replace"))
                asked = retry_after(response.headers.get("Retry-After"))
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            name = "timeout" if isinstance(error, TimeoutError) else "connection"
            fault, status = (name, f"{type(error).__name__}: {error}"), PASSING[0]
        alive()
        if status not in PASSING:
            if status in (400, 413, 415, 422):
                raise BadAnswer(*fault)
            raise RequestError(f"endpoint {url}: it answers {status}: {fault[1]}; check the URL, the model and the key")
        pause = backoff.next_pause()
        if pause is None:
            raise Unanswered(*fault)
        await asyncio.sleep(min(asked or pause, LONGEST_WAIT))


def parse(data: bytes) -> Reply:
    """A chat completion.

    Raises:
        BadAnswer: it is none.
    """
    try:
        found = json.loads(data)
        choice = found["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        usage = found.get("usage")
        usage = usage if isinstance(usage, dict) else {}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        shown = data[:200].decode("utf-8", "replace")
        raise BadAnswer("bad_answer", f"{type(error).__name__}: {error}: {shown}") from None
    return Reply(text.strip(), reason != "length", _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


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
