"""Give a job up after its last attempt: record why it failed, or end the build where all that is left would fail."""

from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import write_failure
from microdit.pipeline.engine.plan import Job, Plan, UnitJob
from microdit.pipeline.engine.retries import History


def give_up(corpus: Corpus, plan: Plan, job: Job | UnitJob, history: History) -> str:
    """Set a job aside, with a record for each column that it should have written; return a line about it.

    Raises:
        RequestError: a disk is full, or the record cannot be written.
    """
    stage = stage_name(plan, job)
    name = job.unit if isinstance(job, UnitJob) else job.shard
    attempts, error = max(history.attempts, history.lost), history.error
    assert error is not None, "only a job that failed is given up"
    if error.full_disk_of:
        raise RequestError(
            f"node {error.full_disk_of}: {error.message} ({name} in {stage}, {attempts} attempts). Make room "
            "there (the corpus, if a folder; resources.scratch, where downloads lie) and run the same command again"
        )
    for column in plan.set_aside(job):
        try:
            write_failure(
                corpus,
                column,
                job.source,
                name,
                stage=stage,
                attempts=attempts,
                message=error.message,
                traceback=error.traceback,
            )
        except (OSError, BaseError) as refusal:
            raise RequestError(
                f"corpus {corpus.url}: it cannot be written ({first_line(refusal)}); {name} failed in {stage} "
                f"before that: {error.message}. Make room, or mend the access, and run the same command again"
            ) from refusal
    return (
        f"{stage}: {name} is set aside after {attempts} attempt{'s' * (attempts > 1)}: {error.message.splitlines()[0]}"
    )


def stage_name(plan: Plan, job: Job | UnitJob) -> str:
    """Return the name of a job's stage, `ingest` for a unit."""
    return "ingest" if isinstance(job, UnitJob) else plan.stages[job.stage].name
