"""Answers about training runs, and what happens to the corpus while it is looked at."""

import asyncio
import json
from typing import Any

from aiohttp import web

from microdit.pipeline.explore import rows, runs
from microdit.pipeline.explore.explorer import EXPLORER, Explorer
from microdit.pipeline.explore.guard import reader
from microdit.pipeline.explore.handlers import number, text

ROUTES = web.RouteTableDef()
MOST_LISTENERS = 200
MOST_STEP = 999_999_999


@ROUTES.get("/api/runs")
async def list_runs(request: web.Request) -> web.Response:
    explorer = request.app[EXPLORER]
    return web.json_response(await explorer.in_thread(runs.list_runs, explorer.runs))


@ROUTES.get("/api/runs/{name:.+}/sheet")
async def sheet(request: web.Request) -> web.Response:
    explorer = request.app[EXPLORER]
    text(request.query, "step")
    step = 0 if request.query["step"] == "0" else number(request.query, "step", 0, MOST_STEP)
    data = await explorer.in_thread(runs.read_sheet, explorer.runs, request.match_info["name"], step)
    return web.Response(body=data, content_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


@ROUTES.get("/api/runs/{name:.+}")
async def one_run(request: web.Request) -> web.Response:
    explorer = request.app[EXPLORER]
    found = await explorer.in_thread(runs.describe_run, explorer.runs, request.match_info["name"])
    places = [(one["source"], one["shard"], one["row"]) for one in found["broken"] if one["row"] >= 0]
    known = await explorer.pool.ask(reader(request), rows.rows_at, places)
    keys = {(row["source"], row["shard"], row["row"]): row["key"] for row in known}
    for one in found["broken"]:
        one["key"] = keys.get((one["source"], one["shard"], one["row"]))
    return web.json_response(found)


@ROUTES.get("/api/events")
async def events(request: web.Request) -> web.StreamResponse:
    """Tell a reader what changes, as server-sent events, for as long as it listens."""
    explorer = request.app[EXPLORER]
    if explorer.listeners >= MOST_LISTENERS:
        raise web.HTTPServiceUnavailable(reason=f"{MOST_LISTENERS} pages listen already")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    explorer.guard.protect(request, response)
    await response.prepare(request)
    explorer.listeners += 1
    said = None
    try:
        while True:
            status = _status(explorer)
            if status != said:
                await response.write(f"data: {json.dumps(status)}\n\n".encode())
            else:
                await response.write(b": still here\n\n")
            said = status
            changed = explorer.state.changed
            try:
                await asyncio.wait_for(changed.wait(), explorer.state.look)
            except TimeoutError:
                continue
    except (ConnectionResetError, asyncio.CancelledError):
        return response
    finally:
        explorer.listeners -= 1


def _status(explorer: Explorer) -> dict[str, Any]:
    state = explorer.state
    return {
        "type": "status",
        "building": state.growing,
        "table": state.pool.version,
        "error": state.error,
        **state.live,
    }
