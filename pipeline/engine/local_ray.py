"""Start Ray on this machine for one build: it listens on loopback alone, and asks for a token of that build."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import environ
from typing import Any

import ray
from ray import _raylet
from ray._private import services

LOOPBACK = "127.0.0.1"


def start(variables: Mapping[str, str], **options: Any) -> None:
    """Start a cluster of this machine and connect to it; `stop` ends it.

    Without "local" Ray would join a cluster that anybody started on this machine with `ray start`. The token stands in
    the environment of Ray's processes, which other users cannot read; without it Ray would write one into the home
    folder, readable to all.

    Args:
        variables: environment of the workers. They inherit it: with a runtime_env, those that Ray starts beforehand
            would be of no use.
        options: further arguments of `ray.init`.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _inherited({**variables, **token}), _loopback_kept():
        _read_settings_again()
        ray.init(address="local", _node_ip_address=LOOPBACK, include_dashboard=False, **options)


def stop() -> None:
    """End the cluster that `start` began, and forget its token: the next one has another."""
    ray.shutdown()
    _read_settings_again()


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
