"""Compare `microdit plan` with a real build ten times as large as the one that it learned from.

    python benchmarks/plan.py [--inputs 1974] [--times 10] [--folder DIR] [--json]

The demo's source: its list of URLs, of which 3% are bad, served on this machine. The small build fetches the list (or
evenly spread lines of it), the large one the list as many times over, with all of the demo's columns. Both are
`microdit build` in a process of its own, and what is predicted is the time of that whole command. Goals: each column's
bytes within 3%, the time within 25%. `rates` are the large build's, as `pipeline/rates.json` could have them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.config.sources import OpenmojiSource
from microdit.pipeline.config.yaml import find_file
from microdit.pipeline.estimate.past_build import spread
from microdit.pipeline.sources.openmoji.server import DemoSource, serve
from microdit.pipeline.sources.openmoji.source import Openmoji

GOALS = {"bytes": 0.03, "time": 0.25}
UNIT_INPUTS = 512


def write_lists(source: DemoSource, base: str, folder: Path, inputs: int, times: int) -> tuple[Path, Path, Path]:
    """Write the small list, the large one, and the table of captions, all with whole URLs."""
    lines = [base + line for line in spread(source.list.read_text().splitlines(keepends=True), inputs)]
    small, large, captions = folder / "small.tsv", folder / "large.tsv", folder / "captions.jsonl"
    small.write_text("".join(lines))
    large.write_text("".join(lines * times))
    with source.captions.open() as given, captions.open("w") as out:
        for line in given:
            entry = json.loads(line)
            out.write(json.dumps(entry | {"url": base + entry["url"]}, ensure_ascii=False) + "\n")
    return small, large, captions


def write_config(folder: Path, name: str, urls: Path, captions: Path) -> Path:
    """Write the demo's config with another source and another table of captions."""
    config = yaml.safe_load(find_file("configs/demo.yaml").read_text())
    fetch = OpenmojiSource(adapter="openmoji").fetch.model_dump() | {"allow_networks": ["127.0.0.0/8"]}
    config |= {"name": name, "corpus": str(folder / name)}
    config["sources"] = {"openmoji": {"adapter": "urls", "list": str(urls), "unit_inputs": UNIT_INPUTS, "fetch": fetch}}
    config["columns"]["captions/long"] = {"join": str(captions), "by": "origin"}
    for column in ("captions/plain", "text/minilm@plain"):  # from a table that only the demo's source has
        del config["columns"][column]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def microdit(*words: str) -> tuple[dict[str, Any], float]:
    """Run a command: its answer, and how long it took in all."""
    command = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", *words, "--json"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(f"microdit {' '.join(words)} ended with {done.returncode}: {done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer, seconds


def built(config: Path, corpus: Path) -> tuple[float, dict[str, int]]:
    """Measure the seconds of a build, and the bytes of its columns."""
    _, seconds = microdit("build", str(config))
    found, _ = microdit("status", str(corpus))
    return seconds, {
        column: sum(one["bytes"] for one in by_source.values()) for column, by_source in found["columns"].items()
    }


def measure(folder: Path, inputs: int, times: int) -> dict[str, Any]:
    source = Openmoji("openmoji", OpenmojiSource(adapter="openmoji")).prepared
    with serve(source.folder) as base:
        small_list, large_list, captions = write_lists(source, base, folder, inputs, times)
        small = write_config(folder, "small", small_list, captions)
        large = write_config(folder, "large", large_list, captions)
        said("building the small one")
        small_seconds, _ = built(small, folder / "small")
        plan, _ = microdit("plan", str(large), "--from", str(folder / "small"))
        said(f"building the large one; {plan['totals']['seconds']:.0f} s are predicted")
        seconds, sizes = built(large, folder / "large")
    after, _ = microdit("plan", str(large))  # learned from itself
    columns = {
        name: {
            "bytes": size,
            "predicted": plan["columns"][name]["bytes"],
            "error": error(plan["columns"][name]["bytes"], size),
        }
        for name, size in sizes.items()
    }
    predicted = plan["totals"]["seconds"]
    return {
        "inputs": plan["totals"]["inputs"],
        "learned_from_inputs": plan["totals"]["inputs"] // times,
        "cores": len(os.sched_getaffinity(0)),
        "columns": columns,
        "worst_bytes_error": max((one["error"] for one in columns.values()), key=abs),
        "small_seconds": round(small_seconds, 1),
        "seconds": round(seconds, 1),
        "predicted_seconds": round(predicted, 1),
        "time_error": error(predicted, seconds),
        "narrowest": plan["totals"]["narrowest"],
        "bounds": rounded(plan["totals"]["bounds"]),
        "bounds_afterwards": rounded(after["totals"]["bounds"]),
        "rates": {name: round(one["inputs"] / one["cpu_seconds"], 1) for name, one in after["stages"].items()},
        "goals": GOALS,
    }


def error(predicted: float, real: float) -> float:
    return round(predicted / real - 1, 4)


def rounded(bounds: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds, 1) for name, seconds in bounds.items()}


def said(what: str) -> None:
    print(what, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--inputs", type=int, default=1974, help="lines of the list that the small build fetches")
    parser.add_argument("--times", type=int, default=10, help="how often the large one has them")
    parser.add_argument("--folder", help="where both corpora go (default: the system's temporary folder)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.inputs, options.times)
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
