"""What a Python that has vLLM is asked: `python -m tests.model.pretrained.vllm_captions MODEL CORPUS`; prints JSON.

The stage of two columns over a corpus's shards; then the model of that stage, alone.
"""

import json
import multiprocessing
import sys
from typing import Any

from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.stages.captions.vision_language import Vlm
from microdit.pipeline.stages.stage import Task
from tests.model.pretrained.captioner_models import noise

COLUMNS = ("captions/long", "captions/short")
PROMPT, TOKENS = "a red apple", 24
SIDES = [(64, 96), (72, 96), (96, 64), (50, 120)] * 8


def main(model: str, url: str) -> None:
    options = CaptionsColumn(vlm=model, engine="vllm", prompt=PROMPT, max_tokens=TOKENS, temperature=1.0, image_side=64)
    stage, corpus = Vlm(dict.fromkeys(COLUMNS, options), 10**6, Resources()), Corpus.open(url)
    for column, spec in stage.columns.items():
        corpus.declare_column(column, spec.stage, spec.scalars)
    for images in corpus.commits(IMAGES):
        stage.run(corpus, Task(images.ref, dict.fromkeys(COLUMNS, 0)))
    captioner = stage.model
    pictures = [captioner.prepare(noise(seed, *sides)) for seed, sides in enumerate(SIDES)]

    def ask(temperature: float, first: int = 0) -> list[Any]:
        seeds = range(first, first + len(pictures))
        answers = captioner.generate(pictures, PROMPT, TOKENS, temperature, seeds)
        return [[answer.text, answer.finished] for answer in answers]

    found = {"likeliest": ask(0.0), "drawn": ask(1.0), "again": ask(1.0), "other": ask(1.0, 1000)}
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    print(json.dumps({**found, "anew": ask(1.0)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
