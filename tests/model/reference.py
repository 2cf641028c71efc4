"""MicroDiT and EDM written down plainly, to test against: float64, one sample at a time, loops over heads and experts.

It shares no code with `model/`: a state dict (any floating dtype) and a few sizes go in.
`python -m tests.model.reference` writes tests/data/parity_plain, a set in the parity format with what the released
outputs lack.
"""

import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.model.parity_format import ParitySet, make_input

State = dict[str, Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return out if weight is None else out * weight


def linear(p: State, name: str, x: Tensor) -> Tensor:
    out = x @ p[f"{name}.weight"].T
    return out + p[f"{name}.bias"] if f"{name}.bias" in p else out


def attend(q: Tensor, k: Tensor, v: Tensor, head_dim: int, eps: float) -> Tensor:
    """q (N, H), k and v (M, H)."""
    q, k = norm(q, eps), norm(k, eps)
    heads = []
    for start in range(0, q.shape[1], head_dim):
        part = slice(start, start + head_dim)
        scores = (q[:, part] @ k[:, part].T / math.sqrt(head_dim)).exp()
        heads.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
    return torch.cat(heads, dim=1)


def self_attention(p: State, name: str, x: Tensor, head_dim: int, eps: float) -> Tensor:
    qkv = linear(p, f"{name}.qkv", x)
    hidden = qkv.shape[1] // 3
    q, k, v = qkv[:, :hidden], qkv[:, hidden : 2 * hidden], qkv[:, 2 * hidden :]
    return linear(p, f"{name}.proj", attend(q, k, v, head_dim, eps))


def cross_attention(p: State, name: str, x: Tensor, y: Tensor, head_dim: int, eps: float) -> Tensor:
    kv = linear(p, f"{name}.kv_linear", y)
    hidden = kv.shape[1] // 2
    out = attend(linear(p, f"{name}.q_linear", x), kv[:, :hidden], kv[:, hidden:], head_dim, eps)
    return linear(p, f"{name}.proj", out)


def feed_forward(p: State, name: str, x: Tensor) -> Tensor:
    gate = linear(p, f"{name}.w1", x)
    return linear(p, f"{name}.w3", gate * torch.sigmoid(gate) * linear(p, f"{name}.w2", x))


def experts(p: State, name: str, x: Tensor, capacity: float) -> Tensor:
    """x (T, D); every expert takes its best tokens."""
    w1, w2 = p[f"{name}.w1"], p[f"{name}.w2"]
    count = int(capacity * x.shape[0] / w1.shape[0])
    probs = linear(p, f"{name}.gate", x).softmax(dim=1)
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        for token in sorted(range(x.shape[0]), key=lambda t: -probs[t, e].item())[:count]:
            out[token] = out[token] + probs[token, e] * (gelu(x[token] @ w1[e]) @ w2[e])
    return out


def block(p: State, name: str, x: Tensor, y: Tensor, c: Tensor, config: dict) -> Tensor:
    head_dim, eps = config["head_dim"], config["norm_eps"]
    shift1, scale1, gate1, shift2, scale2, gate2 = linear(p, f"{name}.adaLN_modulation.1", gelu_tanh(c)).chunk(6)
    h = norm(x, eps, p[f"{name}.norm1.weight"]) * (1 + scale1) + shift1
    x = x + gate1 * self_attention(p, f"{name}.attn", h, head_dim, eps)
    h = norm(x, eps, p[f"{name}.norm2.weight"])
    x = x + cross_attention(p, f"{name}.cross_attn", h, y, head_dim, eps)
    h = norm(x, eps, p[f"{name}.norm3.weight"]) * (1 + scale2) + shift2
    if f"{name}.mlp.gate.weight" in p:
        h = experts(p, f"{name}.mlp", h, config["expert_capacity"])
    else:
        h = feed_forward(p, f"{name}.mlp", h)
    return x + gate2 * h


def mlp(p: State, name: str, x: Tensor, eps: float) -> Tensor:
    return linear(p, f"{name}.fc2", norm(gelu_tanh(linear(p, f"{name}.fc1", x)), eps, p[f"{name}.norm.weight"]))


def timestep(p: State, t: Tensor) -> Tensor:
    angles = torch.stack([t * 10000 ** (-i / 256) for i in range(256)])
    h = gelu_tanh(linear(p, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()])))
    return linear(p, "t_embedder.mlp.2", h)


def position(dim: int, rows: int, columns: int, scale: float) -> Tensor:
    table = torch.zeros(rows * columns, dim, dtype=torch.float64)
    quarter = dim // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 10000 ** (-i / quarter) / scale
                for offset, place in ((0, column), (2 * quarter, row)):
                    table[row * columns + column, offset + i] = math.sin(place * frequency)
                    table[row * columns + column, offset + quarter + i] = math.cos(place * frequency)
    return table


def sample_forward(p: State, config: dict, x: Tensor, t: Tensor, y: Tensor, kept: list[int] | None = None) -> Tensor:
    """One sample: x (C, H, W), t (), y (L, Ccap) with real tokens only -> (C, H, W). kept: patches not masked."""
    size, eps, head_dim = config["patch_size"], config["norm_eps"], config["head_dim"]
    rows, columns = x.shape[1] // size, x.shape[2] // size
    kernel = p["x_embedder.proj.weight"].flatten(1)
    patches = [
        kernel @ x[:, r * size : (r + 1) * size, c * size : (c + 1) * size].flatten() + p["x_embedder.proj.bias"]
        for r in range(rows)
        for c in range(columns)
    ]
    scale = config["pos_interp_scale"] * math.sqrt(rows * columns) / (config["input_size"] // size)
    h = torch.stack(patches) + position(config["dim"], rows, columns, scale)
    y = mlp(p, "y_embedder.y_proj", y, eps)
    name = "y_emb_preprocess"
    y = y + self_attention(p, f"{name}.attn", norm(y, eps, p[f"{name}.norm1.weight"]), head_dim, eps)
    y = y + feed_forward(p, f"{name}.mlp", norm(y, eps, p[f"{name}.norm2.weight"]))
    c = timestep(p, t) + mlp(p, "pooled_y_emb_process", y.mean(0), eps)

    def project(name: str, z: Tensor) -> Tensor:
        return linear(p, f"{name}.1", norm(z, eps, p[f"{name}.0.weight"])) if f"{name}.0.weight" in p else z

    if config["use_patch_mixer"]:
        h, y_mixer = project("patch_mixer_map_xin", h), project("patch_mixer_map_y", y)
        for i in range(config["patch_mixer_depth"]):
            h = block(p, f"patch_mixer.{i}", h, y_mixer, c, config)
    if kept is not None:
        h = h[kept]
    h = project("patch_mixer_map_xout", h)
    for i in range(config["depth"]):
        h = block(p, f"blocks.{i}", h, y, c, config)
    shift, scale_ = linear(p, "final_layer.adaLN_modulation.1", gelu_tanh(c)).chunk(2)
    h = linear(p, "final_layer.linear", norm(h, eps, p["final_layer.norm_final.weight"]) * (1 + scale_) + shift)
    out = torch.zeros_like(x)
    for i in range(rows * columns):
        removed = kept is not None and i not in kept
        patch = p["mask_token"].flatten() if removed else h[i if kept is None else kept.index(i)]
        r, c_ = divmod(i, columns)
        out[:, r * size : (r + 1) * size, c_ * size : (c_ + 1) * size] = patch.view(size, size, -1).permute(2, 0, 1)
    return out


class PlainNet(nn.Module):
    """The plain network, called as `MicroDiT` is. Differentiable with respect to `state`, a float64 state dict."""

    def __init__(self, state: State, config: dict[str, Any]) -> None:
        super().__init__()
        self.state = {key: value.double() for key, value in state.items()}
        self.config, self.patch_size = config, config["patch_size"]

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, text_mask: Tensor | None = None, mask_ratio: float = 0.0,
        permutation: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        y = y.squeeze(1) if y.ndim == 4 else y
        t = t.expand(len(x))
        samples, masks = [], []
        for b in range(len(x)):
            tokens = y[b].double() if text_mask is None else y[b][text_mask[b]].double()
            kept = None
            if mask_ratio > 0:
                assert permutation is not None
                kept = permutation[b, : int(permutation.shape[1] * (1 - mask_ratio))].tolist()
                masks.append(torch.tensor([float(i not in kept) for i in range(permutation.shape[1])]))
            samples.append(sample_forward(self.state, self.config, x[b].double(), t[b].double(), tokens, kept))
        out = {"sample": torch.stack(samples)}
        return out | {"mask": torch.stack(masks)} if masks else out


def denoise(net: nn.Module, x: Tensor, sigma: float, y: Tensor, cfg: float, sd: float = 0.9) -> Tensor:
    """D(x; sigma) in float64."""
    x, root = x.double(), math.sqrt(sigma**2 + sd**2)
    t = torch.tensor([math.log(sigma) / 4])
    f = net(x / root, t, y)["sample"]
    if cfg != 1:
        zero = net(x / root, t, torch.zeros_like(y))["sample"]
        f = zero + cfg * (f - zero)
    return sd**2 / root**2 * x + sigma * sd / root * f


def heun(net: nn.Module, latents: Tensor, y: Tensor, steps: int, cfg: float) -> Tensor:
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    times = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    x = latents.double() * times[0]
    for now, then in pairwise(times):
        d = (x - denoise(net, x, now, y, cfg)) / now
        euler = x + (then - now) * d
        if then > 0:
            d = (d + (euler - denoise(net, euler, then, y, cfg)) / then) / 2
        x = x + (then - now) * d
    return x


def loss(net: nn.Module, inputs: State, params: dict[str, Any], sd: float = 0.9) -> Tensor:
    """Mean over samples; a masked sample's is the mean over its kept patches."""
    losses = []
    for b, normal in enumerate(inputs["rnd_normal"].flatten().tolist()):
        sigma = math.exp(normal * params["p_std"] + params["p_mean"])
        x0, noise = inputs["x0"][b].double(), inputs["noise"][b].double()
        x, root = x0 + sigma * noise, math.sqrt(sigma**2 + sd**2)
        masking = {}
        if params.get("mask_ratio"):
            masking = {"mask_ratio": params["mask_ratio"], "permutation": inputs["permutation"][b : b + 1]}
        t = torch.tensor([math.log(sigma) / 4], dtype=torch.float64)
        out = net((x / root)[None], t, inputs["y"][b : b + 1], None, **masking)
        d = sd**2 / root**2 * x + sigma * sd / root * out["sample"][0]
        error = root**2 / (sigma * sd) ** 2 * (d - x0).square()
        if masking:
            size, columns = net.patch_size, x0.shape[2] // net.patch_size
            kept = [divmod(i, columns) for i, removed in enumerate(out["mask"][0].tolist()) if not removed]
            error = torch.stack([error[:, r * size : (r + 1) * size, c * size : (c + 1) * size] for r, c in kept])
        losses.append(error.mean())
    return torch.stack(losses).mean()


BASE: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "dim": 32, "depth": 3, "head_dim": 8, "multiple_of": 16,
    "caption_channels": 12, "pos_interp_scale": 1.0, "norm_eps": 1e-6, "depth_init": True,
    "qkv_multipliers": [0.5, 0.75, 1.0], "ffn_multipliers": [0.5, 2.25, 4.0], "use_patch_mixer": True,
    "patch_mixer_depth": 2, "patch_mixer_dim": 24, "patch_mixer_qkv_ratio": 1.0, "patch_mixer_mlp_ratio": 4.0,
    "use_bias": False, "num_experts": 4, "expert_capacity": 2.0, "experts_every_n": 2,
}  # fmt: skip

MODELS = {
    "plain": BASE,
    "bias": BASE | {"use_bias": True, "in_channels": 3, "pos_interp_scale": 2.0, "expert_capacity": 1.5},
    "bare": BASE | {"use_patch_mixer": False, "experts_every_n": 1, "patch_size": 4},
    "same_width": BASE | {"patch_mixer_dim": 32, "patch_mixer_depth": 3, "experts_every_n": 3, "depth": 4,
                          "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [1.0, 3.0]},
}  # fmt: skip


def cases() -> list[dict[str, Any]]:
    """The set's cases without outputs."""

    def case(name: str, op: str, model: str, shape: tuple, params: dict, mask_token: bool = False, **more: Any) -> dict:
        def normal(what: str, size: list[int]) -> dict[str, Any]:
            return {"gen": "normal", "seed": f"plain/{model}/{name}/{what}", "shape": size}

        batch, config = shape[0], MODELS[model]
        size = [batch, config["in_channels"], *shape[1:]]
        inputs = {"y": normal("y", [batch, 1, 5, config["caption_channels"]])}
        if op == "forward":
            inputs |= {"x": normal("x", size), "t": {"values": [0.3, -0.7][:batch], "shape": [batch]}}
        elif op == "loss":
            inputs |= {"x0": normal("x0", size), "noise": normal("noise", size)}
            inputs["rnd_normal"] = normal("rnd_normal", [batch, 1, 1, 1])
        else:
            inputs["latents"] = normal("latents", size)
        if "mask_ratio" in params:
            tokens = shape[1] * shape[2] // config["patch_size"] ** 2
            inputs["permutation"] = {
                "gen": "permutation", "seed": f"plain/{model}/{name}/permutation", "shape": [batch, tokens],
            }  # fmt: skip
        weights = {"rule": "B", "salt": "", "fill_mask_token": mask_token}
        entry = {"name": f"{model}/{name}", "model": model, "op": op, "weights": weights}
        return entry | {"inputs": inputs, "params": params} | more

    stages = {"p_mean": -0.6, "p_std": 1.2}
    square, wide = (2, 8, 8), (2, 12, 4)
    return [
        *(case("forward", "forward", model, square, {}) for model in MODELS),
        case("forward_wide", "forward", "plain", wide, {}),
        case("forward_cfg", "forward", "bias", square, {"cfg": 3.0}),
        case("forward_masked", "forward", "plain", square, {"mask_ratio": 0.75}),
        case("forward_masked_token", "forward", "same_width", square, {"mask_ratio": 0.5}, mask_token=True),
        case("loss", "loss", "bias", square, stages | {"grads": True}),
        case("loss_masked", "loss", "plain", square, stages | {"mask_ratio": 0.75, "grads": True}),
        case("loss_masked_wide", "loss", "same_width", wide, stages | {"mask_ratio": 0.5, "grads": True}),
        case("sampler", "sampler", "plain", (1, 8, 8), {"num_steps": 3, "cfg": 1.0}),
        case("sampler_cfg", "sampler", "bias", (1, 8, 8), {"num_steps": 3, "cfg": 2.0}),
    ]  # fmt: skip


def outputs(case: dict[str, Any], net: PlainNet, inputs: State) -> dict[str, Tensor]:
    params = case["params"]
    if case["op"] == "sampler":
        return {"sample": heun(net, inputs["latents"], inputs["y"], params["num_steps"], params["cfg"])}
    if case["op"] == "loss":
        keys = sorted(key for key in net.state if key not in ("pos_embed", "mask_token"))
        for key in keys:
            net.state[key].requires_grad_()
        value = loss(net, inputs, params)
        grads = torch.autograd.grad(value, [net.state[key] for key in keys])
        return {"loss": value.detach(), "grad_l2": torch.stack([g.norm() for g in grads])}
    x, t, y, cfg = inputs["x"], inputs["t"], inputs["y"], params.get("cfg", 1.0)
    masking = {k: v for k, v in (params | inputs).items() if k in ("mask_ratio", "permutation")}
    out = net(x, t, y, **masking)
    if cfg != 1:
        zero = net(x, t, torch.zeros_like(y))["sample"]
        out["sample"] = zero + cfg * (out["sample"] - zero)
    return out


TOLERANCE = {
    "sample": {"atol": 3e-5},
    "sampler": {"atol": 1e-3},
    "mask": {"atol": 0.0},
    "loss": {"rtol": 1e-5},
    "grad_l2": {"rtol": 1e-4, "atol": 1e-6},
}


def plain_net(parity: ParitySet, case: dict[str, Any]) -> PlainNet:
    """The plain network of a case of any set, filled by its rule."""
    net = parity.build(case)
    return PlainNet(net.state_dict(), net.config)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spec: dict[str, Any] = {
        "title": "MicroDiT by a plain float64 reference: what the released outputs do not cover",
        "made_with": {"command": "python -m tests.model.reference", "torch": torch.__version__},
        "edm": {"sigma_data": 0.9, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7},
        "models": {name: {"constructor": config} for name, config in MODELS.items()},
        "cases": cases(),
    }
    (folder / "golden_spec.json").write_text(json.dumps(spec))
    parity, arrays = ParitySet(folder), {}
    for case in spec["cases"]:
        inputs = {name: make_input(entry) for name, entry in case["inputs"].items()}
        case["outputs"] = {}
        for name, value in outputs(case, plain_net(parity, case), inputs).items():
            array = value.detach().numpy().astype(np.float64 if name == "grad_l2" else np.float32)
            key = f"{case['name']}/{name}".replace("/", "|")
            arrays[key] = array
            case["outputs"][name] = {
                "array": key,
                "tolerance": TOLERANCE["sampler" if case["op"] == "sampler" else name],
                "file": "golden_plain.npz",
                "shape": list(array.shape),
                "absmax": float(np.abs(array).max()),
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            }
    np.savez_compressed(folder / "golden_plain.npz", **arrays)
    (folder / "golden_spec.json").write_text(json.dumps(spec, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(__file__).parents[1] / "data" / "parity_plain")
