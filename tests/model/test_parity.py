"""Numbers of the network, EDM and the sampler against reference outputs: every case of every set.

`pytest tests -k parity --parity-dir DIR` runs another set of the same format.
"""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from microdit.model.network import MicroDiT
from tests.model import reference
from tests.model.parity_format import (
    ParitySet,
    assert_close,
    constructor_config,
    make_input,
    normal,
    position_array,
    run,
)

DATA = Path(__file__).parents[1] / "data"
pytestmark = pytest.mark.timeout(7200)  # XL on a CPU takes minutes


def _sets(config: pytest.Config) -> list[ParitySet]:
    given = config.getoption("--parity-dir")
    folders = [Path(given)] if given else sorted(DATA.glob("parity*"))
    for folder in folders:
        if not (folder / "golden_spec.json").is_file():
            raise pytest.UsageError(f"--parity-dir {folder}: there is no golden_spec.json in it")
    return [ParitySet(folder) for folder in folders]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "parity" not in metafunc.fixturenames:
        return
    sets = _sets(metafunc.config)
    if "case" in metafunc.fixturenames:
        # cases of one model with one filling stand together, so that XL is filled once
        pairs = [(s, c) for s in sets for c in sorted(s.spec["cases"], key=lambda c: (c["model"], str(c["weights"])))]
        metafunc.parametrize("parity,case", pairs, ids=[f"{s.folder.name}-{c['name']}" for s, c in pairs])
    else:
        metafunc.parametrize("parity", sets, ids=[s.folder.name for s in sets])


_built: dict[tuple, MicroDiT] = {}


def _net(parity: ParitySet, case: dict) -> MicroDiT:
    """The case's model; one is kept, since XL's weights take 4.7 GB."""
    key = (parity.folder, case["model"], str(case["weights"]))
    if key not in _built:
        _built.clear()
        gc.collect()
        _built[key] = parity.build(case)
    return _built[key]


def test_case(parity: ParitySet, case: dict) -> None:
    assert case["outputs"], f"case {case['name']!r} has no outputs"
    got = run(parity, case, _net(parity, case))
    for name, entry in case["outputs"].items():
        assert name in got, f"case {case['name']!r}: unknown output {name!r}, known are {', '.join(got)}"
        expected = parity.array(entry["array"], entry)
        assert_close(f"{case['name']} {name}", got[name], expected, entry.get("tolerance", {}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_case_on_a_gpu(parity: ParitySet, case: dict) -> None:
    """In fp32 within ten times the tolerances of the CPU (other sums in another order); says how far bf16 is."""
    net = _net(parity, case)
    net.to("cuda")
    try:
        exact = run(parity, case, net)
        with torch.autocast("cuda", torch.bfloat16):
            half = run(parity, case, net)
    finally:
        net.to("cpu")
    for name, entry in case["outputs"].items():
        expected = parity.array(entry["array"], entry)
        tolerance = {kind: 10 * value for kind, value in entry["tolerance"].items()}
        assert_close(f"{case['name']} {name}", exact[name], expected, tolerance)
        distance = (half[name].double() - torch.from_numpy(expected).double()).norm() / np.linalg.norm(expected)
        print(f"{case['name']} {name}: bf16 differs by {distance:.2e} of the norm")


def _without_array(parity: ParitySet, case: dict, output: str) -> None:
    path = parity.folder / case["outputs"][output]["file"]
    with np.load(path) as stored:
        np.savez(path, **{name: a for name, a in stored.items() if name != case["outputs"][output]["array"]})


def _one_value_off(parity: ParitySet, case: dict, output: str) -> None:
    entry = case["outputs"][output]
    path = parity.folder / entry["file"]
    with np.load(path) as stored:
        arrays = dict(stored)
    tolerance = entry["tolerance"]
    value = arrays[entry["array"]].flat[-1]
    off = tolerance.get("atol", 0.0) + tolerance.get("rtol", 0.0) * abs(value)
    arrays[entry["array"]].flat[-1] = value + 2 * off + 1e-5
    np.savez(path, **arrays)


def _another_shape(parity: ParitySet, case: dict, output: str) -> None:
    case["outputs"][output]["shape"] = [*case["outputs"][output]["shape"], 1]


def _unknown_operation(parity: ParitySet, case: dict, output: str) -> None:
    case["op"] = "dream"


def _unknown_model(parity: ParitySet, case: dict, output: str) -> None:
    case["model"] = "huge"


def _unknown_output(parity: ParitySet, case: dict, output: str) -> None:
    case["outputs"]["velocity"] = case["outputs"][output]


def _no_output(parity: ParitySet, case: dict, output: str) -> None:
    case["outputs"] = {}


OFF = (_one_value_off, r"1 of \d+ values out of tolerance")


@pytest.mark.parametrize(
    ("folder", "name", "output", "change", "message"),
    [
        ("parity", "small/forward_cfg5", "sample", *OFF),
        ("parity", "small/denoise", "denoised", *OFF),
        ("parity", "small/trace", "blocks.1", *OFF),
        ("parity", "small/loss", "grad_l2", *OFF),
        ("parity_plain", "plain/forward_masked", "mask", *OFF),
        ("parity_plain", "plain/loss_masked", "loss", *OFF),
        ("parity_plain", "bias/sampler_cfg", "sample", *OFF),
        ("parity_plain", "plain/forward", "sample", _without_array, r"array '.*' is missing from .*golden"),
        ("parity_plain", "plain/forward", "sample", _another_shape, r"stored \(.*\), spec says \["),
        ("parity_plain", "plain/forward", "sample", _unknown_operation, "unknown operation 'dream'"),
        ("parity_plain", "plain/forward", "sample", _unknown_model, "unknown model 'huge'"),
        ("parity_plain", "plain/forward", "sample", _unknown_output, "unknown output 'velocity'"),
        ("parity", "small/trace", "blocks.1", _unknown_output, "unknown output 'velocity'"),
        ("parity_plain", "plain/forward", "sample", _no_output, "has no outputs"),
    ],
)
def test_what_does_not_agree_fails(
    folder: str, name: str, output: str, change: Callable[[ParitySet, dict, str], None], message: str, tmp_path: Path
) -> None:
    """Each operation of the format, met as it is stored, and failing as soon as something of it is not met."""
    parity = ParitySet(shutil.copytree(DATA / folder, tmp_path / "set"))
    case = next(c for c in parity.spec["cases"] if c["name"] == name)
    test_case(parity, case)
    change(parity, case, output)
    with pytest.raises(AssertionError, match=message):
        test_case(ParitySet(parity.folder), case)


def test_set_is_made_by_rule(parity: ParitySet) -> None:
    """The inputs and weights that this reader generates are the ones that the set was made with."""
    assert parity.spec["cases"]
    for seed, check in parity.spec.get("input_checks", {}).items():
        uses = [e for c in parity.spec["cases"] for e in c["inputs"].values() if e.get("seed") == seed]
        value = make_input(uses[0]) if uses else torch.from_numpy(normal(seed, check["shape"]))
        assert list(value.shape) == check["shape"]
        first = value.flatten()[: len(check["first"])].double().numpy()
        np.testing.assert_array_equal(first, check["first"])
        np.testing.assert_allclose(value.double().sum().item(), check["sum_float64"], rtol=1e-9, atol=1e-9)
    for name, checks in parity.spec.get("weight_checks", {}).items():
        model, rule, salt = name.split("|")
        weights = {"rule": rule.removeprefix("rule"), "salt": salt.removeprefix("salt="), "fill_mask_token": False}
        state = _net(parity, {"model": model, "weights": weights}).state_dict()
        for key, check in checks.items():
            assert list(state[key].shape) == check["shape"]
            first = state[key].flatten()[: len(check["first"])].double().numpy()
            np.testing.assert_array_equal(first, check["first"])
            np.testing.assert_allclose(state[key].double().sum().item(), check["sum_float64"], rtol=1e-9, atol=1e-9)


def test_positions(parity: ParitySet) -> None:
    for name, entry in parity.spec.get("pos_embed_arrays", {}).items():
        got = position_array(name)
        assert_close(name, got, parity.array(name, entry), entry.get("tolerance", {"atol": 1e-6}))


def test_manifest(parity: ParitySet) -> None:
    """State-dict keys in order, shapes, kinds and parameter counts of every configuration, on the meta device."""
    defaults = parity.spec.get("arch_defaults", {})
    manifest = parity.manifest()
    for name, model in parity.spec["models"].items():
        if manifest and "manifest" in model:
            assert manifest[model["manifest"]]["constructor"] == model["constructor"], name
    for name, entry in manifest.items():
        with torch.device("meta"):
            net = MicroDiT(**constructor_config(entry["constructor"], defaults))
        shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
        assert shapes == {key: e["shape"] for key, e in entry["state_dict"].items()}, name
        assert list(shapes) == list(entry["state_dict"]), name
        buffers = {key for key, _ in net.named_buffers()}
        assert buffers == {key for key, e in entry["state_dict"].items() if e["kind"] == "buffer"}, name
        assert sum(p.numel() for p in net.parameters()) == entry["total_params"], name


def test_plain_reference_equals_released_outputs() -> None:
    """The plain reference, which parity_plain was made with, is itself right: one anchor for all that it adds."""
    parity = ParitySet(DATA / "parity")
    checked = 0
    for case in parity.spec["cases"]:
        if case["op"] in ("forward", "loss"):
            got = reference.outputs(case, reference.plain_net(parity, case), parity.inputs(case))
            for name in got:
                if name in case["outputs"]:
                    entry = case["outputs"][name]
                    assert_close(
                        f"{case['name']} {name}", got[name], parity.array(entry["array"], entry), entry["tolerance"]
                    )
                    checked += 1
    assert checked >= 6


def test_plain_set_is_what_the_reference_makes(tmp_path: Path) -> None:
    reference.write(tmp_path)
    fresh, stored = ParitySet(tmp_path), ParitySet(DATA / "parity_plain")
    assert [c["name"] for c in fresh.spec["cases"]] == [c["name"] for c in stored.spec["cases"]]
    for a, b in zip(fresh.spec["cases"], stored.spec["cases"], strict=True):
        assert {k: v for k, v in a.items() if k != "outputs"} == {k: v for k, v in b.items() if k != "outputs"}
        for name, entry in b["outputs"].items():
            new = torch.from_numpy(fresh.array(entry["array"], a["outputs"][name]))
            assert_close(f"{b['name']} {name}", new, stored.array(entry["array"], entry), {"atol": 1e-6, "rtol": 1e-6})
