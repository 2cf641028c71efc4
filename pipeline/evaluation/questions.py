"""Judge pictures by questions that a vision-language model answers with yes or no, as DPG-Bench does (Hu et al., ELLA).

A question counts 1 if the answer is yes, and 0 if it is no, or if one that it depends on counts 0. A picture has the
mean of its questions, and the benchmark 100 times the mean of the pictures. Answers are kept in a file of JSON lines,
one a picture, so that a run that was stopped goes on. Published figures are mPLUG-large's: others compare with
themselves.
"""

import asyncio
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from PIL import Image

from microdit.model.pretrained.captioners import load_captioner
from microdit.model.pretrained.hub import ModelFilesError
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.picture_sets import PictureSet
from microdit.pipeline.stages.captions.chat import BadAnswer, ask, request

JUDGE = "judge"  # the name of its model in `--model`
FORM = "{question} Answer with yes or no."
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")
MOST_TOKENS, AT_ONCE = 8, 16
Judge = Callable[[np.ndarray, Sequence[str]], list[str]]
"""Answers questions about a picture, uint8 (H, W, 3)."""


@dataclass
class AskedPrompt:
    """A prompt, and by number its questions and the questions that each depends on."""

    text: str
    questions: dict[int, str] = field(default_factory=dict)
    depends_on: dict[int, list[int]] = field(default_factory=dict)

    def score(self, answers: Mapping[int, bool]) -> float:
        """Compute the share of the questions that count."""
        counted: dict[int, bool] = {}
        for number in self.questions:
            parents = [counted.get(each, answers[each]) for each in self.depends_on[number]]
            counted[number] = answers[number] and all(parents)
        return sum(counted.values()) / len(counted)


def read_questions(path: Path) -> dict[str, AskedPrompt]:
    """Read `dpg_bench.csv`: the prompts, by text, with their questions.

    Raises:
        RequestError: the file is no such table, or a question depends on one that is not there.
    """
    found: dict[str, AskedPrompt] = {}
    try:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        for row in rows:
            text, question = row["text"].strip(), row["question_natural_language"].strip()
            asked = found.setdefault(text, AskedPrompt(text))
            own = int(row["proposition_id"])
            asked.questions[own] = question
            asked.depends_on[own] = [int(each) for each in row["dependency"].split(",") if int(each)]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise RequestError(
            f"--prompts {path}: no table of questions ({type(error).__name__}: {error}); expected the columns "
            f"{', '.join(COLUMNS)}, as DPG-Bench has them (--prompts dpg-bench)"
        ) from None
    for asked in found.values():
        for own, parents in asked.depends_on.items():
            if missing := [each for each in parents if each not in asked.questions]:
                raise RequestError(
                    f"--prompts {path}: question {own} of {asked.text[:60]!r} depends on {missing[0]}, which is not "
                    "there"
                )
    if not found:
        raise RequestError(f"--prompts {path}: there is no question in it")
    return found


def load_judge(model: str, device: str | torch.device) -> Judge:
    """Load a judge: a captioner by name, folder or repository, or `http://host/v1#MODEL`, a server with OpenAI's API.

    Raises:
        RequestError: it cannot be had.
    """
    if model.startswith(("http://", "https://")):
        url, _, name = model.partition("#")
        if not name:
            raise RequestError(f"--model {JUDGE}={model}: which model? Give {url}#NAME, as the server calls it")
        return lambda pixels, questions: asyncio.run(_ask_all(url, name, pixels, questions))
    try:
        captioner = load_captioner(model, device=device)
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"--model {JUDGE}={model}: {error}") from error

    def answered(pixels: np.ndarray, questions: Sequence[str]) -> list[str]:
        picture = captioner.prepare(pixels)
        prompts = [FORM.format(question=question) for question in questions]
        return [captioner.generate([picture], prompt, MOST_TOKENS, 0.0, [0])[0].text for prompt in prompts]

    return answered


async def _ask_all(url: str, model: str, pixels: np.ndarray, questions: Sequence[str]) -> list[str]:
    """Ask a server all questions about a picture, some at a time.

    Raises:
        RequestError: it does not answer.
    """
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(session: aiohttp.ClientSession, question: str) -> str:
        body = request(model, FORM.format(question=question), out.getvalue(), MOST_TOKENS, 0.0, 0)
        async with gate:
            return (await ask(session, url, None, body)).text

    try:
        async with aiohttp.ClientSession() as session:
            return list(await asyncio.gather(*(one(session, question) for question in questions)))
    except BadAnswer as error:
        raise RequestError(f"judge {url}: {error.reason}: {error}; the same command goes on") from error


def is_yes(answer: str) -> bool:
    """Read the first word of an answer."""
    return answer.strip().casefold().lstrip("\"'*(").startswith("yes")


def judge_pictures(
    pictures: PictureSet, asked: Mapping[str, AskedPrompt], out: Path, model: str, device: str | torch.device
) -> dict[str, Any]:
    """Judge pictures, each by the questions of its caption; answers go to `answers.jsonl` of a folder.

    Returns `value` (0 to 100) with its standard error over the prompts, and how many pictures and questions there were.

    Raises:
        RequestError: a caption is no prompt, or the judge cannot be had.
    """
    for picture in pictures.captioned():
        if picture.caption not in asked:
            raise RequestError(f"picture {picture.name}: its caption {picture.caption[:80]!r} is none of the prompts")
    out.mkdir(parents=True, exist_ok=True)
    path, judge = out / "answers.jsonl", None
    known = _kept(path, model)
    scores: dict[str, list[float]] = {}
    count = 0
    with path.open("a") as file:
        for picture in pictures.stream():
            prompt = asked[picture.caption]
            answers = known.get(picture.sha256 + prompt.text)
            if answers is None or len(answers) != len(prompt.questions):
                judge = judge or load_judge(model, device)
                answers = judge(pictures.decoded(picture), list(prompt.questions.values()))
                line = {"picture": picture.name, "sha256": picture.sha256, "prompt": prompt.text}
                file.write(json.dumps({**line, "judge": model, "answers": answers}) + "\n")
                file.flush()
            yes = {number: is_yes(answer) for number, answer in zip(prompt.questions, answers, strict=True)}
            scores.setdefault(prompt.text, []).append(prompt.score(yes))
            count += len(yes)
    means = 100 * np.array([np.mean(each) for each in scores.values()])
    return {
        "value": float(100 * np.mean([score for each in scores.values() for score in each])),
        "error": float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None,
        "prompts": len(means),
        "questions": count,
        "judge": model,
        "form": FORM,
    }


def _kept(path: Path, model: str) -> dict[str, list[str]]:
    """Read the answers that a judge has given; a last line that was cut off is removed."""
    known: dict[str, list[str]] = {}
    whole = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            found = json.loads(line)
            if found["judge"] == model:
                known[found["sha256"] + found["prompt"]] = [str(each) for each in found["answers"]]
        except (ValueError, KeyError, TypeError):
            break
        whole.append(line)
    if path.exists():
        path.write_text("".join(whole))
    return known
