"""Answers about one sample, groups, failures, two filters side by side, and what is like a sample."""

import io
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.names import COLUMN, IMAGES
from microdit.pipeline.curation.job import is_embedding
from microdit.pipeline.explore import rows, sample
from microdit.pipeline.explore.chosen import chosen_by
from microdit.pipeline.explore.column_failures import column_failed_rows, column_reasons
from microdit.pipeline.explore.condition import Condition, checked
from microdit.pipeline.explore.explorer import EXPLORER, Explorer
from microdit.pipeline.explore.guard import reader
from microdit.pipeline.explore.handlers import MOST_ROWS, answer, marked, number, place_of, text
from microdit.pipeline.explore.pictures import MissingPicture
from microdit.pipeline.explore.similar import VectorIndex, build_index, vector_of
from microdit.pipeline.explore.text_search import may_have_text, text_vector

ROUTES = web.RouteTableDef()
COMPARED = 32
MOST_GROUPS = 100
LONGEST_REASON = 200


@ROUTES.get("/api/sample")
async def one_sample(request: web.Request) -> web.Response:
    explorer, asker = request.app[EXPLORER], reader(request)
    at = await place_of(request, explorer)
    found = await explorer.pool.ask(asker, sample.sample, at)
    names = [one["name"] for one in found["scores"]]
    known = await explorer.state.quantiles(asker, names) if names else {}
    for score in found["scores"]:
        value = score["value"]
        score["percentile"] = None if value is None else sample.percentile(float(value), known[score["name"]])
    found["selections"] = await explorer.in_thread(chosen_by, explorer.selected, at)
    found["failures"] = await explorer.in_thread(_failures, explorer, at)
    found["mark"] = marked(explorer, at)
    found["provenance"] |= {"commits": await explorer.in_thread(_commits, explorer, at)}
    return answer(explorer, found)


def _commits(explorer: Explorer, at: rows.Place) -> dict[str, str]:
    """Name the newest commit of each column of the sample's shard."""
    members = explorer.state.members
    names = {column: members.commit_name(column, *at[:2]) for column in sorted(explorer.corpus.columns())}
    return {column: name for column, name in names.items() if name is not None}


def _failures(explorer: Explorer, at: rows.Place) -> list[dict[str, Any]]:
    """Read why a sample failed, of each column of its shard in which it did."""
    failed = []
    for column in _commits(explorer, at):
        status = explorer.state.members.status(column, at)
        if status is not None and status["status"] != "ok":
            failed.append({"column": column, "reason": status["reason"], "detail": status["detail"]})
    return failed


@ROUTES.get("/api/decoded")
async def decoded(request: web.Request) -> web.Response:
    explorer, column = request.app[EXPLORER], text(request.query, "column")
    if not COLUMN.fullmatch(column) or not column.startswith("latents/"):
        raise RequestError(f"column {column[:80]!r}: expected latents, such as latents/sdxl-256")
    at = await place_of(request, explorer)
    async with explorer.decoding:  # one at a time: a large autoencoder takes all cores
        data = await explorer.in_thread(_decoded, explorer, column, at)
    return web.Response(body=data, content_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


def _decoded(explorer: Explorer, column: str, at: rows.Place) -> bytes:
    """Decode a sample's latents to a PNG.

    Raises:
        MissingPicture: there are none, or they cannot be decoded here.
    """
    from microdit.pipeline.stages.decoding import decode_latents  # it brings torch

    declaration = explorer.corpus.column(column)
    data, _ = explorer.state.members.read(column, at)
    try:
        (pixels,) = decode_latents(declaration, [array_from_bytes(data)])
    except Exception as error:  # a model may fail to load in a hundred ways
        raise MissingPicture(f"{column} cannot be decoded here: {first_line(error)}") from None
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


@ROUTES.get("/api/failures")
async def failures(request: web.Request) -> web.Response:
    explorer, query, asker = request.app[EXPLORER], request.query, reader(request)
    if "column" not in query:
        condition = checked(query.get("where", ""))
        asked = ("failures", condition.text)
        reasons = await explorer.state.remembered(asked, lambda: explorer.pool.ask(asker, sample.failures, condition))
        if not condition.text:
            others = await explorer.state.remembered(
                "column reasons", lambda: explorer.in_thread(column_reasons, explorer.corpus)
            )
            reasons = [*reasons, *others]
        return web.json_response({"reasons": reasons})
    column, reason, after = text(query, "column"), query.get("reason", ""), query.get("after", "")
    limit = number(query, "limit", 60, MOST_ROWS)
    if column == IMAGES:
        return web.json_response(
            await explorer.pool.ask(asker, sample.failed_rows, reason[:LONGEST_REASON], after, limit)
        )
    explorer.corpus.column(column)
    arguments = (explorer.corpus, column, reason, after, limit)
    return answer(explorer, await explorer.in_thread(column_failed_rows, *arguments))


@ROUTES.get("/api/groups")
async def groups(request: web.Request) -> web.Response:
    explorer, query = request.app[EXPLORER], request.query
    kind = query.get("kind", "duplicates")
    if kind not in sample.KINDS:
        raise RequestError(f"kind is {kind[:40]!r}; expected {', '.join(sample.KINDS)}")
    condition, limit = checked(query.get("where", "")), number(query, "limit", 24, MOST_GROUPS)
    found = await explorer.pool.ask(reader(request), sample.groups, kind, condition, query.get("after", ""), limit)
    for group in found["groups"]:
        answer(explorer, group)
    return web.json_response(found)


@ROUTES.get("/api/compare")
async def compare(request: web.Request) -> web.Response:
    explorer, query, asker = request.app[EXPLORER], request.query, reader(request)
    a, b, seed = checked(query.get("a", "")), checked(query.get("b", "")), query.get("seed", "1")

    async def side(condition: Condition) -> dict[str, Any]:
        counted = await explorer.state.remembered(
            ("count", condition.text), lambda: explorer.pool.ask(asker, rows.count, condition)
        )
        found = await explorer.pool.ask(asker, rows.drawn, condition, COMPARED, seed)
        answer(explorer, {"rows": found})
        return {"rows": counted, "sample": found}

    both = await explorer.pool.ask(asker, rows.count_both, a, b)
    return web.json_response({"a": await side(a), "b": await side(b), "both": both})


def _embeddings(explorer: Explorer, named: str, with_text: bool = False) -> str:
    """Choose a column of embeddings, the first one if none is named; raises RequestError."""
    declared = explorer.corpus.columns()
    columns = sorted(name for name in declared if is_embedding(name))
    if with_text:
        columns = [name for name in columns if may_have_text(declared[name])]
    column = named or (columns[0] if columns else "")
    if column not in columns:
        what = "embeddings by a CLIP or SigLIP" if with_text else "embeddings"
        advice = f"there are {', '.join(columns)}" if columns else "add `scores/embedding` to the config, and build"
        raise RequestError(f"column {column[:80]!r}: expected one of {what}; {advice}")
    return column


@ROUTES.get("/api/similar")
async def similar(request: web.Request) -> web.Response:
    explorer, query = request.app[EXPLORER], request.query
    limit = number(query, "limit", 60, MOST_ROWS)
    column = await explorer.in_thread(_embeddings, explorer, query.get("column", ""))
    at = await place_of(request, explorer)
    vector = await explorer.in_thread(vector_of, explorer.state.members, column, at)
    return await _nearest(request, column, vector, limit, at)


@ROUTES.get("/api/search")
async def search(request: web.Request) -> web.Response:
    explorer, query = request.app[EXPLORER], request.query
    wanted, limit = text(query, "text"), number(query, "limit", 60, MOST_ROWS)
    column = await explorer.in_thread(_embeddings, explorer, query.get("column", ""), True)
    async with explorer.decoding:
        vector = await explorer.in_thread(text_vector, explorer.corpus.column(column), wanted)
    return await _nearest(request, column, vector, limit)


async def _nearest(
    request: web.Request, column: str, vector: np.ndarray, limit: int, but: rows.Place | None = None
) -> web.Response:
    """Answer with the samples whose embeddings are nearest to a vector; `but` is left out."""
    explorer = request.app[EXPLORER]
    index = await _index(explorer, column)
    if index.index.d != len(vector):
        raise RequestError(f"{column}: this embedding has {len(vector)} numbers, the others have {index.index.d}")
    nearest = await explorer.in_thread(index.nearest, vector, limit + 1)
    scores = dict([one for one in nearest if one[0] != but][:limit])
    found = await explorer.pool.ask(reader(request), rows.rows_at, list(scores))
    shown = [row | {"score": round(scores[row["source"], row["shard"], row["row"]], 4)} for row in found]
    return answer(explorer, {"rows": shown, "note": index.note})


async def _index(explorer: Explorer, column: str) -> VectorIndex:
    """Give the index of a column of embeddings, built again when there are other commits of it."""
    prefix = f"commits/{column}/"
    names = [name for name in explorer.state.members.names if name.startswith(prefix)]
    async with explorer.indexing:
        if explorer.index is None or explorer.index[0] != names:
            explorer.index = None  # two do not fit
            explorer.index = names, await explorer.in_thread(build_index, explorer.corpus, names, column)
        return explorer.index[1]
