"""HTTP sessions, a resolver that refuses addresses that are not public, and the environment's proxies."""

import asyncio
import socket
from typing import Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass_environment  # type: ignore[attr-defined]

import aiohttp
from yarl import URL

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.lenient_http import MAX_HEADERS
from microdit.pipeline.sources.opt_outs import RobotsRules
from microdit.pipeline.sources.public_addresses import PublicResolver, is_public, literal
from microdit.pipeline.sources.tls_sessions import resuming_context

READ_AHEAD = 256 << 10  # bytes of an answer that aiohttp reads before it pauses the connection


class Client:
    """The sessions of a fetcher, inside of its event loop.

    Where `http_proxy` or `https_proxy` say so, requests go through the proxy, which looks the hosts up itself: its own
    address may be private, and what it may reach is for it to say. Hosts that are addresses are checked all the same.

    Raises:
        RequestError: a proxy is none for HTTP.
    """

    def __init__(self, options: FetchOptions):
        self.options = options
        self.headers = {"User-Agent": options.agent, "Accept": "image/*,*/*;q=0.5"}
        self.resolver = PublicResolver(options.allow_networks)
        self.robots: dict[str, asyncio.Task[RobotsRules]] = {}
        """By scheme, host and port: what its robots.txt says, or the request for it."""
        self.unverified: dict[str, str] = {}
        """By scheme, host and port: what is wrong with the certificate of a host that is asked all the same."""
        self._proxies = _proxies()
        self._direct = _session(self.headers, self.resolver)
        self._through_proxies = _session(self.headers, None) if self._proxies else self._direct

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.robots.values():
            task.cancel()
        await self._direct.close()
        await self._through_proxies.close()

    def session(self, url: URL) -> tuple[aiohttp.ClientSession, str | None]:
        """Return the session for a URL, and the proxy if it goes through one.

        Raises:
            PrivateAddress: its host is an address that may not be asked.
        """
        host = url.raw_host or ""
        self.resolver.check(host)
        proxy = self._proxies.get(url.scheme)
        address = literal(host)
        is_near = address is not None and not is_public(address)
        if proxy is None or is_near or proxy_bypass_environment(f"{host}:{url.port}", self._proxies):
            return self._direct, None
        return self._through_proxies, proxy

    async def addresses(self, url: URL) -> list[str]:
        """Look up the addresses of a URL's host that may be connected to.

        Raises:
            PrivateAddress: there are none.
            OSError: there is no such host.
        """
        host = url.raw_host or ""
        self.resolver.check(host)
        found = await self.resolver.resolve(host, url.port or 0, socket.AF_UNSPEC)
        return [answer["host"] for answer in found]


def _proxies() -> dict[str, str]:
    """Read the environment's proxies by scheme, and what is to be asked without (`no`)."""
    given = getproxies()
    proxies = {scheme: given.get(scheme) or given.get("all", "") for scheme in ("http", "https")}
    found = {scheme: url if "://" in url else f"http://{url}" for scheme, url in proxies.items() if url}
    for scheme, url in found.items():
        if urlsplit(url).scheme not in ("http", "https"):
            raise RequestError(
                f"{scheme}_proxy: expected http://HOST:PORT, found {urlsplit(url).scheme}://; "
                "URLs are fetched through no other kind of proxy"
            )
    return {**found, "no": given.get("no", "")} if found else {}


def _session(headers: dict[str, str], resolver: PublicResolver | None) -> aiohttp.ClientSession:
    """Make a session; the caller bounds the number of its connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, resolver=resolver, ssl=resuming_context()),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        max_line_size=MAX_HEADERS,
        max_field_size=MAX_HEADERS,
        max_headers=1000,
        read_bufsize=READ_AHEAD,
    )
