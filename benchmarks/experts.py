"""One expert layer by gather and scatter, against dispatch by one-hot matrices (the form of the official code).

    python -m benchmarks.experts [--json] [--device cuda] [--dtype bf16]

Time is that of forward and backward, the best of the runs, in which the two forms take turns. On a CPU it is the
processor's time, of all threads together, so that other programs on the machine disturb it little. Memory is the peak
above what was held before (weights, input). Outputs and gradients of the two forms are checked equal in fp32 first.
"""

import json
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import argument_parser
from microdit.model.layers import Experts

WIDTHS = {"xl": (1024, 2304), "tiny": (512, 1024)}  # width and expert width of a block in the middle
TOKENS = (64, 256, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def one_hot_experts(layer: Experts, x: Tensor) -> Tensor:
    """Expert choice with tokens picked and put back by products with one-hot matrices (B, E, k, T)."""
    k = int(layer.capacity * x.shape[1] / layer.num_experts)
    probs = layer.gate(x).softmax(dim=-1)
    weight, token = probs.transpose(1, 2).topk(k, dim=-1)
    dispatch = F.one_hot(token, x.shape[1]).to(x.dtype)
    taken = torch.einsum("bekt,btd->bekd", dispatch, x)
    hidden = F.gelu(torch.einsum("bekd,edf->bekf", taken, layer.w1))
    out = weight.unsqueeze(-1) * torch.einsum("bekf,efd->bekd", hidden, layer.w2)
    return torch.einsum("bekt,bekd->btd", dispatch, out)


def build(width: str, tokens: int, batch_tokens: int, device: str, dtype: torch.dtype) -> tuple[Experts, Tensor]:
    dim, hidden = WIDTHS[width]
    torch.manual_seed(0)
    layer = Experts(dim, hidden, multiple_of=1, num_experts=8, capacity=2.0)
    layer.init_weights(out_std=0.02)
    x = torch.randn(max(batch_tokens // tokens, 1), tokens, dim)
    return layer.to(device, dtype), x.to(device, dtype).requires_grad_()


def differences(layer: Experts, x: Tensor) -> dict[str, float]:
    """Largest differences of outputs and of gradients, relative to the largest value."""
    results = []
    for form in (layer, lambda x: one_hot_experts(layer, x)):
        out = form(x)
        results.append((out, torch.autograd.grad(out.square().sum(), (x, layer.w1, layer.w2, layer.gate.weight))))
    (a, grads_a), (b, grads_b) = results

    def relative(p: Tensor, q: Tensor) -> float:
        return ((p - q).abs().max() / q.abs().max()).item()

    return {"output": relative(a, b), "gradient": max(map(relative, grads_a, grads_b))}


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of tensors alive that were made under it (on a CPU, where torch keeps no such count)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def _release(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage.data_ptr() not in given:
                self.now += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Peak memory of one step above what is held before it."""
    if device == "cpu":
        with StorageMeter() as meter:
            step()
        return meter.peak
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def measure(
    forms: dict[str, Callable[[Tensor], Tensor]], layer: Experts, x: Tensor, repeat: int, device: str
) -> dict[str, dict[str, float]]:
    """Measure seconds and MiB of each form."""

    def step(form: Callable[[Tensor], Tensor]) -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        form(x).float().square().mean().backward()

    def seconds(form: Callable[[Tensor], Tensor]) -> float:
        if device == "cpu":
            start = time.process_time()
            step(form)
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(form)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    peaks = {name: peak_bytes(partial(step, form), device) for name, form in forms.items()}  # and warm
    turns = [{name: seconds(form) for name, form in forms.items()} for _ in range(repeat)]
    return {name: {"seconds": min(turn[name] for turn in turns), "peak_mib": peaks[name] / 2**20} for name in forms}


def compare(width: str, tokens: int, batch_tokens: int, repeat: int, device: str, dtype: str) -> dict[str, Any]:
    layer, x = build(width, tokens, batch_tokens, device, torch.float32)
    difference = differences(layer, x)
    if max(difference.values()) > 1e-4:
        raise SystemExit(f"{width}, {tokens} tokens: the two forms differ by {difference}")
    layer, x = build(width, tokens, batch_tokens, device, DTYPES[dtype])
    forms: dict[str, Callable[[Tensor], Tensor]] = {"gather": layer, "one_hot": partial(one_hot_experts, layer)}
    measured = measure(forms, layer, x, repeat, device)
    gather, one_hot = measured["gather"], measured["one_hot"]
    return {
        "width": width,
        "dim": layer.w1.shape[1],
        "tokens": tokens,
        "batch": x.shape[0],
        **measured,
        "speedup": one_hot["seconds"] / gather["seconds"],
        "memory_ratio": one_hot["peak_mib"] / gather["peak_mib"],
        "relative_difference": difference,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="of weights and input")
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=tuple(WIDTHS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="tokens of a sample")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a batch; batch = this / tokens")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(arguments)
    rows = []
    if not options.json:
        print("width tokens batch | gather ms  MiB | one-hot ms  MiB | faster  less memory")
    for width in options.widths:
        for tokens in options.tokens:
            row = compare(width, tokens, options.batch_tokens, options.repeat, options.device, options.dtype)
            rows.append(row)
            if not options.json:
                a, b = row["gather"], row["one_hot"]
                print(
                    f"{width:5} {tokens:6} {row['batch']:5} | {1e3 * a['seconds']:9.1f} {a['peak_mib']:4.0f} "
                    f"| {1e3 * b['seconds']:10.1f} {b['peak_mib']:4.0f} "
                    f"| {row['speedup']:5.2f}x {row['memory_ratio']:11.2f}x",
                    flush=True,
                )
    if options.json:
        threads = torch.get_num_threads() if options.device == "cpu" else None
        print(json.dumps({"device": options.device, "dtype": options.dtype, "threads": threads, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
