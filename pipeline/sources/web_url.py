"""URLs sent as they are written: yarl, like a browser's address bar, spells them in its own way."""

import re
from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

LONE_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
KEPT = "%!$&'()*+,;=:@/?[]"  # characters that stand for themselves in a path or a query


def as_written(url: str) -> URL:
    """Make the URL of a request: percent-encoding, dot segments and empty queries stay, what may not be sent is quoted.

    Raises:
        ValueError: it has no host, or a port that is no number.
    """
    scheme, _, rest = url.partition("://")
    end = re.search(r"[/?#]|$", rest)
    assert end is not None
    authority, target = rest[: end.start()], rest[end.start() :].partition("#")[0]
    octets = target.encode("utf-8", "surrogateescape")
    quoted = quote(LONE_PERCENT.sub(b"%25", octets), safe=KEPT)
    # the query goes along with the path: apart from it, an empty one would be lost
    return URL(f"{scheme.lower()}://{authority}/").with_path(
        quoted if quoted.startswith("/") else f"/{quoted}", encoded=True
    )


def redirected(url: str, location: str) -> str:
    """Find the URL that a redirect leads to."""
    location = location.strip()
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", location):
        return location
    parts = urlsplit(url)
    if location.startswith("//"):
        return f"{parts.scheme}:{location}"
    if location.startswith("/"):
        return f"{parts.scheme}://{parts.netloc}{location}"
    return urljoin(url, location)
