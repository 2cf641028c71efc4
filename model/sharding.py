"""The network over several processes with FSDP2: each holds a part of every weight, gradient, average and moment."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from microdit.model.network import MicroDiT


def shard_blocks(net: MicroDiT, device_type: str, processes: int, bf16: bool) -> None:
    """Share out the parameters of `net`, block by block, and those outside of blocks together.

    What a process holds, and what AdamW changes, is float32. With bf16 the blocks are gathered in bfloat16, which is
    what autocast would make of the matrices anyway (of the norms' weights too, which autocast leaves), and gradients
    are summed over micro-batches and processes in float32.
    """
    mesh = init_device_mesh(device_type, (processes,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream stays in float32, as under autocast
    )
    for module in (*net.patch_mixer, *net.blocks, net):
        # also the last one: parameters that stayed gathered after a pass without a gradient would soon be stale
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory; all of it where nothing is shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather all of a tensor; of a shared one, which all processes have to ask for together, a new one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool, copy_to: str | None = None) -> dict[str, Tensor]:
    """Gather all of each tensor; processes that do not `keep` them get none. All have to ask together."""
    gathered = {}
    for name, value in tensors.items():
        value = whole(value.detach())  # one after the other: no device holds more than one of those that are copied
        if keep:
            gathered[name] = value if copy_to is None else value.to(copy_to, copy=True)
    return gathered


def shared_as(like: Tensor, full: Tensor) -> Tensor:
    """Copy the first process's `full` as `like` is: on its device, and in its parts. All have to ask together.

    The other processes' `full` tells shape and dtype alone: it may be on the device `meta`.
    """
    together = dist.is_initialized()
    if not together or dist.get_rank() == 0:
        copied = full.detach().to(like.device, copy=True)
    else:
        copied = torch.empty(full.shape, dtype=full.dtype, device=like.device)
    if isinstance(like, DTensor) and like.shape == full.shape:
        return distribute_tensor(copied, like.device_mesh, like.placements)
    if together:
        dist.broadcast(copied, 0)
    return copied
