"""Read prompts and detections from files, named lists or corpora: plain text, tables with a header, JSON lines."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.geneval import Detection, GenEvalPrompt, Strict, failure, parse_prompts, summary
from microdit.pipeline.evaluation.named_files import PROMPTS, named_file

NAMES = ("prompt", "prompts", "caption", "text")  # of the column with the prompts, whatever its case
IDS = ("id", "item_id", "image_id")  # of the column that tells prompts apart, the first that is there
QUESTION = "proposition_id"  # a column of DPG-Bench: each line is a question, and a prompt has several
LONGEST_LINE = 1_000_000  # characters


class DetectedPicture(Strict):
    """A line of a file of detections: one picture."""

    prompt: str
    detections: tuple[Detection, ...] = Field(strict=False)


def find_prompts(name: str) -> Path:
    """Return the path of a list of prompts: a file, or a named list, which is fetched once.

    Raises:
        RequestError: there is neither.
    """
    if name in PROMPTS and not Path(name).exists():
        return named_file(name, PROMPTS[name])
    if not Path(name).is_file():
        raise RequestError(f"--prompts {name}: there is no such file; expected one, or one of {', '.join(PROMPTS)}")
    return Path(name)


def read_prompts(path: Path) -> list[str]:
    """Read prompts: one a line, or the column `prompt`, `caption` or `text` of a .tsv, .csv or .jsonl file.

    Raises:
        RequestError: the file cannot be read, has no such column or no prompts, or an id is there twice.
    """
    if path.suffix.lower() == ".jsonl":
        prompts = _distinct(path, read_json_lines(path))
    elif path.suffix.lower() in (".tsv", ".csv"):
        lines = io.StringIO(_text(path), newline="")
        rows = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            prompts = _distinct(path, enumerate(rows, 2))
        except csv.Error as error:
            raise RequestError(f"--prompts {path}: it is no table ({error})") from None
    else:
        prompts = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not prompts:
        raise RequestError(f"--prompts {path}: there is no prompt in it")
    return prompts


def _distinct(path: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[str]:
    """Take the prompt of each row; of DPG-Bench, whose rows are questions, of each id once."""
    prompts: list[str] = []
    known: dict[Any, str] = {}
    for number, row in rows:
        prompt = _named(row, path, number)
        columns = {str(name).lower(): name for name in row}
        name = next((columns[each] for each in IDS if each in columns), None)
        if name is not None:
            same = known.setdefault(str(row[name]), prompt)
            if len(known) == len(prompts):  # it was known
                if QUESTION in columns and same == prompt:
                    continue
                raise RequestError(
                    f"--prompts {path}, line {number}: {name} {str(row[name])[:80]!r} is there twice; give each prompt "
                    "an id of its own, or none"
                )
        prompts.append(prompt)
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
    known: dict[str, GenEvalPrompt] = {prompt.prompt: prompt for prompt in wanted}
    for number, line in read_json_lines(detections):
        try:
            picture = DetectedPicture.model_validate(line)
        except ValueError as error:
            raise RequestError(f"{detections}, line {number}: {' '.join(str(error).split())[:300]}") from None
        if picture.prompt not in known:
            raise RequestError(f"{detections}, line {number}: {picture.prompt!r} is no prompt of {prompts}")
        by_text[picture.prompt].append(failure(known[picture.prompt], picture.detections) is None)
    return summary(wanted, [by_text[prompt.prompt] for prompt in wanted])
