"""The state of a run, and the verbs of its loop."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.folder_lock import folder_lock
from microdit.pipeline.base.json_lines import plain
from microdit.pipeline.base.noted_signals import NotedSignals
from microdit.trainer import start
from microdit.trainer.checkpoints.contents import folder_name, snapshot
from microdit.trainer.checkpoints.saver import Saver, load_latest, open_checkpoints
from microdit.trainer.data.batch import Batch
from microdit.trainer.data.batches import LegData
from microdit.trainer.data.samples import open_cache, open_samples
from microdit.trainer.learner import Learner
from microdit.trainer.monitoring.log import Log
from microdit.trainer.monitoring.meter import LIMIT, Meter, NotFinite
from microdit.trainer.monitoring.progress import Progress, TimeBudget
from microdit.trainer.monitoring.sample_sheets import SampleSheets
from microdit.trainer.monitoring.validation import Validation
from microdit.trainer.objective import learning_rate
from microdit.trainer.processes import Moments, joined_team
from microdit.trainer.recipe import Recipe


class Run:
    """A recipe being carried out: its data, network, log and checkpoints, and how far it is.

    Every process of a run has one, and calls the same methods in the same order.
    """

    def __init__(self, recipe: Recipe, stack: ExitStack):
        """Open everything that the run needs; `stack` closes it."""
        self.recipe, self.began = recipe, time.monotonic()
        self.team = stack.enter_context(joined_team())
        self.signals = stack.enter_context(NotedSignals())
        self.log = stack.enter_context(closing(Log(recipe.out, self.team.rank == 0, recipe.wandb, recipe.name)))
        self.team.from_first(lambda: stack.enter_context(folder_lock(recipe.out, "run")))
        self.samples = open_samples(recipe, self.team)
        self.team.from_first(lambda: start.refuse_long_captions(recipe, self.samples))
        self.init = None if recipe.init is None else start.Init(recipe, self.samples)
        self.cache = stack.enter_context(closing(open_cache(recipe, self.samples)))
        self.config = start.network_config(recipe, self.samples, self.cache, self.init)
        self.learner = Learner(recipe, self.config, self.team)
        rank, world, patch_size = self.team.rank, self.team.world, self.config["patch_size"]
        self.legs = [
            LegData(recipe, leg, index, self.cache, patch_size, rank, world)
            for leg, index in zip(recipe.stages, self.samples.legs, strict=True)
        ]
        self.validation = Validation(self.samples, self.team, self.log)
        self.trained_on = self.team.from_first(lambda: start.trained_on(recipe, self.samples))
        self.checkpoints = open_checkpoints(recipe)
        if recipe.checkpoints is not None:  # `out` is locked
            self.team.from_first(lambda: stack.enter_context(self.checkpoints.locked(self.log.say)))
        keep = recipe.checkpoint_keep, recipe.checkpoint_keep_hours
        self.saver = stack.enter_context(Saver(self.checkpoints, *keep, self.log.say))

    # -- before the first step -----------------------------------------------------------------------------------
    def resume(self, allowed: bool) -> None:
        """Go on from the newest checkpoint if that is allowed, or begin."""
        recipe = self.recipe
        saved = load_latest(self.checkpoints, self.log.say, self.team, allowed)
        self.resumed_step = self.saved_step = self.saver.saved = -1 if saved is None else int(saved.state["step"])
        self.changes: list[dict[str, Any]] = []
        if saved is None:
            start.refuse_misfits(self.config, self.legs)
            self.progress = Progress([leg.length for leg in recipe.stages])
            if self.init is not None:
                self.init.load(self.learner)
            self.team.from_first(
                lambda: self.log.say(start.begin_message(recipe, self.samples, self.legs, self.learner))
            )
            return
        changes = start.find_changes(saved, recipe, self.trained_on)
        self.changes = [*saved.state.get("changes", []), *changes]
        self.progress = Progress(**{"even_lanes": False} | saved.state["progress"])
        for data in self.legs:
            data.lanes.even = self.progress.even_lanes
        start.change_lengths(self.progress, recipe, changes)
        for one in changes:
            self.log.say(f"going on with {one['name']} = {one['to']}, which was {one['from']}")
        self.learner.load(saved)
        self.cache.broken.restore(saved.state.get("broken", []))
        if self.progress.seen < self.total:
            self.log.say(f"going on after {self.progress.seen:,} of {self.total:,} images, from {saved.name}")

    def prepare(self) -> None:
        """Choose micro-batches, and get ready what watches the run: pictures, time budget, log, meter."""
        recipe, progress, team = self.recipe, self.progress, self.team
        for data in self.legs:
            data.leg = start.with_micro_batch(self.learner, data)
        self.sheets = self.budget = None
        if recipe.sample_every is not None and progress.seen < self.total:
            self.sheets = SampleSheets(recipe, self.samples, self.config, team, self.log)
        if recipe.time_budget is not None and progress.seen < self.total:
            speed = start.measure_speed(recipe, self.config, team, self.legs)
            left = recipe.time_budget - (time.monotonic() - self.began)
            self.budget = TimeBudget(progress, recipe.stages, speed, left)
            self.budget.keep(team, self.log.say)
        self.log.open(self.resumed_step, progress)
        self.meter, self.not_finite = Meter(progress, team, self.log), NotFinite(recipe.out, team)
        self.saved_at, self.moments = time.monotonic(), Moments(team)
        self.stopped = self.signals.received > 0

    # -- the loop ------------------------------------------------------------------------------------------------
    @property
    def total(self) -> int:
        """Images of the whole run; the time budget may change it."""
        return self.progress.images(self.recipe.stages)

    def goes_on(self) -> bool:
        return self.progress.seen < self.total and not self.stopped

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """Make the batches left of the current leg, ahead in a thread."""
        progress = self.progress
        left = progress.lengths[progress.stage] - progress.stage_step
        with closing(self.legs[progress.stage].batches_ahead(progress.step, progress.seen, left)) as batches:
            yield self.meter.waiting(batches)

    def step(self, batch: Batch) -> None:
        """Take a step on a batch, and count it."""
        progress, data = self.progress, self.legs[self.progress.stage]
        length, leg_seen = progress.lengths[progress.stage], (progress.stage_step + 1) * data.leg.batch
        scale = length / data.leg.length
        self.rate = learning_rate(data.leg, progress.stage_step, length, scale)
        taken = self.learner.step(batch, data.leg, self.rate, scale, leg_seen)
        self.meter.add(taken)
        self.not_finite.add(progress.position(), taken.bad, data.index, batch.positions)
        progress.advance(data.leg.batch)

    def report(self) -> None:
        """Write a line of the log if one is due, and fit the lengths of the legs to the time left."""
        progress, self.replanned = self.progress, False
        if progress.step % self.recipe.log_every and progress.seen < self.total:
            return
        self.meter.write(progress.stage, self.rate, self.total - progress.seen)
        if self.budget is not None and progress.stage_step < progress.lengths[progress.stage]:
            self.budget.observe(self.meter.speed)
            self.replanned = self.budget.keep(self.team, self.log.say)

    def asked_to_stop(self) -> bool:
        """Ask whether a signal came to any process, or nothing is learned; they ask each other now and then only."""
        if self.moments.now(self.progress.step):
            self.signals.received = int(self.team.largest(self.signals.received))
            if self.team.largest(self.not_finite.in_a_row) >= LIMIT:
                self.not_finite.settle()  # those that are not known yet may be good again
            self.stopped = self.signals.received > 0 or self.not_finite.in_a_row >= LIMIT
        return self.stopped

    def look(self, last: bool = False) -> None:
        """Measure the validation loss and draw pictures where they are due, but not twice after the same step."""
        progress = self.progress
        measure = last or progress.step % self.recipe.validate_every == 0
        draw = self.sheets is not None and (last or progress.step % self.sheets.every == 0)
        if not (last or self.goes_on()) or progress.looked == progress.step or not (measure or draw):
            return
        began, progress.looked = time.monotonic(), progress.step
        number = max(progress.stage - (progress.stage_step == 0), 0)  # of the leg that the step was of
        if measure:
            figures = self.validation.measure(self.learner, self.legs[number], number)
            if figures is not None:
                progress.validation = plain(figures["loss"] if figures["ema_loss"] is None else figures["ema_loss"])
                self.log.line(progress.step, images=progress.seen, stage=number + 1, validation=figures)
        if self.sheets is not None and draw:
            self.sheets.draw(progress.step, self.learner, self.legs[number].latent_shape)
        self.meter.pause(time.monotonic() - began)

    def save_if_due(self) -> None:
        """Save if there is more to come and it is time for a checkpoint."""
        step, minutes = self.progress.step, self.recipe.checkpoint_minutes
        due = step % self.recipe.checkpoint_every == 0
        if self.goes_on() and not due and minutes is not None and self.moments.now(step):
            due = self.team.largest(time.monotonic() - self.saved_at) >= 60 * minutes
        if self.goes_on() and due:
            self.save()

    def save(self) -> None:
        """Begin to write a checkpoint, once the one before is written: the state before gradients became bad.

        Raises:
            RequestError: the weights are not finite.
        """
        recipe, progress, learner, first = self.recipe, self.progress, self.learner, self.team.rank == 0
        self.saved_at = time.monotonic()
        self.not_finite.settle()
        self.meter.settle()
        if bad := self.not_finite.in_a_row:  # they changed nothing, and are taken again
            progress = replace(progress, **self.not_finite.before, skipped=progress.skipped - bad)
        self.saver.settle()
        self.saved_step = self.team.from_first(lambda: self.saver.saved)
        if progress.step == self.saved_step:
            return
        if not learner.finite():
            raise RequestError(f"step {progress.step}: the weights are not finite and are not saved; {self._advice}")
        self.saved_step = progress.step
        for listed in self.team.gathered(self.cache.broken.listed()):
            self.cache.broken.restore(listed)
        tensors = snapshot(learner.net, learner.averages, learner.optimizer, keep=first)
        if first:
            state = {"recipe": recipe.model_dump(mode="json"), "data": self.trained_on, "progress": asdict(progress)}
            state |= {"broken": self.cache.broken.listed(), "changes": self.changes}
            selection = self.trained_on[progress.stage]["selection"]
            info = start.generate_info(recipe, self.samples, self.legs[progress.stage], selection)
            self.saver.save(progress.step, tensors, state, info, remove=not bad)

    def end_leg(self) -> None:
        """Go on to the next leg, if this one is over and not the last."""
        progress = self.progress
        if progress.stage_step == progress.lengths[progress.stage] and progress.stage + 1 < len(self.legs):
            progress.stage, progress.stage_step = progress.stage + 1, 0

    # -- after the last step -------------------------------------------------------------------------------------
    def finish(self) -> None:
        """Look and save for the last time, and wait until that is written.

        Raises:
            RequestError: nothing was learned any more.
            CheckpointError: the checkpoint cannot be written.
        """
        progress, not_finite = self.progress, self.not_finite
        not_finite.settle()
        if progress.step > self.resumed_step:
            if progress.seen >= self.total and not not_finite.in_a_row:
                self.look(last=True)
            self.save()
        self.saver.finish()
        if not_finite.in_a_row >= LIMIT or (not_finite.in_a_row and progress.seen >= self.total):
            raise RequestError(
                f"step {progress.step}: the last {not_finite.in_a_row} gradients were not finite and nothing was "
                f"learned; their samples are in {not_finite.path}; {self._advice}"
            )
        what = "stopped" if progress.seen < self.total else "finished"
        self.log.say(f"{what}: {progress.seen:,} of {self.total:,} images, {self.newest}")

    @property
    def newest(self) -> str:
        """Return the path of the newest checkpoint."""
        return f"{self.checkpoints}/{folder_name(self.saved_step)}"

    @property
    def _advice(self) -> str:
        what = f"{self.newest} is from before" if self.saved_step >= 0 else "there is no checkpoint"
        return (
            f"{what}. Lower learning_rate or clip in stages.{self.progress.stage}, with which the run may go on from "
            "there, or look at the latents of those samples"
        )

    def summary(self) -> dict[str, Any]:
        """Sum up the run, as `train` says."""
        progress = self.progress
        return {
            "checkpoint": self.newest,
            "images": progress.seen,
            "steps": progress.step,
            "seconds": progress.seconds,
            "loss": progress.loss,
            "validation": progress.validation,
            "skipped": progress.skipped,
            "scale": progress.scale,
            "parameters": sum(p.numel() for p in self.learner.parameters.values()),
            "signal": self.signals.received,
        }
