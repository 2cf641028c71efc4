"""The answers of the server, one function for each address (docs/guides/exploring.md)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.marks import WORDS
from microdit.pipeline.curation.job import is_embedding
from microdit.pipeline.explore import histograms, rows
from microdit.pipeline.explore.condition import checked
from microdit.pipeline.explore.explorer import EXPLORER, Explorer
from microdit.pipeline.explore.guard import Handler, error, reader
from microdit.pipeline.explore.pictures import SIDES, MissingPicture
from microdit.pipeline.explore.pool import BusyError
from microdit.pipeline.explore.text_search import may_have_text
from microdit.pipeline.selection.selections import list_selections

ROUTES = web.RouteTableDef()
PAGE = Path(__file__).parent / "page"
PART = re.compile(r"[A-Za-z0-9_-]+\.(js|css|svg|html)")
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
MOST_ROWS = 500
MOST_BINS = 200


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what is wrong into one message."""
    try:
        return await handler(request)
    except MissingPicture as wrong:
        return error(404, str(wrong))
    except RequestError as wrong:
        return error(400, str(wrong))
    except BusyError as wrong:
        return error(429, str(wrong))
    except (FileNotFoundError, PermissionError) as wrong:
        return error(500, f"the corpus cannot be read: {first_line(wrong)}")
    except (OSError, BaseError) as wrong:
        return error(502, f"the storage fails: {first_line(wrong)}")
    except web.HTTPException as wrong:
        return error(wrong.status, wrong.reason) if wrong.status >= 400 else wrong


# -- parameters --------------------------------------------------------------------------------------------------------
def number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """Read a whole number of 1 to `most`; raises RequestError."""
    text = query.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
        raise RequestError(f"{name} is {text[:40]!r}; expected a whole number of 1 to {most}")
    return int(text)


def text(query: Mapping[str, str], name: str) -> str:
    """Read a text that has to be there; raises RequestError."""
    if not (value := query.get(name, "")):
        raise RequestError(f"{name} is missing")
    return value


async def place_of(request: web.Request, explorer: Explorer) -> rows.Place:
    """Find the place of the sample that a request names: by `shard` and `row`, which is quick, or by its key alone."""
    query = request.query
    source = text(query, "source")
    if "shard" in query and "row" in query:
        return rows.place(f"{source}/{query['shard']}/{query['row']}")
    key = text(query, "key")
    if (known := explorer.state.places.get((source, key))) is not None:
        return known
    asked = ("find", source, key)
    at = await explorer.state.remembered(asked, lambda: explorer.pool.ask(reader(request), rows.find, source, key))
    if at is None:
        raise MissingPicture(f"sample {source}/{key}: the corpus has none")
    explorer.state.places.add([{"source": source, "key": key, "shard": at[1], "row": at[2]}])
    place: rows.Place = at
    return place


def answer(explorer: Explorer, value: dict[str, Any]) -> web.Response:
    """Answer with JSON; rows in it get their marks, and their places are remembered: their pictures come next."""
    if isinstance(found := value.get("rows"), list):
        explorer.state.places.add(found)
        for row in found:
            mark = explorer.state.newest_marks.get((row["source"], row["shard"], row["row"]))
            row["mark"] = mark.mark if mark is not None else None
    return web.json_response(value)


def marked(explorer: Explorer, at: rows.Place) -> dict[str, Any] | None:
    """Give the mark of a sample that counts, if it was not taken back."""
    mark = explorer.state.newest_marks.get(at)
    if mark is None or not (mark.mark or mark.note):
        return None
    return {"mark": mark.mark, "note": mark.note, "who": mark.who, "when": mark.time}


# -- the page ----------------------------------------------------------------------------------------------------------
@ROUTES.get("/")
async def index(request: web.Request) -> web.StreamResponse:
    return _file("index.html")


@ROUTES.get("/page/{name}")
async def page_part(request: web.Request) -> web.StreamResponse:
    return _file(request.match_info["name"])


def _file(name: str) -> web.Response:
    path = PAGE / name
    if PART.fullmatch(name) is None or not path.is_file():
        return error(404, "the page has no such part")
    return web.Response(body=path.read_bytes(), content_type=TYPES[name.rpartition(".")[2]], charset="utf-8")


# -- samples -----------------------------------------------------------------------------------------------------------
@ROUTES.get("/api/corpus")
async def corpus(request: web.Request) -> web.Response:
    explorer = request.app[EXPLORER]
    state, asker = explorer.state, reader(request)
    sources = await state.remembered("sources", lambda: explorer.pool.ask(asker, rows.count_sources))
    pictures = await state.remembered("pictures", lambda: explorer.pool.ask(asker, rows.has_pictures))
    selections = await explorer.in_thread(list_selections, explorer.corpus)
    declared = await explorer.in_thread(explorer.corpus.columns)
    words = [str(mark.mark) for mark in state.newest_marks.values()]
    return web.json_response(
        {
            "name": explorer.corpus.name,
            "url": explorer.corpus.url,
            "rows": sum(source["rows"] for source in sources),
            "sources": sources,
            "captions": [name for name in sorted(declared) if name.startswith("captions/")],
            "latents": [name for name in sorted(declared) if name.startswith("latents/")],
            "images": pictures,
            "embeddings": [name for name in sorted(declared) if is_embedding(name)],
            "text_search": any(is_embedding(name) and may_have_text(one) for name, one in declared.items()),
            "read_only": explorer.read_only,
            "token": explorer.guard.csrf,
            "columns": [column.to_json() for column in state.columns],
            "selections": [{"name": s.name, "hash": s.hash, "rows": s.rows, "query": s.query} for s in selections],
            "marks": {word: words.count(word) for word in WORDS},
            "growing": state.growing,
            "notes": state.notes[:20],
        }
    )


@ROUTES.get("/api/rows")
async def sample_rows(request: web.Request) -> web.Response:
    explorer, query = request.app[EXPLORER], request.query
    condition, limit = checked(query.get("where", "")), number(query, "limit", 100, MOST_ROWS)
    if query.get("order", "row") == "random":
        found = await explorer.pool.ask(reader(request), rows.drawn, condition, limit, query.get("seed", ""))
        return answer(explorer, {"rows": found, "next": None, "previous": None})
    after, before = query.get("after", ""), query.get("before", "")
    return answer(explorer, await explorer.pool.ask(reader(request), rows.page, condition, after, before, limit))


@ROUTES.get("/api/count")
async def count(request: web.Request) -> web.Response:
    explorer, asker = request.app[EXPLORER], reader(request)
    condition, all_rows = checked(request.query.get("where", "")), checked("")

    async def counted(of: Any) -> Any:
        return await explorer.state.remembered(("count", of.text), lambda: explorer.pool.ask(asker, rows.count, of))

    return web.json_response({"rows": await counted(condition), "of": await counted(all_rows)})


@ROUTES.get("/api/histogram")
async def histogram(request: web.Request) -> web.Response:
    explorer, query, asker = request.app[EXPLORER], request.query, reader(request)
    column = explorer.state.column(text(query, "column"))
    condition, bins = checked(query.get("where", "")), number(query, "bins", 40, MOST_BINS)
    if column.kind == "text":
        raise RequestError(f"column {column.name!r} is text, which has no histogram; look for words in it")

    async def asked() -> Any:
        if column.kind != "number":
            return await explorer.pool.ask(asker, histograms.values, column.name, condition)
        known = (await explorer.state.quantiles(asker, [column.name]))[column.name]
        edges = histograms.edges_of(known, bins)
        return await explorer.pool.ask(asker, histograms.bins, column.name, condition, edges)

    return web.json_response(await explorer.state.remembered(("histogram", column.name, condition.text, bins), asked))


@ROUTES.get("/api/image")
async def image(request: web.Request) -> web.Response:
    explorer, size = request.app[EXPLORER], request.query.get("size", "160")
    if size != "full" and size not in SIDES:
        raise RequestError(f"size is {size[:20]!r}; expected {', '.join(SIDES)} or full")
    at = await place_of(request, explorer)
    data, kind = await explorer.in_thread(explorer.pictures.picture, at, size)
    headers = {"Cache-Control": "private, max-age=3600"}
    return web.Response(body=data, content_type=kind, headers=headers)
