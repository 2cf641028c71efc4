"""Read prompts and detections from files: plain text, tables with a header, JSON lines."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.geneval import Detection, Prompt, Strict, failure, parse_prompts, summary

NAMES = ("prompt", "caption", "text")  # of the column with the prompts, whatever its case
LONGEST_LINE = 1_000_000  # characters


class DetectedPicture(Strict):
    """A line of a file of detections: one picture."""

    prompt: str
    detections: tuple[Detection, ...] = Field(strict=False)


def read_prompts(path: Path) -> list[str]:
    """Read prompts: one a line, or the column `prompt`, `caption` or `text` of a .tsv, .csv or .jsonl file.

    Raises:
        RequestError: the file cannot be read, has no such column, or no prompts.
    """
    if path.suffix.lower() == ".jsonl":
        prompts = [_named(line, path, number) for number, line in read_json_lines(path)]
    elif path.suffix.lower() in (".tsv", ".csv"):
        rows = csv.DictReader(_text(path).splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        prompts = [_named(row, path, number) for number, row in enumerate(rows, 2)]
    else:
        prompts = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not prompts:
        raise RequestError(f"--prompts {path}: there is no prompt in it")
    return prompts


def _named(line: dict[str, Any], path: Path, number: int) -> str:
    columns = {str(name).lower(): name for name in line}
    name = next((columns[each] for each in NAMES if each in columns), None)
    if name is None or not isinstance(line[name], str) or not line[name].strip():
        raise RequestError(
            f"--prompts {path}, line {number}: it has {', '.join(map(str, line)) or 'nothing'}; expected a column "
            f"{' or '.join(NAMES)} with a text in it"
        )
    return str(line[name]).strip()


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSON lines file, with the numbers of their lines.

    Raises:
        RequestError: a line is none.
    """
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line[:LONGEST_LINE])
        except ValueError as error:
            raise RequestError(f"{path}, line {number}: it is no JSON ({error})") from None
        if not isinstance(value, dict):
            raise RequestError(f"{path}, line {number}: it is no JSON object")
        yield number, value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: it cannot be read as text in UTF-8 ({error})") from None


def judge_detections(detections: Path, prompts: Path) -> dict[str, Any]:
    """Score a file of detections by GenEval's rules, against the file of its prompts.

    Raises:
        RequestError: a file is damaged, a prompt has no picture, or a picture's prompt is not among them.
    """
    wanted = parse_prompts(line for _, line in read_json_lines(prompts))
    by_text: dict[str, list[bool]] = {prompt.prompt: [] for prompt in wanted}
    known: dict[str, Prompt] = {prompt.prompt: prompt for prompt in wanted}
    for number, line in read_json_lines(detections):
        try:
            picture = DetectedPicture.model_validate(line)
        except ValueError as error:
            raise RequestError(f"{detections}, line {number}: {' '.join(str(error).split())[:300]}") from None
        if picture.prompt not in known:
            raise RequestError(f"{detections}, line {number}: {picture.prompt!r} is no prompt of {prompts}")
        by_text[picture.prompt].append(failure(known[picture.prompt], picture.detections) is None)
    return summary(wanted, [by_text[prompt.prompt] for prompt in wanted])
