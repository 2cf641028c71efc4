"""The vLLM engine, where there is one: in this environment, or behind the Python that MICRODIT_VLLM_PYTHON names.

That Python needs microdit's own dependencies too. On a CPU it takes two minutes, most of which vLLM takes to begin.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from microdit.model.pretrained.captioners import load_captioner
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.upkeep.verify import verify
from tests.model.pretrained.captioner_models import noise, vision_folder
from tests.model.pretrained.vllm_captions import COLUMNS, PROMPT, SIDES, TOKENS
from tests.pipeline.helpers.stage_outputs import check_rows, lines, start

PYTHON = os.environ.get("MICRODIT_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else "")
pytestmark = [pytest.mark.skipif(not PYTHON, reason="vLLM is not here"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Heads of 32, which are the smallest that vLLM has on a CPU."""
    return vision_folder(tmp_path_factory.mktemp("models") / "qwen3", "qwen3_vl", head_dim=32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return start(tmp_path_factory.mktemp("corpora") / "corpus")


@pytest.fixture(scope="module")
def said(model: str, corpus: Corpus) -> dict[str, Any]:
    """What `tests.model.pretrained.vllm_captions` found, after which the corpus has its columns."""
    root = Path(__file__).parents[3]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(root), **os.environ}
    run = subprocess.run(
        [PYTHON, "-m", "tests.model.pretrained.vllm_captions", model, corpus.url],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=900,
    )
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("{"))  # vLLM's log is around it
    found: dict[str, Any] = json.loads(line)
    return found


def test_every_picture_is_answered_as_its_seed_says(said: dict[str, Any]) -> None:
    for answers in said.values():
        assert len(answers) == len(SIDES)
    assert said["drawn"] == said["again"] != said["other"]
    assert len({text for text, _ in said["likeliest"]}) > len(SIDES) / 2  # it looks at the pictures
    assert {finished for _, finished in said["drawn"]} == {True, False}


def test_it_says_what_transformers_say(said: dict[str, Any], model: str) -> None:
    """Greedily, the same 24 tokens and the same end, of half of them: bfloat16 lets the others part somewhere.

    Half of a character at the end is left out by vLLM.
    """
    ours = load_captioner(model)
    pictures = [ours.prepare(noise(seed, *sides)) for seed, sides in enumerate(SIDES)]
    wanted = [ours.generate([picture], PROMPT, TOKENS, 0.0, [0])[0] for picture in pictures]
    same = [
        text.rstrip("\ufffd ") == one.text.rstrip("\ufffd ") and finished == one.finished
        for (text, finished), one in zip(said["likeliest"], wanted, strict=True)
    ]
    assert sum(same) > len(same) / 4


def test_the_stage_writes_a_row_for_each_sample(said: dict[str, Any], corpus: Corpus) -> None:
    for column in COLUMNS:
        commits = corpus.commits(column)
        check_rows(corpus, commits, "images")
        rows = [line for line in lines(corpus, commits) if line["reason"] != "upstream"]
        assert len(rows) == 10
        assert {line["reason"] for line in rows} <= {None, "cut_off", "wrong_language", "empty", "loop"}
        for line in rows:
            assert line["tokens"] == (len(line["caption"].split()) if line["caption"] else None)
    first, second = ([line["caption"] for line in lines(corpus, corpus.commits(column))] for column in COLUMNS)
    assert first != second  # the seed is the column's
    assert verify(corpus).problems == []


def test_a_process_that_died_between_two_calls_is_started_anew(said: dict[str, Any]) -> None:
    assert said["anew"] == said["drawn"]
