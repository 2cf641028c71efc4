"""Understand how servers say that pictures are not for us: robots.txt (RFC 9309), X-Robots-Tag, TDM reservations."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from multidict import CIMultiDict, CIMultiDictProxy

MOST_BYTES = 512 << 10  # of a robots.txt that are read
MOST_RULES = 5000
DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")
WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
LINE = re.compile(r"\s*([\w-]+)\s*:\s*([^#]*?)\s*(?:#.*)?")
Headers = CIMultiDict[str] | CIMultiDictProxy[str]


@dataclass(frozen=True)
class RobotsRules:
    """The rules of a robots.txt for one user agent."""

    rules: Sequence[tuple[str, bool]] = ()
    """Patterns of paths, and whether they are allowed."""

    @classmethod
    def parse(cls, data: bytes, user_agent: str) -> "RobotsRules":
        """Read the rules of the group that names the user agent best, or else of the group `*`."""
        groups: dict[str, list[tuple[str, bool]]] = {}
        names: list[str] = []
        naming = False
        for line in data[:MOST_BYTES].decode("utf-8-sig", "replace").splitlines():
            match = LINE.fullmatch(line)
            key, value = (match[1].lower(), match[2]) if match else ("", "")
            if key == "user-agent":
                names = [*names, value.lower()] if naming else [value.lower()]
                groups.setdefault(value.lower(), [])
                naming = True
            elif key in ("allow", "disallow"):
                naming = False
                for name in names if value else ():
                    groups[name].append((unquote(value), key == "allow"))
        agent = user_agent.lower().replace("mozilla", "").replace("compatible", "")
        named = [name for name in groups if name and name != "*" and name in agent]
        return cls(groups.get(max(named, key=len, default="*"), [])[:MOST_RULES])

    def allow(self, path: str) -> bool:
        """Tell whether a path (with its query) may be asked for: the longest pattern that fits decides."""
        path = unquote(path)
        fitting = [(len(pattern), allowed) for pattern, allowed in self.rules if _fits(pattern, path)]
        return max(fitting, default=(0, True))[1]


def _fits(pattern: str, path: str) -> bool:
    """Match `*` and a final `$`, in linear time: the pattern is a stranger's."""
    whole = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    at = len(first)
    last = others.pop() if whole and others else None
    for piece in others:
        found = path.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    if last is not None:
        return len(path) - len(last) >= at and path.endswith(last)
    return not whole or at == len(path)


def opted_out(headers: Headers, user_agent: str) -> tuple[str, str] | None:
    """Return the reason and the header by which an answer says that it is not for us, None if it does not."""
    for value in headers.getall("X-Robots-Tag", []):
        scope, colon, rest = value.partition(":")
        scope = scope.strip().lower()
        if colon and "," not in scope and scope not in WITH_VALUE:
            if scope != "*" and scope not in user_agent.lower():
                continue
            value = rest
        said = {part.strip().lower() for part in value.split(",")}
        said |= {"noindex"} if "none" in said else set()
        if found := next((one for one in DIRECTIVES if one in said), None):
            return found, f"X-Robots-Tag: {value.strip()[:80]}"
    if headers.get("TDM-Reservation", "").strip() == "1":
        return "tdm_reservation", "TDM-Reservation: 1"
    return None
