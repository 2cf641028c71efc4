"""Keep a run within its time budget."""

from microdit.trainer.monitoring.log import Log
from microdit.trainer.processes import Team
from microdit.trainer.time_budget import TimeBudget


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
