"""Reader of the parity format: golden_spec.json, the arrays it names (*.npz), and state_dict_manifest.json.

Weights and inputs are made from names, so only outputs are stored. An operation is run on a `net` that is called as
`net(x, t, y, mask_ratio=..., permutation=...) -> {"sample", "mask"}`.
"""

import inspect
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from microdit.model.edm import EDM
from microdit.model.network import PRESETS, MicroDiT

TRACE_NAMES = {"x_embed_before_pos": "x_embedder", "t_embed": "t_embedder", "pooled_y": "pooled_y_emb_process"}
STEP_NAMES = ("num_inference_steps", "num_steps", "n_steps", "steps", "n")


def generator(seed: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))


def normal(seed: str, shape: tuple[int, ...] | list[int]) -> np.ndarray:
    return generator(seed).standard_normal(tuple(shape), dtype=np.float32)


class ParitySet:
    """One folder of the format. `arrays` are loaded as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec: dict[str, Any] = json.loads((folder / "golden_spec.json").read_text())
        self._files: dict[str, Any] = {}

    def manifest(self) -> dict[str, Any]:
        path = self.folder / "state_dict_manifest.json"
        return json.loads(path.read_text())["configs"] if path.exists() else {}

    def array(self, name: str, entry: dict[str, Any]) -> np.ndarray:
        """The stored array of an output, whose shape must be the one the spec states."""
        file = entry["file"]
        if file not in self._files:
            self._files[file] = np.load(self.folder / file, allow_pickle=False)
        assert name in self._files[file].files, f"array {name!r} is missing from {self.folder / file}"
        array = self._files[file][name]
        assert list(array.shape) == entry["shape"], f"{name}: stored {array.shape}, spec says {entry['shape']}"
        return array

    def config(self, model: str) -> dict[str, Any]:
        assert model in self.spec["models"], f"unknown model {model!r}, the set has {', '.join(self.spec['models'])}"
        return constructor_config(self.spec["models"][model]["constructor"], self.spec.get("arch_defaults", {}))

    def edm(self, case: dict[str, Any]) -> EDM:
        constants = self.spec.get("edm", {}) | case["params"]
        return EDM(**{k: constants[k] for k in ("sigma_data", "sigma_min", "sigma_max", "rho") if k in constants})

    def build(self, case: dict[str, Any]) -> MicroDiT:
        """The case's model in fp32 with weights filled by rule; no more memory than one copy of the weights."""
        with torch.device("meta"):
            net = MicroDiT(**self.config(case["model"]))
        net.to_empty(device="cpu")
        net.reset_positions()
        net.mask_token.zero_()
        fill(net.state_dict(), **case["weights"])
        return net.eval()

    def inputs(self, case: dict[str, Any]) -> dict[str, Tensor]:
        return {name: make_input(entry) for name, entry in case["inputs"].items()}


def constructor_config(constructor: dict[str, Any], arch_defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments of MicroDiT from the format's constructor: given in full, or {"arch", "latent_res", ...}.

    An arch takes the preset of its name, the set's defaults for it (as far as they are arguments), then what is given.
    """
    given = dict(constructor)
    arch = given.pop("arch", None)
    if arch is None:
        return given
    preset = PRESETS[arch.removeprefix("MicroDiT_").lower()]
    known = inspect.signature(MicroDiT).parameters
    defaults = _renamed(arch_defaults.get(arch, arch_defaults), preset["depth"])
    return preset | {k: v for k, v in defaults.items() if k in known} | _renamed(given, preset["depth"])


def _renamed(arguments: dict[str, Any], depth: int) -> dict[str, Any]:
    """latent_res is input_size; qkv_ratio and mlp_ratio are the first and last multiplier of a linear row."""
    arguments = dict(arguments)
    if "latent_res" in arguments:
        arguments["input_size"] = arguments.pop("latent_res")
    for ratio, multipliers in (("qkv_ratio", "qkv_multipliers"), ("mlp_ratio", "ffn_multipliers")):
        if ratio in arguments:
            arguments[multipliers] = np.linspace(*arguments.pop(ratio), num=depth).tolist()
    return arguments


def fill(state: dict[str, Tensor], rule: str, salt: str = "", fill_mask_token: bool = False) -> None:
    """Fill the weights in place by the format's rule A or B."""
    assert rule in ("A", "B"), f"unknown fill rule {rule!r}"
    with torch.no_grad():
        for key, tensor in state.items():
            if key == "pos_embed" or (key == "mask_token" and not fill_mask_token):
                continue
            shape = tuple(tensor.shape)
            z = normal(salt + key, shape)
            if key == "mask_token":
                value = z
            elif len(shape) == 1 and key.endswith(".weight"):
                value = 1 + np.float32(0.1) * z
            elif rule == "A":
                value = np.float32(0.02) * z
            elif len(shape) == 1:
                value = np.float32(0.2) * z
            else:
                fan = shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[1]
                value = np.float32(1 / np.sqrt(fan)) * z
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def make_input(entry: dict[str, Any]) -> Tensor:
    kind = entry.get("gen", "values")
    if kind == "values":
        values = np.asarray(entry["values"])
        return torch.from_numpy(values.astype(np.int64 if values.dtype.kind == "i" else np.float32)).reshape(
            entry["shape"]
        )
    if kind == "normal":
        return torch.from_numpy(normal(entry["seed"], entry["shape"]))
    assert kind == "permutation", f"unknown input generator {kind!r}"
    rng = generator(entry["seed"])
    batch, tokens = entry["shape"]
    return torch.from_numpy(np.stack([rng.permutation(tokens) for _ in range(batch)]).astype(np.int64))


def run(parity: ParitySet, case: dict[str, Any], net: nn.Module) -> dict[str, Tensor]:
    """Every output of a case, by the name the case gives it, made where the network is and given on the CPU."""
    operations = {"forward": _forward, "trace": _trace, "denoise": _denoise, "loss": _loss, "sampler": _sampler}
    assert case["op"] in operations, f"case {case['name']!r}: unknown operation {case['op']!r}"
    device = next(net.parameters()).device
    inputs = {name: value.to(device) for name, value in parity.inputs(case).items()}
    return {name: value.cpu() for name, value in operations[case["op"]](parity, case, net, inputs).items()}


def _masking(case: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    if not case["params"].get("mask_ratio"):
        return {}
    permutations = [value for name, value in inputs.items() if value.dtype == torch.int64]
    assert len(permutations) == 1, f"case {case['name']!r}: a masked case needs one permutation"
    return {"mask_ratio": case["params"]["mask_ratio"], "permutation": permutations[0]}


@torch.no_grad()
def _forward(parity: ParitySet, case: dict, net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x, t, y, cfg = inputs["x"], inputs["t"], inputs["y"], case["params"].get("cfg", 1.0)
    masking = _masking(case, inputs)
    if cfg == 1:
        return net(x, t, y, **masking)
    t = t if len(t) == 1 else t.repeat(2)
    out = net(torch.cat([x, x]), t, torch.cat([y, torch.zeros_like(y)]), **masking)
    conditional, unconditional = out["sample"].chunk(2)
    return out | {"sample": unconditional + cfg * (conditional - unconditional)}


def _trace(parity: ParitySet, case: dict, net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = []
    modules = dict(net.named_modules())
    for name, entry in case["outputs"].items():
        module = modules.get(TRACE_NAMES.get(name, name))
        if module is None:  # the caller tells of an output that nothing gives
            continue

        def keep(_module: nn.Module, _args: Any, out: Tensor, name: str = name, shape: list = entry["shape"]) -> None:
            # The format keeps a caption axis of length 1 in some places.
            seen[name] = out.reshape(shape) if [n for n in out.shape if n != 1] == [n for n in shape if n != 1] else out

        hooks.append(module.register_forward_hook(keep))
    try:
        _forward(parity, case, net, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def _denoise(parity: ParitySet, case: dict, net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    edm, params = parity.edm(case), case["params"]
    states = [inputs["x0"] + np.float32(s).item() * inputs["noise"] for s in params["sigmas"]]
    cfg = params.get("cfg", 1.0)
    denoised = [
        edm.denoise(net, x, s, inputs["y"], guidance_scale=cfg) for x, s in zip(states, params["sigmas"], strict=True)
    ]
    return {"denoised": torch.stack(denoised)}


def _loss(parity: ParitySet, case: dict, net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    params, edm = case["params"], parity.edm(case)
    sigma = edm.sigma_from_normal(inputs["rnd_normal"], params["p_mean"], params["p_std"]).reshape(-1)
    arguments = {"sigma": sigma, "noise": inputs["noise"]} | _masking(case, inputs)
    # XL goes sample by sample: weights and gradients take 9.3 GB, the activations of one sample at 512 px about 3
    batch = len(sigma)
    size = 1 if sum(p.numel() for p in net.parameters()) > 5e8 else batch
    with_gradients = any(name.startswith("grad") for name in case["outputs"])
    loss = torch.zeros((), device=sigma.device)
    net.train()
    try:
        for start in range(0, batch, size):
            part = slice(start, start + size)
            rows = {k: v[part] if isinstance(v, Tensor) else v for k, v in arguments.items()}
            with torch.set_grad_enabled(with_gradients):
                share = edm.loss(net, inputs["x0"][part], inputs["y"][part], **rows) * (size / batch)
            if with_gradients:
                share.backward()
            loss += share.detach()
        out = {"loss": loss}
        if with_gradients:
            parameters = dict(net.named_parameters())
            norms = [
                -1.0 if parameters[n].grad is None else parameters[n].grad.double().norm() for n in sorted(parameters)
            ]
            out["grad_l2"] = torch.tensor(norms)
            for name in case["outputs"]:
                if name.startswith("grad::"):
                    out[name] = parameters[name.removeprefix("grad::")].grad.clone()
    finally:
        net.zero_grad(set_to_none=True)
        net.eval()
    return out


def _sampler(parity: ParitySet, case: dict, net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    params = case["params"]
    steps = [params[name] for name in STEP_NAMES if name in params]
    assert steps, f"case {case['name']!r}: no number of steps in {params}"
    (latents,) = [value for name, value in inputs.items() if name != "y"]
    assert len(case["outputs"]) == 1, f"case {case['name']!r}: a sampler has one output"
    out = parity.edm(case).sample(
        net, latents, inputs["y"], num_inference_steps=steps[0], guidance_scale=params.get("cfg", 1.0)
    )
    return dict.fromkeys(case["outputs"], out)


def assert_close(name: str, got: Tensor, expected: np.ndarray, tolerance: dict[str, float]) -> None:
    assert tolerance.keys() <= {"atol", "rtol"} and tolerance, f"{name}: unknown tolerance {tolerance}"
    value = got.detach().double().numpy()
    assert value.shape == expected.shape, f"{name}: shape {value.shape}, expected {expected.shape}"
    error = np.abs(value - expected.astype(np.float64))
    allowed = tolerance.get("atol", 0.0) + tolerance.get("rtol", 0.0) * np.abs(expected.astype(np.float64))
    over = ~(error <= allowed)  # NaN counts as over
    assert not over.any(), (
        f"{name}: {over.sum()} of {over.size} values out of tolerance {tolerance}, largest error {error.max():.3g}"
    )


POSITIONS = re.compile(r"latent(\d+)_scale([\d.]+)_dim(\d+)(?:_rows0::(\d+)_cols0::(\d+))?$")


def position_array(name: str) -> Tensor:
    """The position table that an entry of pos_embed_arrays names, from a model's buffer."""
    match = POSITIONS.search(name)
    assert match, f"unknown position array {name!r}"
    latent, dim = int(match[1]), int(match[3])
    net = MicroDiT(
        input_size=latent, dim=dim, head_dim=4, depth=1, pos_interp_scale=float(match[2]), use_patch_mixer=False,
        multiple_of=4, caption_channels=4, experts_every_n=0,
    )  # fmt: skip
    return net.pos_embed[0, :: int(match[4] or 1), :: int(match[5] or 1)]
