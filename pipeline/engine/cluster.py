"""The Ray cluster that a build works on: the one that is there, or one on this machine; its size and its nodes."""

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.retry import Backoff
from microdit.pipeline.engine import local_ray, workers
from microdit.pipeline.engine.gpus import GpuNodes
from microdit.pipeline.engine.layout import Layout
from microdit.pipeline.engine.messages import ErrorReport

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray itself will have it; silences its warning
# A host that vanishes without a word is given up after two minutes, not seven. With shorter times long tasks are cut
# off: Ray's servers take pings that come more often than every 60 s for an attack.
os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "90000")
os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "30000")
# the driver asks every task how it ended, but for those that a signal makes it drop
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

OBJECT_STORE = 100 << 20  # bytes: only names and small records travel
# one thread a process: the engine, not OpenMP, spreads the work
WORKERS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
MEASURE_EVERY = 5.0  # seconds between two queries of the cluster's size
HEAD_SECONDS = 20.0  # for the cluster's head to answer
NODE_CHECK_SECONDS = 60.0  # for every node to say that it sees the corpus


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
    if address:
        check_address(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(runtime_env={"env_vars": WORKERS}, **quiet)
        else:
            folder = local_ray.start(WORKERS, object_store_memory=OBJECT_STORE, **quiet)
    except ConnectionError as error:
        raise RequestError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); "
            "start it, or unset RAY_ADDRESS to work on this machine"
        ) from error
    except (OSError, ValueError) as error:
        if "AF_UNIX" not in str(error):
            raise
        raise RequestError(
            f"Ray cannot start here: {error}; its sockets lie in a folder below RAY_TMPDIR, else TMPDIR: set "
            "RAY_TMPDIR=/tmp, or another short path"
        ) from error
    try:
        yield
    finally:
        if address:
            ray.shutdown()
        else:
            local_ray.stop(folder)


def check_address(address: str) -> None:
    """Check RAY_ADDRESS before Ray does, which takes minutes over a head that is gone.

    Raises:
        RequestError: it is no address of a head, or nothing listens there.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise RequestError(
            f"RAY_ADDRESS={address}: expected HOST:PORT of the cluster's head, such as 10.0.0.1:6379, or auto; an "
            "http:// address is the dashboard's (`ray job submit`), ray:// is Ray Client's, which builds do not use"
        )
    backoff = Backoff(1.0, 5.0)
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_SECONDS / 2).close()
            return
        except OSError as error:
            if (pause := backoff.next_pause(HEAD_SECONDS)) is None:
                raise RequestError(
                    f"RAY_ADDRESS={address}: no Ray cluster answers there ({first_line(error)}); "
                    "start it, or unset RAY_ADDRESS to work on this machine"
                ) from error
        time.sleep(pause)


class ClusterView:
    """The nodes of the cluster, and the layout of the work on them.

    Args:
        gpu_models: stages with work whose model wants a GPU.
        cpu_models: stages with work whose model stays on CPUs.
        resources: `cpus` and `gpus` that an autoscaler may grow the cluster to; the others are arguments of `Layout`.
    """

    def __init__(self, gpu_models: int, cpu_models: int, resources: Mapping[str, float]):
        self._gpu_models, self._cpu_models = gpu_models, cpu_models
        self._most = resources.get("cpus"), resources.get("gpus")
        self._options = {name: value for name, value in resources.items() if name not in ("cpus", "gpus")}
        self.gpus = GpuNodes()
        self._measure()

    def refresh(self) -> None:
        """Measure the cluster again if the last time is long ago: nodes come and go."""
        if time.monotonic() - self._measured >= MEASURE_EVERY:
            self._measure()

    def leave_out_gpus(self, node: str, reason: str) -> bool:
        """Use the GPUs of a node no more; False if that is so already.

        Raises:
            RequestError: there is none besides.
        """
        new = self.gpus.leave_out(node, reason)
        self.gpus.check_some_left(self._most[1])
        self._measure()
        return new

    def _measure(self) -> None:
        self._measured = time.monotonic()
        self.nodes = nodes()
        cpus, gpus = all_cpus(self._most[0]), self.gpus.usable(self._most[1])
        self.layout = Layout.for_cluster(cpus, gpus, self._gpu_models, self._cpu_models, **self._options)


def all_cpus(most: float | None) -> float:
    """Return the CPUs to lay the work out for.

    These are all that the cluster has; and of those that an autoscaler may add as many again (of GPUs all). What is
    asked for and cannot start yet is the demand that the autoscaler sees.
    """
    cpus = max(ray.cluster_resources().get("CPU", 0.0), 1.0)
    return max(cpus, min(2 * cpus, most or 0.0))


def nodes() -> list[str]:
    """Return the ids of the nodes that are alive and have CPUs."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def is_alive(node_id: str) -> bool:
    """Return True if the node is part of the cluster."""
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def check_nodes(context: workers.BuildContext) -> None:
    """Make sure that every node has the same software and sees the corpus.

    Raises:
        RequestError: one does not.
    """
    task: Any = ray.remote(num_cpus=0)(workers.check_node)
    context_ref = ray.put(context)
    refs = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote([context_ref])
        for node in nodes()
    ]
    for ref in ray.wait(refs, num_returns=len(refs), timeout=NODE_CHECK_SECONDS)[0] if refs else ():
        try:
            error: ErrorReport | None = ray.get(ref)
        except ray.exceptions.RayError:
            continue  # the node is gone; its successor checks when it works for the first time
        if error is not None:
            raise RequestError(error.message)
