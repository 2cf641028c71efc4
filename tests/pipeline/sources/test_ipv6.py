"""URLs of hosts with IPv6 addresses, alone or beside IPv4 ones that do not answer, and the other way about."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ThreadedResolver, web

from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.adapters.urls import Urls


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
LOOPBACKS = {"::1": socket.AF_INET6, "127.0.0.1": socket.AF_INET}


@pytest.fixture(params=LOOPBACKS)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Serve on one of the two loopback addresses alone; yield it and the port."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start() -> web.AppRunner:
        async def answer(asked: web.Request) -> web.Response:
            return web.Response(body=(asked.remote or "").encode())

        app = web.Application()
        app.router.add_get("/{rest:.*}", answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, request.param, 0).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield request.param, runner.addresses[0][1]
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


def test_addresses_of_both_kinds(tmp_path: Path, server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    async def both(self: object, host: str, port: int = 0, family: Any = 0) -> list[Any]:
        found = [(address, kind) for address, kind in LOOPBACKS.items() if family in (0, kind)]
        common = {"hostname": host, "port": port, "proto": 0, "flags": socket.AI_NUMERICHOST}
        return [{**common, "host": address, "family": kind} for address, kind in found]

    monkeypatch.setattr(ThreadedResolver, "resolve", both)
    address, port = server
    literal = f"[{address}]" if ":" in address else address
    urls = [f"http://{literal}:{port}/a.jpg", f"http://both.example:{port}/b.jpg"]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"url": url, "caption": "c"}) + "\n" for url in urls))

    def reasons(networks: list[str]) -> list[tuple[bytes | None, str | None]]:
        options = FetchOptions(timeout=6, idle_timeout=3, allow_networks=networks)
        source = Urls("web", tmp_path / "list.jsonl", 10, options)
        return [(item.data, item.reason) for item in source.read("web-000000", lambda _: True)]

    assert reasons(["::1/128", "127.0.0.0/8"]) == [(address.encode(), None)] * 2
    assert reasons([]) == [(None, "private_address")] * 2
