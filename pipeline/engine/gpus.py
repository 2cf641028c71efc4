"""Know which GPUs of a cluster models worked on, and leave out the nodes whose GPUs torch cannot use."""

from collections.abc import Collection
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from microdit.pipeline.base.errors import RequestError

ADVICE = (
    "Mend their drivers (`nvidia-smi` and `python -c 'import torch; torch.cuda.init()'` there tell more), install "
    "torch's CUDA build, or start Ray there with --num-gpus=0: then models run on CPUs, a hundred times slower"
)


class _Holder:
    """Holds a GPU, so that Ray gives it to nobody."""


class GpuNodes:
    """The GPUs that models of a build worked on, and the nodes that are left out, by id, with the reason."""

    def __init__(self) -> None:
        self._worked: set[tuple[str, str]] = set()
        self._left_out: dict[str, str] = {}
        self._holders: list[Any] = []

    @property
    def count(self) -> int:
        """GPUs on which a model was loaded."""
        return len(self._worked)

    @property
    def left_out(self) -> list[str]:
        """Why nodes are left out, each with its name."""
        return list(self._left_out.values())

    def add(self, node: str, gpus: Collection[str]) -> None:
        """Count the GPUs of a node that a model was loaded on."""
        self._worked.update((node, gpu) for gpu in gpus)

    def leave_out(self, node: str, reason: str) -> bool:
        """Hold all GPUs of a node until the build ends; False if that was done before.

        Ray itself then starts models on other nodes, and asks an autoscaler for more.
        """
        if node in self._left_out:
            return False
        self._left_out[node] = reason
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        holder: Any = ray.remote(_Holder)
        holder = holder.options(num_cpus=0, num_gpus=1, scheduling_strategy=here)
        self._holders += [holder.remote() for _ in range(int(_gpus().get(node, 0)))]
        return True

    def usable(self, most: float | None) -> float:
        """Return the GPUs of the cluster, or as many as an autoscaler may grow it to, without those left out."""
        found = _gpus()
        lost = sum(count for node, count in found.items() if node in self._left_out)
        return max(sum(found.values()), most or 0.0) - lost

    def check_some_left(self, most: float | None) -> None:
        """Make sure that a GPU can be used, or may come.

        Raises:
            RequestError: none can.
        """
        if self.usable(most) <= 0:
            raise RequestError(f"no GPU of the cluster can be used: {'; '.join(self.left_out)}. {ADVICE}")


def _gpus() -> dict[str, float]:
    """Return the number of GPUs of each living node that has some, by its id."""
    return {
        node["NodeID"]: node["Resources"]["GPU"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    }
