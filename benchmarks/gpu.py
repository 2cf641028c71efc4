"""Every figure that is owed on a GPU, by one command: parts in the order of their worth, each written down as it ends.

    python -m benchmarks.gpu [--only PART ...] [--out DIR] [--budget 540] [--device cuda|cpu] [--tiny] [--json]

    tests                 the tests that are marked `gpu`
    train_step_256        XL/2 at 256 px, mask 0.75: ours beside the reference's way, MFU, slowest kernels
    train_step_512        the same at 512 px
    train_step_unmasked   the same at 256 px with no patch masked
    encode                SDXL's autoencoder, T5-XXL and DFN-CLIP-H of the real shapes: ceiling, stage, common loop
    generate              XL/2 at 512 px, 30 steps with guidance, beside the plain loop
    caption               Qwen3-VL of 4 billion weights: the stage beside bare `generate`
    feed                  the trainer's loader in front of the trainer's step: the share of the time that it waits

Each part is a process of its own, with a bound on its time. DIR/gpu.json (default: runs/gpu) is written after each;
the same command again measures what is missing there, and `--only` measures again what it names. `--budget`: seconds
for all parts together; a part for which too few are left is not begun.

Run from a folder of the sources with torch, transformers, safetensors, pillow, numpy, pydantic, pyyaml and typer.
`train_step_*` and `generate` need no more. What the other parts need beyond it can be carried as wheels: `--wheels
DIR` installs those of a folder into a temporary one, for example from

    pip download --only-binary=:all: --no-deps -d DIR pyarrow obstore simplejpeg diffusers ftfy wcwidth regex \\
        sentencepiece py3langid importlib_metadata zipp requests urllib3 certifi charset-normalizer \\
        boto3 botocore s3transfer jmespath python-dateutil six pytest iniconfig pluggy hypothesis sortedcontainers

A part that lacks a module says which. `--device cpu --tiny` rehearses every part in minutes without a GPU.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import argument_parser, print_figures

ROOT = Path(__file__).parent.parent
WORDS = 400  # characters of a failed part's last words that are kept


@dataclass(frozen=True)
class Part:
    """A part: its command by size, and how long it is expected to take on a large GPU.

    module: to be run with `python -m`. real, tiny: its options on a GPU, and in a rehearsal. seconds: expected, and
    half of what it may take.
    """

    module: str
    seconds: float
    real: Sequence[str] = ()
    tiny: Sequence[str] = ()
    takes_device: bool = True
    read: Callable[[str, Path], dict[str, Any]] = field(default=lambda output, _: json.loads(output.splitlines()[-1]))

    def command(self, device: str, tiny: bool, folder: Path) -> list[str]:
        """Compose the command line. folder: for files that the part writes."""
        if self.module == "pytest":
            report = ["--junitxml", str(folder / "tests.xml")]
            return [sys.executable, "-m", "pytest", *self.real, *report, *gpu_tests()]
        device_options = ["--device", device] if self.takes_device else []
        options = [*device_options, "--json", *(self.tiny if tiny else self.real)]
        return [sys.executable, "-m", self.module, *options]


def gpu_tests() -> list[str]:
    """List the test files that have a test marked `gpu`: others may need packages that are not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def read_junit(_: str, folder: Path) -> dict[str, Any]:
    """Count what pytest wrote into `folder`/tests.xml, and name what failed."""
    suite = ElementTree.parse(folder / "tests.xml").getroot()[0]
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    names = [f"{case.get('classname')}::{case.get('name')}".strip(":") for case in bad]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"passed": passed, "skipped": counts["skipped"], "failed": names, "met": passed > 0 and not names}


STEP = "benchmarks.train_step"
TINY_STEP = ("--preset", "mini", "--pixels", "64", "--micro-batches", "4", "--repeat", "1", "--no-compile")
PARTS = {
    "tests": Part(
        "pytest", 75, ("-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "addopts="),
        takes_device=False, read=read_junit,
    ),
    "train_step_256": Part(STEP, 75, ("--pixels", "256", "--profile", "12"), (*TINY_STEP, "--profile", "3")),
    "train_step_512": Part(STEP, 80, ("--pixels", "512"), TINY_STEP),
    "train_step_unmasked": Part(
        STEP, 60, ("--pixels", "256", "--mask-ratio", "0", "--micro-batches", "32", "64"),
        (*TINY_STEP, "--mask-ratio", "0"),
    ),
    "encode": Part(
        "benchmarks.encode", 110, ("--shards", "2", "--rounds", "2"),
        ("--models", "demo", "t5-small", "--shards", "1", "--samples", "8", "--rounds", "1", "--batch", "4"),
    ),
    "generate": Part(
        "benchmarks.generate", 40, (), ("--preset", "mini", "--pixels", "64", "--images", "2", "--steps", "3")
    ),
    "caption": Part(
        "benchmarks.caption", 60, ("--shape", "4b"), ("--images", "4", "--batch", "2", "--rounds", "1", "--side", "64"),
        takes_device=False,
    ),
    "feed": Part(
        "benchmarks.train_feed", 40, (),
        ("--preset", "mini", "--pixels", "64", "--samples", "64", "--batch", "8", "--steps", "2"),
    ),
}  # fmt: skip


# -- running -----------------------------------------------------------------------------------------------------------
def measure_part(name: str, device: str, tiny: bool, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run one part for at most `limit` seconds: its status, and its figures or why there are none."""
    part, began = PARTS[name], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = part.command(device, tiny, Path(folder))
        told: dict[str, Any] = {"command": " ".join(["python", *command[1:]]).replace(f"{folder}/", "")}
        try:
            done = run_bounded(command, limit, environment)
        except subprocess.TimeoutExpired:
            return told | {
                "status": "failed",
                "reason": f"not done within {limit:.0f} seconds",
                "seconds": round(limit, 1),
            }
        told["seconds"] = round(time.monotonic() - began, 1)
        lacking = [line for line in done.stderr.splitlines() + done.stdout.splitlines() if "No module named" in line]
        try:
            return told | {"status": "measured", "figures": part.read(done.stdout, Path(folder))}
        except (ValueError, IndexError, OSError, ElementTree.ParseError):
            pass
        if lacking:
            module = lacking[-1].rpartition("No module named ")[2].strip(" '\"")
            return told | {"status": "not measured", "reason": f"no module {module} here: carry its wheel (--wheels)"}
        words = (done.stderr.strip() or done.stdout.strip())[-WORDS:]
        return told | {"status": "failed", "reason": f"ended with {done.returncode}: {words}"}


def run_bounded(command: list[str], limit: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command, and end it with all that it started once `limit` seconds are over.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            out, err = process.communicate(timeout=limit)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def install(wheels: Path, folder: Path) -> None:
    """Install the wheels of a folder, and nothing else, into another."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"--wheels {wheels}: no .whl file is in it")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)


# -- results -----------------------------------------------------------------------------------------------------------
def machine(device: str) -> dict[str, Any]:
    """Describe what is measured on."""
    told: dict[str, Any] = {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        told |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return told | {"torch": torch.__version__}


def read_results(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Read the results that are there, measured on the same machine at the same size; new ones if there are none."""
    if not path.exists():
        return asked | {"parts": {}}
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in asked.items():
        if results.get(key) != value:
            raise SystemExit(f"{path} has results for {key} {results.get(key)}, not {value}: give another --out")
    return results


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def measure(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Measure the parts that are asked for and not measured yet, within the budget."""
    path, deadline = options.out / "gpu.json", time.monotonic() + options.budget
    results = read_results(path, {"machine": machine(options.device), "tiny": options.tiny})
    known = results["parts"]
    for name in options.only or [name for name in PARTS if known.get(name, {}).get("status") != "measured"]:
        left = deadline - time.monotonic()
        if left < PARTS[name].seconds * (0.1 if options.tiny else 0.5):
            row: dict[str, Any] = {"status": "not measured", "reason": f"{left:.0f} seconds were left: run again"}
        else:
            print(f"{name}: at most {min(left, 2 * PARTS[name].seconds):.0f} seconds", file=sys.stderr, flush=True)
            limit = min(left, 2 * PARTS[name].seconds)
            row = measure_part(name, options.device, options.tiny, limit, environment)
        print(f"{name}: {row['status']} {row.get('reason', '')}", file=sys.stderr, flush=True)
        known[name] = row
        results["parts"] = {part: known[part] for part in PARTS if part in known}
        write_results(path, results)
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART", help="parts to measure (again)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models: a rehearsal, whose figures say nothing")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install for this run")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: nothing was measured. --device cpu --tiny rehearses every part")
    environment = dict(os.environ)
    if options.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        if options.wheels:
            install(options.wheels, Path(folder))
        paths = [folder, str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        results = measure(options, environment)
    print_figures(results, options.json)
    return 0 if all(row["status"] == "measured" for row in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
