"""Publish a build's figures as metrics of Ray, for its dashboard and for Prometheus (`ray_microdit_...`)."""

from ray.util.metrics import Counter, Gauge

from microdit.pipeline.base.progress import Line


class Metrics:
    """Counters of this run, and gauges of the build's state; the tag is the stage."""

    def __init__(self) -> None:
        tags = ("stage",)
        self._samples = Counter("microdit_samples", "samples worked on, good and failed", tags)
        self._failed = Counter("microdit_failed_samples", "samples that failed", tags)
        self._shards = Counter("microdit_shards", "shards written", tags)
        self._bytes = Counter("microdit_bytes", "bytes written", tags)
        self._left = Gauge("microdit_left", "shards (ingest: units) that are left", tags)
        self._aside = Gauge("microdit_set_aside", "shards (ingest: units) that are set aside", tags)
        self._running = Gauge("microdit_at_work", "shards (ingest: units) with the workers", tags)

    def written(self, stage: str, samples: int, failed: int, size: int) -> None:
        """Count a shard that was written, of `size` bytes."""
        tags = {"stage": stage}
        self._shards.inc(1, tags)
        for counter, value in ((self._samples, samples), (self._failed, failed), (self._bytes, size)):
            if value:  # Ray's counters refuse 0
                counter.inc(value, tags)

    def show(self, line: Line) -> None:
        """Set the gauges of a stage."""
        tags = {"stage": line.name}
        self._left.set(line.total - line.done - line.aside, tags)
        self._aside.set(line.aside, tags)
        self._running.set(line.running, tags)
