"""The training loop: a recipe in, checkpoints, logs and a summary out.

set up -> data -> network -> resume -> (time budget) -> for each stage: for each batch: step, log, look, checkpoint
"""

import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.checkpoints.contents import folder_name, snapshot
from microdit.trainer.checkpoints.saver import Saver, load_latest, open_place
from microdit.trainer.data.ahead import in_thread
from microdit.trainer.data.batches import StageData, open_cache, shapes
from microdit.trainer.data.sample_index import open_samples
from microdit.trainer.learner import Learner
from microdit.trainer.micro_batch import with_micro_batch
from microdit.trainer.monitoring.log import Log
from microdit.trainer.monitoring.meter import Meter
from microdit.trainer.monitoring.not_finite import LIMIT, NotFinite
from microdit.trainer.monitoring.sample_sheets import Drawing
from microdit.trainer.monitoring.validation import Validation
from microdit.trainer.objective import learning_rate
from microdit.trainer.processes import Moments, Signals, joined_team
from microdit.trainer.progress import Progress
from microdit.trainer.recipe import Recipe
from microdit.trainer.run import keep_to_budget
from microdit.trainer.start import Init, begin_message, generate_info, network_config, refuse_other_run, selection_names
from microdit.trainer.time_budget import TimeBudget, measure_speed


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
