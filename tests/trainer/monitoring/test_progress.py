import pytest

from microdit.trainer.monitoring.progress import Progress, TimeBudget
from microdit.trainer.recipe import LegRecipe

LEGS = [
    LegRecipe(latents="latents/demo-64", steps=100, batch=10, learning_rate=1e-3),
    LegRecipe(latents="latents/demo-64", steps=300, batch=10, learning_rate=1e-3),
]


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def run(progress: Progress, budget: TimeBudget, clock: Clock, seconds: list[float], fit_every: int = 10) -> float:
    """Steps that take `seconds` (one number for each stage), to the end; how long all took."""
    start = clock.now
    while True:
        if progress.stage_step >= progress.lengths[progress.stage]:
            if progress.stage + 1 == len(LEGS):
                return clock.now - start
            progress.stage, progress.stage_step = progress.stage + 1, 0
            continue
        clock.now += seconds[progress.stage]
        progress.stage_step += 1
        progress.step += 1
        if progress.step % fit_every == 0:
            budget.observe(LEGS[progress.stage].batch / seconds[progress.stage])
            budget.fit(budget.share())


def begin(left: float, step_seconds: list[float] | None = None) -> tuple[Progress, TimeBudget, Clock]:
    progress, clock = Progress([100, 300]), Clock()
    budget = TimeBudget(progress, LEGS, step_seconds or [1.0, 2.0], left, clock)
    budget.fit(budget.share())
    return progress, budget, clock


def test_enough_time_changes_nothing() -> None:
    progress, budget, clock = begin(left=800)
    assert run(progress, budget, clock, [1.0, 2.0]) == 700
    assert progress.lengths == [100, 300] and progress.scale == 1


def test_too_little_time_shortens_all_stages_alike() -> None:
    progress, budget, clock = begin(left=350)
    assert progress.lengths == [48, 145]  # 97% of the half
    assert progress.scale == pytest.approx(193 / 400)
    assert 300 < run(progress, budget, clock, [1.0, 2.0]) <= 350


def test_a_machine_that_gets_slow_still_ends_in_time() -> None:
    progress, budget, clock = begin(left=750)
    assert progress.lengths == [100, 300]
    assert 650 < run(progress, budget, clock, [2.0, 4.0]) <= 750
    assert progress.scale < 0.6


def test_a_machine_that_was_busy_at_first_gets_its_steps_back() -> None:
    progress, budget, clock = begin(left=800, step_seconds=[20.0, 40.0])
    assert progress.scale < 0.06
    run(progress, budget, clock, [1.0, 2.0], fit_every=1)
    # the first stage was over before the speed was known; the second is nearly whole
    assert progress.lengths[1] > 250
    assert progress.images(LEGS) == 10 * sum(progress.lengths)


def test_no_time_at_all_leaves_a_step_of_each_stage() -> None:
    progress, budget, clock = begin(left=0)
    assert progress.lengths == [1, 1]
    run(progress, budget, clock, [1.0, 2.0])
    assert progress.step == 2


def test_what_is_done_counts_by_its_share_of_the_stage() -> None:
    progress, clock = Progress([50, 150], stage_step=25), Clock()  # half through the first, which had been halved
    budget = TimeBudget(progress, LEGS, [1.0, 2.0], 1e9, clock)
    assert budget.share() == 1 and budget.fit(1.0)
    assert progress.lengths == [75, 300]
