"""The training loop: a recipe in, checkpoints, logs and a summary out.

set up -> data -> network -> resume -> (time budget) -> for each stage: for each batch: step, log, look, checkpoint
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from pipeline.errors import RequestError
from trainer.budget import TimeBudget
from trainer.checkpoint import Checkpoint, folder_name, snapshot
from trainer.data import StageData, in_thread, open_cache, shapes
from trainer.drawing import Drawing
from trainer.learner import Learner, learning_rate, with_micro_batch
from trainer.log import Log, Meter, Progress
from trainer.places import Saver, load_latest, open_place
from trainer.recipe import Recipe, identity
from trainer.samples import RunSamples, open_samples
from trainer.start import Init, network_config
from trainer.team import Moments, Signals, Team, joined_team
from trainer.validation import Validation
from trainer.watch import LIMIT, NotFinite

WARM_STEPS, TIMED_STEPS = 3, 8  # of a stage, to measure the speed


# -- the run ---------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, resume: bool = True) -> dict[str, Any]:
    """Run a recipe to its end, or go on with it from the newest checkpoint (without `resume` one is refused).

    Returns a summary: checkpoint (where it is), images, steps, seconds, loss (of the last line of the log), validation
    (the last loss of what is held out, or None), skipped, scale, parameters, and `signal`, the number of the signal
    that stopped the run, or 0.

    Raises:
        RequestError: corpus, selection, columns, network or checkpoint do not fit the recipe.
        model.checkpoint.CheckpointError: none of the checkpoints can be read, or the last one cannot be written.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        team = stack.enter_context(joined_team())
        signals = stack.enter_context(Signals())
        log = stack.enter_context(closing(Log(recipe.out, team.rank == 0, recipe.wandb, recipe.name)))

        # data
        samples = open_samples(recipe)
        init = None if recipe.init is None else Init(recipe, samples)
        cache = stack.enter_context(closing(open_cache(recipe, samples)))
        config = network_config(recipe, samples, cache, init)
        learner = Learner(recipe, config, team)
        stages = []
        for stage, index in zip(recipe.stages, samples.stages, strict=True):
            shape, width = shapes(cache, index, stage.latents, list(recipe.text))
            stage = with_micro_batch(learner, stage, team, shape, (recipe.text_lengths[-1], width))
            stages.append(StageData(recipe, stage, index, cache, config["patch_size"], team.rank, team.world))
        validation = Validation(samples, team, log)

        # begin, or go on
        facts = [{"latents": s.stage.latents, "samples": len(s.index), "digest": s.index.digest} for s in stages]
        facts = [fact | {"selection": name} for fact, name in zip(facts, selection_names(recipe, samples), strict=True)]
        place = open_place(recipe)
        found = load_latest(place, log.say, team, resume)
        if found is None:
            progress = Progress([stage.length for stage in recipe.stages])
            if init is not None:
                init.load(learner)
            log.say(begin_message(recipe, samples, stages, learner))
        else:
            refuse_other_run(found, recipe, facts)
            progress = Progress(**found.state["progress"])
            learner.load(found)
            cache.broken.restore(found.state.get("broken", []))
        total = progress.images(recipe.stages)
        if found is not None and progress.seen < total:
            log.say(f"going on after {progress.seen:,} of {total:,} images, from {found.name}")
        drawing = None
        if recipe.sample_every is not None and progress.seen < total:
            drawing = Drawing(recipe, samples, config, team, log)
        budget = None
        if recipe.time_budget is not None and progress.seen < total:
            speed = measure_speed(recipe, config, team, stages)
            budget = TimeBudget(progress, recipe.stages, speed, recipe.time_budget - (time.monotonic() - began))
            keep_to_budget(budget, team, log)
        log.open(-1 if found is None else progress.step, progress)
        meter, not_finite = Meter(progress, team, log), NotFinite(recipe.out, team)
        saver = stack.enter_context(Saver(place, recipe.checkpoint_keep, recipe.checkpoint_keep_hours, log.say))
        saved, moments = time.monotonic(), Moments(team)

        def save() -> None:
            nonlocal saved
            saved = time.monotonic()
            meter.settle()
            for listed in team.gathered(cache.broken.listed()):
                cache.broken.restore(listed)
            saver.settle()
            tensors = snapshot(learner.net, learner.averages, learner.optimizer, keep=team.rank == 0)
            if team.rank == 0:
                state = {"recipe": recipe.model_dump(mode="json"), "data": facts, "progress": asdict(progress)}
                state["broken"] = cache.broken.listed()
                info = generate_info(recipe, samples, stages[progress.stage])
                info["selection"] = facts[progress.stage]["selection"]
                saver.save(progress.step, tensors, state, info)

        def look(last: bool = False) -> None:
            """The validation loss and pictures, if it is time for them; not twice after the same step."""
            measure = last or progress.step % recipe.validate_every == 0
            draw = drawing is not None and (last or progress.step % drawing.every == 0)
            if progress.looked == progress.step or not (measure or draw):
                return
            began, progress.looked = time.monotonic(), progress.step
            number = max(progress.stage - (progress.stage_step == 0), 0)  # of the stage that the step was of
            if measure:
                figures = validation.measure(learner, stages[number], number)
                if figures is not None:
                    progress.validation = figures["loss"] if figures["ema_loss"] is None else figures["ema_loss"]
                    log.line(progress.step, images=progress.seen, stage=number + 1, validation=figures)
            if drawing is not None and draw:
                drawing(progress.step, learner, stages[number].latent_shape)
            meter.pause(time.monotonic() - began)

        def asked_to_stop() -> bool:
            """Whether a signal came to any process, or nothing is learned; they ask each other now and then only."""
            if not moments.now(progress.step):
                return False
            signals.received = int(team.largest(signals.received))
            not_finite.in_a_row = int(team.largest(not_finite.in_a_row))
            return signals.received > 0 or not_finite.in_a_row >= LIMIT

        def due() -> bool:
            """Whether it is time for a checkpoint."""
            if progress.step % recipe.checkpoint_every == 0:
                return True
            if recipe.checkpoint_minutes is None or not moments.now(progress.step):
                return False
            return team.largest(time.monotonic() - saved) >= 60 * recipe.checkpoint_minutes

        # the loop
        stopped = signals.received > 0
        if progress.seen < total and not stopped:
            look()
        while (total := progress.images(recipe.stages)) > progress.seen and not stopped:
            number = progress.stage
            stage, length = recipe.stages[number], progress.lengths[number]
            source = stages[number].batches(progress.step, progress.seen, length - progress.stage_step)
            with closing(in_thread(source)) as batches:
                for batch in meter.waiting(batches):
                    rate = learning_rate(stage, progress.stage_step, length, progress.scale)
                    seen = (progress.stage_step + 1) * stage.batch
                    taken = learner.step(batch, stage, rate, progress.scale, seen)
                    meter.add(taken)
                    progress.step += 1
                    progress.stage_step += 1
                    progress.seen += stage.batch
                    not_finite.add(progress.step, taken.bad, stages[number].index, batch.positions)
                    other_lengths = False
                    if progress.step % recipe.log_every == 0 or progress.seen == total:
                        meter.write(number, rate, total - progress.seen)
                        if budget is not None and progress.stage_step < length:
                            budget.observe(meter.speed)
                            other_lengths = keep_to_budget(budget, team, log)
                            total = progress.images(recipe.stages)
                    if stopped := asked_to_stop():
                        break
                    if progress.seen < total:
                        look()
                        if due():
                            save()
                    if other_lengths:
                        break
            if progress.stage_step == progress.lengths[number] and number + 1 < len(stages):
                progress.stage, progress.stage_step = number + 1, 0

        # end
        if found is None or progress.step > found.state["step"]:
            if progress.seen >= total:
                look(last=True)
            save()
        saver.finish()
        if not_finite.in_a_row >= LIMIT:
            raise RequestError(
                f"step {progress.step}: the last {not_finite.in_a_row} gradients were not finite and nothing was "
                f"learned; their samples are in {not_finite.path}. Lower the learning rate, or look at the latents; "
                "the same command goes on after them"
            )
        newest = f"{place}/{folder_name(progress.step)}"
        log.say(
            f"{'stopped' if progress.seen < total else 'finished'}: {progress.seen:,} of {total:,} images, {newest}"
        )
        return {
            "checkpoint": newest,
            "images": progress.seen,
            "steps": progress.step,
            "seconds": progress.seconds,
            "loss": progress.loss,
            "validation": progress.validation,
            "skipped": progress.skipped,
            "scale": progress.scale,
            "parameters": sum(p.numel() for p in learner.parameters.values()),
            "signal": signals.received,
        }


def begin_message(recipe: Recipe, samples: RunSamples, stages: Sequence[StageData], learner: Learner) -> str:
    parameters = sum(p.numel() for p in learner.parameters.values())
    lines = [
        f"{recipe.name}: {parameters / 1e6:.1f}M parameters, {len(stages[-1].index):,} samples, "
        f"{len(samples.held)} more held out, {'bf16' if learner.bf16 else 'fp32'} on {learner.device}"
    ]
    if samples.missing:
        selection = recipe.stages[-1].selection or recipe.selection
        lines.append(f"{samples.missing:,} samples of {selection} are not in all columns, and left out")
    lines += old_selections(recipe, samples)
    if (lanes := stages[-1].lanes.count) < recipe.lanes:
        lines.append(f"{recipe.lanes} lanes are more than there are samples: {lanes} lanes")
    return "\n".join(lines)


def selection_names(recipe: Recipe, samples: RunSamples) -> list[str | None]:
    """`name@hash` of each stage's selection, None where there is none."""
    from pipeline.selections import find_selection  # it brings duckdb

    names = [stage.selection or recipe.selection for stage in recipe.stages]
    return [None if name is None else find_selection(samples.corpus, name) for name in names]


def old_selections(recipe: Recipe, samples: RunSamples) -> list[str]:
    """What is to be said of selections that were chosen by columns that have other commits now."""
    from pipeline.selections import changed_since

    names = dict.fromkeys(name for name in selection_names(recipe, samples) if name is not None)
    changed = {name: found for name in names if (found := changed_since(samples.corpus, name))}
    return [
        f"{name} was chosen before {', '.join(found)} changed: its rows are taken as they are now; to choose anew, "
        "`microdit select` again"
        for name, found in changed.items()
    ]


def measure_speed(recipe: Recipe, config: dict[str, Any], team: Team, stages: Sequence[StageData]) -> list[float]:
    """Seconds that a step of each stage takes: a few steps of a network that is thrown away."""
    seconds = []
    for stage in stages:
        learner, marks = Learner(recipe, config, team), []
        with closing(in_thread(stage.batches(0, 0, WARM_STEPS + TIMED_STEPS))) as batches:
            for batch in batches:
                taken = learner.step(batch, stage.stage, rate=stage.stage.learning_rate)
                taken.loss.item()  # waits for the device
                marks.append(time.perf_counter())
        seconds.append(team.largest((marks[-1] - marks[WARM_STEPS - 1]) / TIMED_STEPS))
    return seconds


def keep_to_budget(budget: TimeBudget, team: Team, log: Log) -> bool:
    """Fit what is left of the run into the time left; whether its stages have other lengths now."""
    progress, before = budget.progress, budget.progress.scale
    if not budget.fit(-team.largest(-budget.share())):
        return False
    if abs(progress.scale - before) > 0.05:
        log.say(
            f"time budget: on this machine there is time for {progress.images(budget.stages):,} images, "
            f"{progress.scale:.0%} of the recipe's"
        )
    return True


def refuse_other_run(found: Checkpoint, recipe: Recipe, facts: list[dict[str, Any]]) -> None:
    """Raises RequestError if a checkpoint is of another recipe, or of other samples."""
    advice = f"put it back, or set out to another folder than {recipe.out}"
    before, now = identity(Recipe.model_validate(found.state["recipe"])), identity(recipe)
    for name in now:
        if before[name] != now[name]:
            raise RequestError(
                f"{found.name} was made with {name} = {before[name]}, the recipe says {now[name]}; {advice}"
            )
    for old, new in zip(found.state["data"], facts, strict=True):
        if any(old[name] != new[name] for name in ("latents", "samples", "digest")):
            raise RequestError(
                f"{found.name} was made on {old['samples']:,} samples of {old['latents']} ({old['digest']}), the "
                f"corpus and the selection now give {new['samples']:,} ({new['digest']}); name the selection "
                f"with its hash, or {advice}"
            )


def generate_info(recipe: Recipe, samples: RunSamples, stage: StageData) -> dict[str, Any]:
    """What `model.loading` needs beside the weights; the columns tell text encoder and autoencoder."""
    return {
        "name": recipe.name,
        "latent_shape": stage.latent_shape,
        "sigma_data": recipe.sigma_data,
        "guidance_scale": recipe.guidance_scale,
        "latents": samples.corpus.column(stage.stage.latents).stage,
        "text": samples.corpus.column(stage.text[0]).stage,
    }
