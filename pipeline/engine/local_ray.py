"""Start Ray on this machine for one build: it listens on loopback alone, and asks for a token of that build."""

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import environ
from pathlib import Path
from typing import Any

import ray
from ray import _raylet
from ray._private import services

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.machine import has_died, this_process

LOOPBACK = "127.0.0.1"


FOLDER, OWNER = "microdit-ray-", "owner.json"


def start(variables: Mapping[str, str], **options: Any) -> Path:
    """Start a cluster of this machine and connect to it; return its folder, for `stop`.

    Without "local" Ray would join a cluster that anybody started on this machine with `ray start`. The token stands in
    the environment of Ray's processes, which other users cannot read; without it Ray would write one into the home
    folder, readable to all.

    Args:
        variables: environment of the workers. They inherit it: with a runtime_env, those that Ray starts beforehand
            would be of no use.
        options: further arguments of `ray.init`.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = _make_folder()
    try:
        with _inherited({**variables, **token}), _loopback_kept():
            _read_settings_again()
            own: dict[str, Any] = {"_node_ip_address": LOOPBACK, "_temp_dir": str(folder / "ray")}
            ray.init(address="local", include_dashboard=False, **own, **options)
    except BaseException:  # a signal, too
        _read_settings_again()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def stop(folder: Path) -> None:
    """End the cluster that `start` began, remove its folder, and forget its token: the next one has another."""
    ray.shutdown()
    _read_settings_again()
    shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> Path:
    """Make a folder for Ray that is this user's alone: all that Ray makes, its sockets too, is open to everybody.

    Raises:
        RequestError: it cannot be made.
    """
    parent = Path(environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp")
    for left in parent.glob(f"{FOLDER}*/{OWNER}"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # another user's
            if has_died(json.loads(left.read_bytes())):
                shutil.rmtree(left.parent, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=parent))
        (folder / OWNER).write_text(json.dumps(this_process()))
    except OSError as error:
        raise RequestError(
            f"Ray cannot start here: a folder below {parent} cannot be made ({error.strerror}); set RAY_TMPDIR to one "
            "that can be written, with a short path"
        ) from error
    return folder


def _read_settings_again() -> None:
    """Make Ray read the token and its mode from the environment, not from its caches."""
    native: Any = _raylet  # C++, of which no types are known
    native.AuthenticationTokenLoader.instance().reset_cache()
    native.Config.initialize("")


@contextmanager
def _loopback_kept() -> Iterator[None]:
    """Keep Ray from replacing a loopback address by one that other machines reach, on which it would listen."""
    before = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = before


@contextmanager
def _inherited(settings: Mapping[str, str]) -> Iterator[None]:
    """Add variables to the environment of the processes that are started in the block."""
    before = {name: environ.get(name) for name in settings}
    environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value
