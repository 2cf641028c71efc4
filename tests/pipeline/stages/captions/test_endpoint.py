"""Captions of a server on loopback that is slow, busy, broken, or answers nonsense; retries, and the spend limit."""

import asyncio
import base64
import io
import json
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from microdit.pipeline.base.errors import RequestError, ServerRejects
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.stages.captions import chat
from microdit.pipeline.stages.captions.chat import BadAnswer, parse
from microdit.pipeline.stages.registry import stages_of
from tests.pipeline.helpers.stage_outputs import check_rows, config, lines, make, start

GOOD = "A square of many colours lies on a table, seen from above."
KEY = "TEST_ENDPOINT_KEY"


def completion(text: object = GOOD, reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}], "usage": usage, **more}


@dataclass
class Server:
    """`faults`: what the next requests meet, in order: a status, seconds to wait, or a body; then all is well."""

    url: str = ""
    faults: list[Any] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    answer: Callable[[dict[str, Any]], Any] = lambda body: completion()
    requests: list[dict[str, Any]] = field(default_factory=list)
    fired: Counter[Any] = field(default_factory=Counter)
    keys: set[str | None] = field(default_factory=set)
    now: int = 0
    most_at_once: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            body = await request.json()
            self.requests.append(body)
            self.keys.add(request.headers.get("Authorization"))
            await asyncio.sleep(0.01)
            fault = self.faults.pop(0) if self.faults else None
            if fault is not None:
                self.fired[str(fault)[:20]] += 1
            if isinstance(fault, int):
                return web.Response(status=fault, text="no", headers=self.headers)
            if isinstance(fault, float):
                await asyncio.sleep(fault)
            if isinstance(fault, bytes):
                return web.Response(body=fault, content_type="application/json")
            if fault == "hang up" and request.transport is not None:
                request.transport.close()
            answer = self.answer(body)
            return answer if isinstance(answer, web.Response) else web.json_response(answer)
        finally:
            self.now -= 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.02)
    found, loop, up = Server(), asyncio.new_event_loop(), threading.Event()

    async def begin() -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", found.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        up.set()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(begin())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert up.wait(30)
    yield found
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return start(tmp_path / "corpus")


def asked(server: Server, **more: Any) -> dict[str, Any]:
    return {"captions/vl": {"endpoint": server.url, "model": "some-vl", "image_side": 48, **more}}


def captions(corpus: Corpus, server: Server, **more: Any) -> list[Commit]:
    return make(corpus, asked(server, **more))["captions/vl"]


def outcomes(corpus: Corpus, commits: list[Commit]) -> Counter[str]:
    return Counter(line["reason"] or line["caption"] for line in lines(corpus, commits) if line["reason"] != "upstream")


def test_every_image_is_asked_about_with_few_requests_at_once(
    corpus: Corpus, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "sesame")
    made = captions(corpus, server, concurrency=3, api_key_env=KEY, prompt="What is this?", max_tokens=50)
    check_rows(corpus, made, "images")
    assert outcomes(corpus, made) == {GOOD: 10}
    assert len(server.requests) == 10 and 1 < server.most_at_once <= 3 and server.keys == {"Bearer sesame"}
    seeds = set()
    for body in server.requests:
        image, text = body["messages"][0]["content"]
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("some-vl", 50, 0.0)
        assert text == {"type": "text", "text": "What is this?"}
        data = image["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.format == "JPEG" and max(picture.size) == 48
        seeds.add(body["seed"])
    assert len(seeds) == 10  # one for each key
    stage = corpus.column("captions/vl").made_by
    assert (stage["captioner"], stage["prompt"], stage["kind"]) == ("some-vl", "What is this?", "long")
    assert server.url not in json.dumps(stage) and "sesame" not in json.dumps(stage)


def test_where_it_runs_and_how_much_at_once_is_no_part_of_a_column(corpus: Corpus, server: Server) -> None:
    captions(corpus, server)
    more = {"concurrency": 2, "price_in": 1, "price_out": 1, "max_spend": 9}
    for stage in stages_of(config(Path(corpus.url), asked(Server(url="https://elsewhere/v1"), **more))):
        for column, spec in stage.columns.items():
            assert spec.stage == corpus.column(column).made_by


def test_what_passes_is_tried_again(corpus: Corpus, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "REQUEST_SECONDS", 2.0)
    server.faults = [429, 500, 503, 30.0, "hang up", 502]
    began = time.monotonic()
    made = captions(corpus, server, concurrency=2)
    assert outcomes(corpus, made) == {GOOD: 10}
    assert server.fired == {"429": 1, "500": 1, "503": 1, "30.0": 1, "hang up": 1, "502": 1}
    assert len(server.requests) == 16 and time.monotonic() - began < 25


def test_retry_after_is_kept_to(corpus: Corpus, server: Server) -> None:
    server.faults, server.headers = [429, 429], {"Retry-After": "0.8"}
    began = time.monotonic()
    made = captions(corpus, server, concurrency=1)
    assert outcomes(corpus, made) == {GOOD: 10} and server.fired["429"] == 2
    assert time.monotonic() - began > 1.6


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>busy</html>", "bad_answer"),
        (b'{"choices": []}', "bad_answer"),
        (b'{"choices": [{"message": {"content": null}}]}', "bad_answer"),
        (b"[" * 100_000, "bad_answer"),
        (b"x" * (chat.MOST_BYTES + 1), "too_long"),
    ],
)
def test_nonsense_is_asked_for_once_more_and_recorded(corpus: Corpus, server: Server, body: bytes, reason: str) -> None:
    server.faults = [body] * 2 + [body]  # the first image hears it twice, the second once
    made = captions(corpus, server, concurrency=1)
    assert outcomes(corpus, made) == {GOOD: 9, reason: 1}
    assert sum(server.fired.values()) == 3 and sum(commit.timings["again"] for commit in made) == 2


def test_answers_that_are_no_captions_are_recorded(corpus: Corpus, server: Server) -> None:
    said = iter(["I'm sorry, I can't help.", "I'm sorry, I can't help.", "dog " * 9, GOOD])
    server.answer = lambda body: completion(next(said, GOOD))
    assert outcomes(corpus, captions(corpus, server, concurrency=1)) == {GOOD: 9, "refusal": 1}
    assert [body["temperature"] for body in server.requests[:4]] == [0.0, 0.7, 0.0, 0.7]


def test_an_image_that_the_server_does_not_take_fails_alone(corpus: Corpus, server: Server) -> None:
    server.faults = [400, 400]
    assert outcomes(corpus, captions(corpus, server, concurrency=1)) == {GOOD: 9, "http_400": 1}


def test_an_image_that_breaks_the_server_fails_alone(corpus: Corpus, server: Server) -> None:
    server.faults = [500] * chat.TRIES
    assert outcomes(corpus, captions(corpus, server, concurrency=1)) == {GOOD: 9, "http_500": 1}


def test_a_server_that_is_down_fails_the_shard_and_no_image(corpus: Corpus, server: Server) -> None:
    server.faults = [503] * 1000
    with pytest.raises(OSError, match=r"4 images unanswered, the last with http_503: no"):
        captions(corpus, server, concurrency=4)
    assert corpus.commits("captions/vl") == [] and server.fired["503"] >= 4 * chat.TRIES


@pytest.mark.parametrize("fault", [400, 422, b'{"error": {"message": "no model of that name"}}', b"<html>hello</html>"])
def test_a_server_that_rejects_all_commits_nothing(corpus: Corpus, server: Server, fault: int | bytes) -> None:
    server.faults = [fault] * 1000
    with pytest.raises(
        ServerRejects, match=r"4 requests rejected, the last with (http_4|bad_answer: .*(no model|hello))"
    ):
        captions(corpus, server, concurrency=1)
    assert corpus.commits("captions/vl") == [] and len(server.requests) == 8


def test_a_quota_that_is_used_up_ends_the_build(corpus: Corpus, server: Server) -> None:
    server.answer = lambda body: web.json_response({"error": {"code": "insufficient_quota"}}, status=429)
    with pytest.raises(RequestError, match=r"answers 429: .*insufficient_quota.*; add credit there"):
        captions(corpus, server, concurrency=1)
    assert len(server.requests) == 1


def test_content_as_a_list_of_parts_is_joined(corpus: Corpus, server: Server) -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": GOOD[:9]}, {"text": GOOD[9:]}]
    server.answer = lambda body: completion(parts)
    assert outcomes(corpus, captions(corpus, server)) == {GOOD: 10}


@pytest.mark.parametrize("reason", ["content_filter", "error", "abort", None])
def test_what_did_not_end_by_itself_is_no_caption(corpus: Corpus, server: Server, reason: str | None) -> None:
    ends = iter([reason, reason])
    server.answer = lambda body: completion(reason=next(ends, "stop"))
    assert outcomes(corpus, captions(corpus, server, concurrency=1)) == {GOOD: 9, "cut_off": 1}


@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_wrong_key_or_url_ends_the_build(corpus: Corpus, server: Server, status: int) -> None:
    server.faults = [status] * 1000
    with pytest.raises(RequestError, match=f"it answers {status}: no; check the URL, the model and the key"):
        captions(corpus, server)
    assert len(server.requests) <= 16  # and nothing is tried again


def test_a_key_that_is_not_there_is_told(corpus: Corpus, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"columns.captions/vl.api_key_env = '{KEY}': .* has no such variable; set it here and where the workers"
    for value in (None, ""):
        monkeypatch.delenv(KEY, raising=False) if value is None else monkeypatch.setenv(KEY, value)
        with pytest.raises(RequestError, match=message):  # before a build begins
            stages_of(config(Path(corpus.url), asked(server, api_key_env=KEY)))
    monkeypatch.setenv(KEY, "sesame")
    (stage,) = stages_of(config(Path(corpus.url), asked(server, api_key_env=KEY)))
    taken = pickle.dumps(stage)
    assert b"sesame" not in taken
    monkeypatch.delenv(KEY)
    with pytest.raises(RequestError, match=message):  # on another machine, which does not have it
        pickle.loads(taken).load()
    assert server.requests == []


def test_the_build_stops_at_its_spend_limit(corpus: Corpus, server: Server) -> None:
    """An answer costs 1000 * 2 + 100 * 10 millionths: 0.003. The first shard has six images, the second four."""
    prices = {"price_in": 2.0, "price_out": 10.0, "concurrency": 1}
    with pytest.raises(RequestError, match=r"max_spend = 0.02 is reached: the committed shards cost 0.018, and the "):
        captions(corpus, server, max_spend=0.02, **prices)
    (first,) = corpus.commits("captions/vl")
    assert first.timings["spend"] == pytest.approx(0.018) and first.timings["tokens_read"] == 6000
    assert len(server.requests) == 7  # the seventh is what reached it
    with pytest.raises(RequestError, match=r"max_spend = 0.018 is reached: the committed shards cost 0.018\. Raise"):
        captions(corpus, server, max_spend=0.018, **prices)
    assert len(server.requests) == 7


def test_a_server_that_does_not_count_has_no_limit(corpus: Corpus, server: Server) -> None:
    server.answer = lambda body: completion(usage=None)
    assert sum(outcomes(corpus, captions(corpus, server)).values()) == 10
    other = start(Path(corpus.url) / "other")
    with pytest.raises(RequestError, match=r"does not say how many tokens .*; leave max_spend out"):
        captions(other, server, max_spend=1, price_in=1, price_out=1)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize("key", ["sk-0123456789", 'sk/"quoted"/0123'])
def test_a_key_that_the_server_repeats_is_not_kept(
    key: str, corpus: Corpus, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, key)
    words = [f"bad key {key}", json.dumps({"error": {"message": f"bad key {key}"}}), "x" * 195 + key]
    answers = [web.Response(status=status, text=text) for text in words for status in (200, 400)]
    answers.append(web.json_response(completion(f"{GOOD} {key}")))
    server.answer = lambda body: answers.pop() if answers else web.json_response(completion())
    made = captions(corpus, server, api_key_env=KEY)
    kept = json.dumps(lines(corpus, made))
    assert "0123" not in kept and "[API key]" in kept
    monkeypatch.setattr(server, "answer", lambda body: web.Response(status=401, text=words[0]))
    with pytest.raises(RequestError, match=r"it answers 401: bad key \[API key\]") as caught:
        asyncio.run(_ask(server, key))
    assert "0123" not in str(caught.value)


async def _ask(server: Server, key: str) -> None:
    async with aiohttp.ClientSession() as session:
        await chat.ask(session, server.url, key, {})


@given(st.binary(max_size=200) | JSON.map(lambda found: json.dumps({"choices": found}).encode()))
def test_any_bytes_are_an_answer_or_none(data: bytes) -> None:
    try:
        found = parse(data)
    except BadAnswer as error:
        assert error.reason == "bad_answer" and len(str(error)) < 1000
    else:
        assert isinstance(found.text, str)
