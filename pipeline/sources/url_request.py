"""Ask a web server for a URL once: follow redirects, bound the answer, and name the reason where there is none."""

import asyncio
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from yarl import URL

from microdit.pipeline.base.retry import retry_after
from microdit.pipeline.base.secrets import without_secrets
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.lenient_http import GZIP, UnreadableAnswer, ask_leniently, unpacked
from microdit.pipeline.sources.opt_outs import Headers, RobotsRules, opted_out
from microdit.pipeline.sources.public_addresses import PrivateAddress
from microdit.pipeline.sources.web_client import Client
from microdit.pipeline.sources.web_url import as_written, redirected

TRANSIENT = {408, 425, 429, 500, 502, 503, 504, *range(520, 525), 529}
REDIRECTS = {301, 302, 303, 307, 308}
WHOLE = re.compile(r"bytes 0-(\d+)/(\d+|\*)")


class RequestFailed(Exception):
    """One try that failed.

    Args:
        reason: a short code.
        transient: another try may succeed, after `asked` seconds if the server says so.
        unreadable: the answer broke the rules of HTTP; `ask_leniently` may read it.
        silent: not a byte came.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        transient: bool = False,
        asked: float | None = None,
        unreadable: bool = False,
        silent: bool = False,
    ):
        super().__init__(detail)
        self.reason, self.detail, self.transient, self.asked = reason, detail, transient, asked
        self.unreadable, self.silent = unreadable, silent


@dataclass(frozen=True)
class Received:
    """The bytes of a URL."""

    data: bytes
    url: str
    """Where they came from, after redirects."""
    unverified: str = ""
    """Fault of the certificate of a host that was asked all the same."""


@dataclass(frozen=True)
class Answer:
    """The body of an answer, or where it redirects to."""

    data: bytes = b""
    location: str | None = None


async def request(
    client: Client, url: str, wait: float, lenient: bool, heard: Callable[[], None], robots: bool | None = None
) -> Received:
    """Ask for a URL and follow its redirects.

    Args:
        wait: seconds to wait for a connection, or for the next byte.
        lenient: read answers that break the rules of HTTP, each on a connection of its own.
        heard: called when an answer begins.
        robots: heed robots.txt; None: as the options say.

    Raises:
        RequestFailed: there is no complete answer within the limits.
    """
    unverified = ""
    for _ in range(client.options.max_redirects + 1):
        target = _checked(url)
        try:
            session, proxy = client.session(target)
        except PrivateAddress as error:
            raise RequestFailed("private_address", str(error)) from None
        if client.options.robots_txt if robots is None else robots:
            await _check_robots(client, target, wait, heard)
        if lenient and proxy is None:
            answer = await _ask_leniently(client, target, heard)
        else:
            answer = await _ask_whoever(client, session, target, proxy, wait, heard)
        unverified = client.unverified.get(host_of(target), unverified)
        if answer.location is None:
            return Received(answer.data, url, unverified)
        url = redirected(url, answer.location)
    raise RequestFailed("redirects", f"more than {client.options.max_redirects} redirects")


async def _check_robots(client: Client, url: URL, wait: float, heard: Callable[[], None]) -> None:
    """Raise RequestFailed if the host's robots.txt forbids a URL, or cannot be had for now."""
    host = host_of(url)
    if host not in client.robots:
        task = client.robots[host] = asyncio.create_task(_robots_rules(client, host, wait, heard))

        def forget(done: "asyncio.Task[RobotsRules]") -> None:
            if done.cancelled() or done.exception() is not None:
                client.robots.pop(host, None)

        task.add_done_callback(forget)
    task = client.robots[host]
    rules = task.result() if task.done() else await asyncio.shield(task)
    if not rules.allow(url.raw_path_qs):
        raise RequestFailed("robots_txt", f"{host}/robots.txt forbids it")


async def _robots_rules(client: Client, host: str, wait: float, heard: Callable[[], None]) -> RobotsRules:
    """Ask for a robots.txt. One that is not there allows all; while the server has trouble with it nothing is."""
    url = f"{host}/robots.txt"
    try:
        async with asyncio.timeout(client.options.timeout):
            data = (await request(client, url, wait, False, heard, robots=False)).data
    except TimeoutError:
        limit = seconds(client.options.timeout)
        raise RequestFailed("timeout", f"robots.txt: no complete answer within {limit}") from None
    except RequestFailed as error:
        if error.silent or error.reason in ("timeout", "dns", "http_429") or error.reason.startswith("http_5"):
            said = f"robots.txt: {error.detail}"
            raise RequestFailed(error.reason, said, error.transient, error.asked, silent=error.silent) from None
        return RobotsRules()
    return RobotsRules.parse(data, client.options.user_agent)


def _checked(url: str) -> URL:
    try:
        target = as_written(url)
    except ValueError as error:
        raise RequestFailed("bad_url", f"{without_secrets(url)[:200]!r}: {error}") from None
    if target.scheme not in ("http", "https") or not target.raw_host or " " in target.raw_host:
        raise RequestFailed("bad_url", f"expected http:// or https:// and a host, found {without_secrets(url)[:200]!r}")
    return target


async def _ask_whoever(
    client: Client,
    session: aiohttp.ClientSession,
    url: URL,
    proxy: str | None,
    wait: float,
    heard: Callable[[], None],
) -> Answer:
    """Ask a host, also one whose certificate fails if the options accept that; such hosts are noted in the client."""
    host = host_of(url)
    if host not in client.unverified:
        try:
            return await _ask(session, url, proxy, client.options, wait, heard)
        except RequestFailed as error:
            if error.reason != "certificate" or not client.options.accept_failing_certificates:
                raise
            client.unverified[host] = error.detail
    return await _ask(session, url, proxy, client.options, wait, heard, verify=False)


async def _ask(
    session: aiohttp.ClientSession,
    url: URL,
    proxy: str | None,
    options: FetchOptions,
    wait: float,
    heard: Callable[[], None],
    verify: bool = True,
) -> Answer:
    timeout = aiohttp.ClientTimeout(connect=wait, sock_read=wait)
    begun = False
    try:
        async with session.get(url, allow_redirects=False, timeout=timeout, proxy=proxy, ssl=verify) as response:
            heard()
            begun = True
            location = _location(response.status, response.reason or "", response.headers, options)
            if location is not None:
                return Answer(location=location)
            if (response.content_length or 0) > options.max_bytes:
                raise RequestFailed(
                    "too_large", f"{response.content_length} bytes, at most {options.max_bytes} are read"
                )
            blocks, size = list[bytes](), 0
            while block := await response.content.readany():
                blocks.append(block)
                size += len(block)
                if size > options.max_bytes:
                    raise RequestFailed("too_large", f"more than {options.max_bytes} bytes")
            data = b"".join(blocks)
            if data.startswith(GZIP):  # aiohttp knows neither x-gzip nor gzip that is named twice
                encodings = response.headers.get("Content-Encoding", "")
                return Answer(unpacked(data, encodings, options.max_bytes))
            return Answer(data)
    except UnreadableAnswer as error:
        raise RequestFailed(error.reason, str(error)) from None
    except (aiohttp.ClientError, OSError) as error:
        raise _failed(error, wait, begun) from None


def _location(status: int, reason: str, headers: Headers, options: FetchOptions) -> str | None:
    """Return where an answer redirects to, None where it has the whole body.

    Raises:
        RequestFailed: it is neither.
    """
    location = headers.get("Location")
    if status in REDIRECTS and location:
        return location
    whole = WHOLE.match(headers.get("Content-Range", "")) if status == 206 else None
    if status in (200, 203) or (whole and whole[2] in ("*", str(int(whole[1]) + 1))):
        opt_out = opted_out(headers, options.user_agent) if options.opt_out_headers else None
        if opt_out is not None:
            raise RequestFailed(*opt_out)
        return None
    asked = retry_after(headers.get("Retry-After"))
    transient = status in TRANSIENT and (asked or 0.0) <= options.retry_after
    raise RequestFailed(f"http_{status}", f"{status} {reason}", transient, asked)


def host_of(url: URL) -> str:
    """Return a URL's scheme, host and port."""
    return f"{url.scheme}://{url.host_port_subcomponent}"


def seconds(number: float) -> str:
    return f"{number:.3g} second{'' if number == 1 else 's'}"


def _failed(error: Exception, wait: float, begun: bool) -> RequestFailed:
    """Name the reason of an error of aiohttp, and tell whether another try may succeed."""
    detail = f"{type(error).__name__}: {error}"
    match error:
        case aiohttp.ServerTimeoutError() | TimeoutError():
            connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
            what = f"no connection within {seconds(wait)}" if connecting else f"no bytes for {seconds(wait)}"
            return RequestFailed("timeout", what, True, silent=not begun)
        case aiohttp.ClientConnectorDNSError() if isinstance(error.os_error, PrivateAddress):
            return RequestFailed("private_address", str(error.os_error))
        case aiohttp.ClientConnectorDNSError():
            number = getattr(error.os_error, "errno", None)
            why = "the name server did not answer" if number == socket.EAI_AGAIN else "there is no such host"
            return RequestFailed("dns", f"{why}: {error}", number == socket.EAI_AGAIN)
        case aiohttp.ClientConnectorCertificateError():
            return RequestFailed("certificate", " ".join(detail.split())[:300])
        case aiohttp.InvalidURL():
            return RequestFailed("bad_url", detail)
        case aiohttp.ClientPayloadError():
            return RequestFailed("truncated", f"the transfer broke off: {error}", True, unreadable=True)
        case aiohttp.ClientConnectionError() | OSError():
            return RequestFailed("connection", detail, True)
    return RequestFailed("connection", detail, isinstance(error, aiohttp.ClientResponseError), unreadable=True)


async def _ask_leniently(client: Client, url: URL, heard: Callable[[], None]) -> Answer:
    try:
        addresses = await client.addresses(url)
        verify = host_of(url) not in client.unverified
        head, body = await ask_leniently(url, addresses, client.headers, client.options.max_bytes, verify)
        heard()
        location = _location(head.status, head.reason, head.headers, client.options)
        return Answer(body, location)
    except PrivateAddress as error:
        raise RequestFailed("private_address", str(error)) from None
    except UnreadableAnswer as error:
        raise RequestFailed(error.reason, str(error)) from None
    except (OSError, ssl.SSLError, EOFError) as error:
        raise RequestFailed("connection", f"{type(error).__name__}: {error}") from None
