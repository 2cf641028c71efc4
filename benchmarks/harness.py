"""Command line of the benchmarks: `--json`, and figures printed as one JSON object or as lines for a reader."""

import argparse
import json
from collections.abc import Mapping
from typing import Any


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser that shows the module's docstring as it is written, and knows `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def print_figures(figures: Mapping[str, Any], as_json: bool) -> None:
    """Print what was measured: one JSON object, or a line for each figure, nested ones indented."""
    if as_json:
        print(json.dumps(figures), flush=True)
    else:
        print("\n".join(_lines(figures)), flush=True)


def _lines(figures: Mapping[str, Any], indent: str = "") -> list[str]:
    width = max(map(len, figures), default=0)
    lines: list[str] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, f"{indent}  ")]
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            for row in value:
                lines += [f"{indent}{name}", *_lines(row, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name:{width}} {value}")
    return lines
