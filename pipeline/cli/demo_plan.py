"""Plan the demo's training: how fast this machine is, and how many drawings it can learn in the time.

A drawing has to be seen some hundred times before the network draws it again. A slow machine gets fewer of them, whole
groups of clearly drawn objects with short names first, instead of all of them badly.
"""

import json
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.yaml import HOME
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.view import query

RECIPE = HOME / "configs/recipes/demo.yaml"
PLAN = "plan.json"  # in the run's folder: a demo that goes on keeps its drawings
LEAST = 400  # drawings
VIEWS = 110  # times that a drawing is to be seen
ENOUGH = 60  # as many do where all drawings are taken: more drawings are more steps, too
KEPT = 0.8  # of the speed measured: AdamW, the exchange of gradients, checkpoints and validation take the rest
MEASURED = 2.0  # seconds

# Of drawings that look alike only the first is kept: at most 1 of the 64 bits of the perceptual hash differs, and so
# does hardly the mean colour (flat drawings that differ in colour alone have one hash). Too small ones are left out.
CONDITION = """status = 'ok' AND least(width, height) >= 64
  AND has_latents_demo_64 AND has_text_minilm_source AND has_text_minilm_plain
  AND NOT EXISTS (
    SELECT 1 FROM samples AS t
    WHERE t.status = 'ok' AND least(t.width, t.height) >= 64 AND (t.shard, t.row) < (s.shard, s.row)
      AND bit_count(xor(('0x' || t.basic_phash)::UBIGINT, ('0x' || s.basic_phash)::UBIGINT)) <= 1
      AND abs(t.basic_red - s.basic_red) + abs(t.basic_green - s.basic_green) + abs(t.basic_blue - s.basic_blue) < 6)"""
GROUP = "split_part(caption_source, ', ', -1)"
ALL = f"SELECT source, shard, row FROM samples AS s\nWHERE {CONDITION}"
GROUPS = f"SELECT {GROUP} AS name, count(*) AS drawings FROM samples AS s\nWHERE {CONDITION}\nGROUP BY 1 ORDER BY 2, 1"

# Clearly drawn objects with short names, the plainest first; the groups that are not here come last, the largest at the
# very end (of 260 flags and of the persons in their jobs few can be told apart on 64 pixels).
PLAIN_FIRST = (
    "food fruit", "food vegetable", "food sweet", "food prepared", "drink", "animal mammal", "animal bird",
    "animal bug", "animal marine", "animal reptile", "animal amphibian", "plant flower", "plant other",
    "food asian", "food marine", "clothing", "transport ground", "transport water", "transport air", "tool",
    "household", "dishware", "musical instrument", "sport", "game", "light and video", "computer", "phone",
    "office", "music", "sky and weather", "place building", "writing", "mail", "money", "book paper", "science",
    "medical", "lock", "event", "award medal", "arts and crafts", "hotel", "other object", "place other",
    "place geographic", "place religious", "body parts",
)  # fmt: skip


@dataclass(frozen=True)
class DemoPlan:
    """The drawings that the demo trains on, and the reason for the choice."""

    images_per_second: float
    """Expected of the training."""
    images: int
    """Expected in its time."""
    drawings: int
    every: bool
    """Every drawing there is."""
    sql: str

    def text(self) -> str:
        """Say what was chosen and why."""
        seen = f"this machine trains on about {self.images_per_second:,.0f} images/s, {self.images:,} in its time: "
        if self.every:
            return f"{seen}all {self.drawings:,} drawings, each seen about {self.images // self.drawings} times"
        return (
            f"{seen}enough for {self.drawings:,} drawings, each seen about {self.images // self.drawings} times; they "
            f"are whole groups, objects that are clearly drawn and shortly named first:\n{self.sql}"
        )


def plan_training(corpus: Corpus, run: Path, seconds: float, processes: int, threads: int) -> DemoPlan:
    """Measure this machine and choose the drawings, or read what was chosen when the run began."""
    path = run / PLAN
    try:
        return DemoPlan(**json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except (ValueError, TypeError) as error:
        raise RequestError(f"{path} is damaged ({error}): delete {run} to train anew") from error
    plan = choose(measure_speed(processes, threads), seconds, count_groups(corpus))
    run.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(plan), indent=1) + "\n")
    partial.replace(path)
    return plan


def count_groups(corpus: Corpus) -> dict[str, int]:
    """Count the drawings of each of Unicode's subgroups, the smallest first, without those that look alike."""
    found = query(corpus, GROUPS).to_pydict()
    return dict(zip(found["name"], found["drawings"], strict=True))


def choose(images_per_second: float, seconds: float, groups: Mapping[str, int]) -> DemoPlan:
    """Choose as many whole groups as can be learned in so many seconds, `LEAST` drawings at least."""
    images, total = int(images_per_second * seconds), sum(groups.values())
    wanted = total if images >= ENOUGH * total else max(images // VIEWS, LEAST)
    ordered = [*(name for name in PLAIN_FIRST if name in groups), *(name for name in groups if name not in PLAIN_FIRST)]
    chosen: list[str] = []
    while ordered and sum(groups[name] for name in chosen) < wanted:
        chosen.append(ordered.pop(0))
    drawings, sql = sum(groups[name] for name in chosen), ALL
    if ordered:
        sql += f"\n  AND {GROUP} IN ({', '.join(map(_quoted, chosen))})"
    return DemoPlan(round(images_per_second, 1), images, drawings, not ordered, sql)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def measure_speed(processes: int, threads: int) -> float:
    """Measure the images that this machine will train on in a second: all processes at once, for two seconds."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    with context.Pool(processes, initializer=_begin, initargs=(barrier,)) as pool:
        return KEPT * sum(pool.map(_process_speed, [threads] * processes, chunksize=1))


_barrier: Barrier


def _begin(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _process_speed(threads: int) -> float:
    """Measure the images a second of this process, while all others measure too."""
    import torch

    torch.set_num_threads(threads)
    step, count = _made_up_step()
    step()
    _barrier.wait(60)
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < MEASURED or done < count:
        step()
        done += count
    return done / passed if done else 0.0


def _made_up_step() -> tuple[Any, int]:
    """Prepare a forward and backward pass of the demo's network on noise; returns it, and its number of images."""
    import torch

    from microdit.model.device import best_device, has_fast_bf16
    from microdit.model.edm import EDM
    from microdit.model.network import MicroDiT
    from microdit.trainer.recipe import load_recipe

    recipe, device, count = load_recipe(RECIPE), torch.device(best_device()), 32
    net = MicroDiT(**recipe.model, input_size=8, in_channels=4, caption_channels=384).to(device)
    random = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 4, 8, 8, generator=random).to(device) for _ in range(2))
    text = torch.randn(count, 12, 384, generator=random).to(device)
    mask = (torch.arange(12) < 6 + torch.arange(count)[:, None] % 7).to(device)  # captions of 6 to 12 tokens
    sigma = torch.full((count,), 3.0, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
            loss = EDM().loss(net, latents, text, sigma=sigma, noise=noise, text_mask=mask)
        loss.backward()
        loss.item()  # waits for the device

    return step, count
