"""Room for the shards that a run reads at a time: in memory, or on a disk of the machine."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from microdit.pipeline.base.errors import RequestError


@dataclass(frozen=True)
class CacheRoom:
    """Memory and disk that a run's order needs at a time, and the folder for copies of a bucket's shards.

    lanes: of one process. window: shards of a lane that are read at a time. processes: of the machine.
    memory: bytes of a process. disk: bytes of the machine, None without a folder for them.
    """

    lanes: int
    window: int
    processes: int
    memory: int
    disk: int | None

    def spread(self, sizes: Mapping[str, ArrayLike], all_lanes: int) -> float:
        """Compute how much of another window there is room for, beside the one that is read: 0 to 1.

        Args:
            sizes: by column the bytes of each shard.
            all_lanes: of all processes.

        Raises:
            RequestError: there is no room for one, and it would come from a bucket again and again.
        """
        columns = [np.asarray(of, dtype=np.int64) for of in sizes.values()]
        shards = len(columns[0])
        if not shards:
            return 1.0
        window = self.lanes * min(self.window, -(-shards // all_lanes) + 1)
        own = sum(min(int(column.sum()), window * int(column.sum()) / len(column)) for column in columns)
        needed, room = (own, self.memory) if self.disk is None else (own * self.processes, self.disk)
        if needed > room:
            gigabytes, mebibytes = math.ceil(own * self.processes / 1e9), math.ceil(own / (1 << 20))
            disk = f"set cache_gb to {gigabytes} or more, or"
            memory = f"set cache_mb to {mebibytes} or more"
            name, value = ("cache_gb", room / 1e9) if self.disk is not None else ("cache_mb", room / (1 << 20))
            advice = (
                f"give cache_folder, a local folder, with cache_gb of {gigabytes} or more, or {memory}, or"
                if self.disk is None
                else f"{disk} leave cache_folder out and {memory}, or"
            )
            raise RequestError(
                f"{name} = {value:g}: {self.lanes} lanes of a process read {window} shards at a time, for which this "
                f"machine needs {needed / 1e9:.3g} GB, and would ask the bucket for them again and again; "
                f"{advice} lower shuffle_window or lanes"
            )
        return min(room / needed - 1, 1.0)
