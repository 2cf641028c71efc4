"""Answers that change the corpus, by adding to it: selections and marks."""

import getpass
import json
import socket
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.marks import LONGEST_NOTE, WORDS, Mark
from microdit.pipeline.explore import rows
from microdit.pipeline.explore.condition import CHOICE, checked
from microdit.pipeline.explore.explorer import EXPLORER, Explorer
from microdit.pipeline.explore.guard import error, reader
from microdit.pipeline.explore.handlers import MOST_ROWS, number
from microdit.pipeline.selection.selections import list_selections, select_apart

ROUTES = web.RouteTableDef()
READ_ONLY = "this page may only read: it was started with --read-only"


async def _body(request: web.Request) -> dict[str, Any]:
    """Read a JSON object; raises RequestError."""
    if request.content_type != "application/json":
        raise RequestError(f"content type {request.content_type[:80]!r}: expected application/json")
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise RequestError("the request is no JSON") from None
    if not isinstance(body, dict):
        raise RequestError("the request is no JSON object")
    return body


def _texts(body: dict[str, Any], *names: str) -> list[str]:
    """Read texts of a request; raises RequestError."""
    for name in names:
        if not isinstance(body.get(name, ""), str):
            raise RequestError(f"{name} is {json.dumps(body[name])[:80]}; expected a text")
    return [body.get(name, "") for name in names]


# -- selections --------------------------------------------------------------------------------------------------------
@ROUTES.get("/api/selections")
async def selections(request: web.Request) -> web.Response:
    explorer = request.app[EXPLORER]
    found = await explorer.in_thread(list_selections, explorer.corpus)
    return web.json_response([{"name": s.name, "hash": s.hash, "rows": s.rows, "query": s.query} for s in found])


@ROUTES.post("/api/selections")
async def save_selection(request: web.Request) -> web.Response:
    explorer, body = request.app[EXPLORER], await _body(request)
    if explorer.read_only:
        return error(403, READ_ONLY)
    name, where = _texts(body, "name", "where")
    condition = checked(where)
    sql = f"{CHOICE} WHERE {condition.text}" if condition.text else CHOICE
    async with explorer.saving:  # each reads the whole table
        arguments = (explorer.corpus, name, sql, None, explorer.pool.limits)
        saved = await explorer.in_thread(select_apart, *arguments)
    return web.json_response({"name": f"{saved.name}@{saved.hash}", "rows": saved.rows, "query": sql})


# -- marks -------------------------------------------------------------------------------------------------------------
def _who() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a user without a name
        return socket.gethostname()


def _shown(mark: Mark) -> dict[str, Any]:
    about = {name: getattr(mark, name) for name in ("source", "key", "shard", "row", "mark", "note", "who")}
    return about | {"when": mark.time}


@ROUTES.post("/api/marks")
async def add_mark(request: web.Request) -> web.Response:
    explorer, body = request.app[EXPLORER], await _body(request)
    if explorer.read_only:
        return error(403, READ_ONLY)
    source, key, note = _texts(body, "source", "key", "note")
    word = body.get("mark")
    if word not in (*WORDS, None):
        raise RequestError(f"mark is {json.dumps(word)[:80]}; expected keep, drop or null")
    if len(note) > LONGEST_NOTE:
        raise RequestError(f"note has {len(note):,} characters; expected {LONGEST_NOTE:,} at most")
    at = await _place(request, explorer, body, source, key)
    try:
        mark = Mark(
            source=at[0], shard=at[1], row=at[2], key=key, mark=word, note=note,
            who=_who(), time=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        )  # fmt: skip
    except ValidationError:
        raise RequestError(f"sample {source[:80]!r}/{key[:80]!r}: expected a source and a key") from None
    async with explorer.marking:
        await explorer.in_thread(explorer.state.marks.add, mark)
        explorer.state.show_marks()
    return web.json_response(_shown(mark))


async def _place(request: web.Request, explorer: Explorer, body: dict[str, Any], source: str, key: str) -> rows.Place:
    """Find the place of the sample that is to be marked, which has to be there."""
    at = explorer.state.places.get((source, key))
    if at is None:
        at = await explorer.pool.ask(reader(request), rows.find, source, key)
    if "shard" in body and "row" in body:
        given = rows.place(f"{source}/{body['shard']}/{body['row']}")
        (row,) = await explorer.pool.ask(reader(request), rows.rows_at, [given]) or [{}]
        at = given if row.get("key") == key else None
    if at is None:
        raise RequestError(f"sample {source[:80]}/{key[:80]}: the corpus has none")
    return at


@ROUTES.get("/api/marks")
async def list_marks(request: web.Request) -> web.Response:
    explorer, query = request.app[EXPLORER], request.query
    limit, marks = number(query, "limit", 100, MOST_ROWS), explorer.state.marks.by_number
    last = number(query, "after", 2**29, 2**29)
    numbers = sorted((one for one in marks if one < last), reverse=True)
    shown = [_shown(marks[one]) for one in numbers[:limit]]
    return web.json_response({"marks": shown, "next": str(numbers[limit - 1]) if len(numbers) > limit else None})
