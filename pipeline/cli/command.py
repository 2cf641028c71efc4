"""Share exit statuses, common arguments and `--json` among the commands."""

import contextlib
import errno
import math
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from microdit.pipeline.base.errors import CredentialsExpired, RequestError, first_line
from microdit.pipeline.base.terminal import printable, printable_json

if TYPE_CHECKING:
    from microdit.pipeline.corpus.corpus import Corpus
    from microdit.pipeline.tables.database import SqlLimits


class Commands(TyperGroup):
    """Exit with status 2 and one message if the request is wrong, and with 128 + the number of a signal.

    Wrong is also a disk that is full or cannot be written, and a bucket that refuses.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (RequestError, CredentialsExpired) as error:
            print(printable(f"microdit: {error}"), file=sys.stderr)
            raise typer.Exit(2) from None
        except Exception as error:
            if (message := _refusal(error)) is None:
                raise
            print(printable(f"microdit: {message}"), file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stopped:
            message = f"\nmicrodit: {stopped or 'stopped; run the same command again and it goes on'}"
            print(printable(message), file=sys.stderr)
            raise typer.Exit(128 + getattr(stopped, "signum", signal.SIGINT)) from None


ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "with more room the same command goes on"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "check the path and your rights"),
}


def _refusal(error: Exception) -> str | None:
    """Say what a disk or a bucket refuses, and what to do; None for any other error."""
    if isinstance(error, OSError):
        path = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{path}; {ADVICE[error.errno]}" if error.errno in ADVICE else None
    exceptions: Any = sys.modules.get("obstore.exceptions")  # of whoever has opened a bucket
    if exceptions and isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return f"{first_line(error)}; check your rights there"
    return None


CorpusUrl = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A folder, or s3://bucket/prefix (gs://, az://).", show_default=False)
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Sql = Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over the view `samples`.", show_default=False)]
Distance = Annotated[int, typer.Option(metavar="BITS", help="How many of the 64 bits may differ, 0 to 8.")]

Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Stop the query after so long; else never.", min=0.001)
]
Memory = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="Memory for the query, and as much for its result; 8, or half of the machine's if that is less.",
        min=0.1,
    ),
]
Disk = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="Room for its temporary files in $TMPDIR; 32, or half of what is free there if that is less.",
        min=0,
    ),
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the file, e.g. shard_samples=64.", show_default=False),
]


def sql_limits(timeout: float | None, memory: float | None, disk: float | None) -> "SqlLimits":
    """Build the limits of a query from its options, in GiB; None is the default."""
    from microdit.pipeline.tables.database import GIB, SqlLimits

    given = {"memory": memory, "disk": disk}
    return SqlLimits(seconds=timeout, **{name: int(gib * GIB) for name, gib in given.items() if gib is not None})


def torchrun(processes: int) -> list[str]:
    """Build the command that starts so many processes of one machine; what they run follows.

    They meet on loopback: without `--local-addr` torch looks up the machine's own name, and where no name server knows
    that (a laptop elsewhere, a container) they wait for minutes and fail.
    """
    address = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", "torch.distributed.run", *address]


def open_corpus(url: str) -> "Corpus":
    """Open a corpus; imports nothing heavy before that."""
    from microdit.pipeline.corpus.corpus import Corpus

    return Corpus.open(url)


@contextlib.contextmanager
def json_answer(as_json: bool) -> Iterator[dict[str, Any]]:
    """Yield a dictionary to fill; with `--json` it is printed, and what others print goes to standard error."""
    answer: dict[str, Any] = {}
    if not as_json:
        yield answer
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield answer
    print(printable_json(finite(answer), default=str, allow_nan=False))


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
