"""Messages from the workers to the driver: small, immutable, and picklable without Ray."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.records import UNREPAIRED, Commit


@dataclass(frozen=True)
class ErrorReport:
    """An exception of a worker as text, so that no exception of a model's library has to survive pickling."""

    message: str
    traceback: str
    is_request: bool = False
    """A `RequestError`: the build ends with it."""
    is_final: bool = False
    """Another attempt would end in the same way: the job is set aside immediately."""
    full_disk_of: str | None = None
    """The host whose disk was full."""
    server_rejects: bool = False
    """A server rejected most of what the shard asked for (`ServerRejects`)."""
    credentials_expired: bool = False
    """Those of a bucket have, and new ones may come (`CredentialsExpired`)."""

    def raise_if_request(self) -> None:
        """Raise the error if the request itself is wrong.

        Raises:
            RequestError: it is.
        """
        if self.is_request:
            raise RequestError(self.message)


@dataclass(frozen=True)
class ShardWork:
    """Counts of a shard that was written, its bytes, and the seconds that it took."""

    inputs: int
    failed: int
    bytes: int
    seconds: float
    encode_seconds: float | None = None
    """Of these the seconds in which the model worked, where the stage measures them."""
    unrepaired: int = 0
    """Rows that a repair could not have again from the source."""
    cut: int = 0
    """Captions of which the model read the beginning alone."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Of the failed rows, by their number."""

    @classmethod
    def of(cls, commit: Commit) -> "ShardWork":
        """Summarize a commit."""
        counts, timings = commit.counts, commit.timings
        return cls(
            counts["in"],
            counts["failed"],
            commit.size,
            timings["seconds"],
            timings.get("encode_seconds"),
            int(timings.get(UNREPAIRED, 0)),
            int(timings.get("cut", 0)),
            dict(commit.reasons),
        )

    @property
    def busy_seconds(self) -> float:
        """Seconds of the model's work; of all the work, where they are not measured apart."""
        return self.seconds if self.encode_seconds is None else self.encode_seconds


@dataclass(frozen=True)
class Began:
    """A worker has begun a unit or a shard, on this node."""

    node: str


@dataclass(frozen=True)
class ShardIngested:
    """A shard of images is committed; its unit goes on."""

    shard: str
    work: ShardWork


@dataclass(frozen=True)
class UnitIngested:
    """A unit and all of its shards are committed: the last message of a unit."""

    shards: tuple[str, ...]


@dataclass(frozen=True)
class UnitFailed:
    """Reading a unit ended with an error: the last message of a unit."""

    error: ErrorReport


@dataclass(frozen=True)
class ShardEnded:
    """A stage has ended its work on a shard, well or with an error: the last message of a shard."""

    written: Mapping[str, ShardWork]
    """The columns that this call wrote."""
    existing: tuple[str, ...] = ()
    """The columns that others had written."""
    error: ErrorReport | None = None
    unchanged: tuple[str, ...] = ()
    """The columns of which failed rows were made again, and none of them is good now: nothing was written."""


@dataclass(frozen=True)
class LoadFailed:
    """A task or an actor could not load its stage."""

    error: ErrorReport


@dataclass(frozen=True)
class ActorStarted:
    """Ray has started an actor on this node; it has not loaded its models yet."""

    node: str


@dataclass(frozen=True)
class ActorLoaded:
    """An actor has loaded its models."""

    node: str
    gpus: tuple[str, ...] = ()
    """Ray's ids of the node's GPUs that it was given."""


@dataclass(frozen=True)
class GpuUnusable:
    """An actor has loaded nothing, because torch cannot use the GPU that Ray gave it."""

    node: str
    reason: str


IngestMessage = ShardIngested | UnitIngested | UnitFailed
LoadMessage = ActorStarted | ActorLoaded | GpuUnusable | LoadFailed
Message = Began | IngestMessage | ShardEnded | LoadMessage
