"""The miniatures on the servers of loopback: a hub's repositories, and files at plain addresses."""

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from tests.miniatures import Miniature
from tests.servers.files_server import FilesServer
from tests.servers.hub import Hub

REPOSITORY = re.compile("/api/(datasets|models)/")  # the client asks for other things, too


def publish(miniatures: Iterable[Miniature], hub: Hub, files: FilesServer) -> None:
    """Put all files of the miniatures on the servers."""
    for miniature in miniatures:
        for repo, repository in miniature.repositories.items():
            for branch, found in repository.branches.items():
                hub.add(repo, found, kind="datasets", branch=branch, gated=repository.gated)
            hub.add(repo, repository.files, kind="datasets", gated=repository.gated, commit=repository.revision)
        for path, data in miniature.urls.items():
            files.add(path.removeprefix("/"), data)


def here(url: str, files: FilesServer) -> str:
    """Return the address on loopback of a file that is published elsewhere."""
    return f"{files.url}{urlsplit(url).path}"


def missed(hub: Hub, files: FilesServer) -> list[str]:
    """List the requests for repositories and files that do not exist."""
    asked = [r for r in hub.requests if r.status == 404 and ("/resolve/" in r.path or REPOSITORY.match(r.path))]
    return [r.path for r in asked] + [a.path for a in files.asked if a.status == 404]
