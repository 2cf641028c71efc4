"""Who may ask the server: hosts, origins, the token, and what a browser may do with the answers."""

import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from microdit.pipeline.base.errors import RequestError

COOKIE, READER = "microdit-token", "microdit-reader"
MARK = "X-Microdit-Token"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, token: str | None) -> None:
    """Refuse to serve others than this machine without a token.

    Raises:
        RequestError: the host is not loopback, and there is no token; or the token is short.
    """
    if token is not None and len(token) < 16:
        raise RequestError(f"--token: it has {len(token)} characters, expected 16 at least, such as {_example()}")
    if token is None and not is_loopback(host):
        raise RequestError(
            f"--host {host}: whoever reaches it could read the corpus; give a --token too, such as {_example()}"
        )


def _example() -> str:
    return secrets.token_urlsafe(18)


class Guard:
    """Checks every request before it is answered.

    `csrf` is what requests that change something have to bring along; only a page from here can know it.
    """

    def __init__(self, host: str, port: int, token: str | None):
        self.token = token
        self.csrf = secrets.token_urlsafe(24)
        self.any_host = not is_loopback(host)
        """Served to other machines, which may call this one by any name; the token keeps others away."""
        names = {"localhost", "127.0.0.1", "[::1]", host, f"[{host}]"}
        self.hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what is not ours, and set the headers of every answer."""
        response: web.StreamResponse = self._refusal(request) or await handler(request)
        if not response.prepared:
            self.protect(request, response)
        return response

    def protect(self, request: web.Request, response: web.StreamResponse) -> None:
        """Set the headers that every answer has."""
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        if READER not in request.cookies:
            response.set_cookie(READER, secrets.token_urlsafe(9), httponly=True, samesite="Strict")

    def _refusal(self, request: web.Request) -> web.Response | None:
        host = request.headers.get("Host", "")
        if not self.any_host and host.lower() not in self.hosts:
            return error(403, f"host {host[:80]!r}: this page is served as {' or '.join(sorted(self.hosts))} alone")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return error(403, f"origin {origin[:80]!r}: another site may not ask here")
        if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and (
            request.path != "/" or request.method != "GET"
        ):
            return error(403, "another site may not ask here")
        if (refused := self._token_refusal(request)) is not None:
            return refused
        if request.method not in ("GET", "HEAD") and not _same(request.headers.get(MARK, ""), self.csrf):
            return error(403, f"a change needs the header {MARK}, with the token that /api/corpus gives; load it again")
        return None

    def _token_refusal(self, request: web.Request) -> web.Response | None:
        """Check the token: in the address the first time, from then on in a cookie."""
        if self.token is None:
            return None
        if _same(request.cookies.get(COOKIE, ""), self.token):
            return None
        if not _same(request.query.get("token", ""), self.token):
            return error(401, "open the address that `microdit explore` printed, which ends with its token")
        if request.path != "/":
            return None
        response = web.Response(status=302, headers={"Location": "/"})
        response.set_cookie(COOKIE, self.token, httponly=True, samesite="Strict", max_age=30 * 86400)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response


def _same(given: str, wanted: str) -> bool:
    """Compare in a time that tells nothing of where they differ."""
    return hmac.compare_digest(given.encode(), wanted.encode())


def error(status: int, message: str) -> web.Response:
    """Answer with one message."""
    return web.json_response({"error": message}, status=status)


def reader(request: web.Request) -> str:
    """Name the reader of a request, to take turns by; nothing is allowed by it."""
    return request.cookies.get(READER) or str(request.remote)
