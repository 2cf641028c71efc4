"""The Ray cluster that a build works on: the one that is there, or one on this machine; its size and its nodes."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from microdit.pipeline.base.errors import RequestError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray itself will have it; silences its warning


# a host that vanishes without a word is given up after two minutes, not seven; shorter, and long tasks are cut off:
# Ray's servers take pings that come more often than every 60 s for an attack
os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "90000")


os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "30000")


# the driver asks every task how it ended, but for those that a signal makes it drop
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")


OBJECT_STORE = 100 << 20  # bytes: only names and small dictionaries travel


# one thread a process: the engine, not OpenMP, spreads the work
WORKERS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def joined() -> Iterator[None]:
    """Work on the cluster that we are connected to, the one that RAY_ADDRESS names, or one on this machine.

    Raises:
        RequestError: nothing answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(runtime_env={"env_vars": WORKERS}, **quiet)
        else:
            # Without "local" Ray would join a cluster that anybody started on this machine with `ray start`. Workers
            # inherit the environment: with a runtime_env, those that Ray starts beforehand would be of no use.
            with _inherited(WORKERS):
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
    except ConnectionError as error:
        raise RequestError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); "
            "start it, or unset RAY_ADDRESS to work on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _inherited(settings: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started in the block have these in their environment."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def size(most_cpus: float | None, most_gpus: float | None) -> tuple[float, float]:
    """CPUs and GPUs to lay the work out for.

    Those that are there; and of those that an autoscaler may add as many CPUs again, and all GPUs: what is asked for
    and finds no place yet is the demand that the autoscaler sees.
    """
    there = ray.cluster_resources()
    cpus, gpus = max(there.get("CPU", 0.0), 1.0), there.get("GPU", 0.0)
    return max(cpus, min(2 * cpus, most_cpus or 0.0)), max(gpus, most_gpus or 0.0)


def nodes() -> list[str]:
    """The ids of the nodes that are alive and have CPUs."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def is_alive(node: str) -> bool:
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())
