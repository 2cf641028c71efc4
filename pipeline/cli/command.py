"""What every command shares: exit statuses, common arguments, `--json`."""

import contextlib
import errno
import json
import math
import signal
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from microdit.pipeline.base.errors import RequestError


class Commands(TyperGroup):
    """Exit status 2 with one message if the request is wrong or a disk full, 128 + the signal's number if one came."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RequestError as error:
            print(f"microdit: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = f": {error.filename}" if error.filename else ""
            print(f"microdit: {error.strerror}{place}; with more room the same command goes on", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stopped:
            print(f"\nmicrodit: {stopped or 'stopped; run the same command again and it goes on'}", file=sys.stderr)
            raise typer.Exit(128 + getattr(stopped, "signum", signal.SIGINT)) from None


CorpusUrl = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A folder, or s3://bucket/prefix (gs://, az://).", show_default=False)
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Sql = Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over the view `samples`.", show_default=False)]
Distance = Annotated[int, typer.Option(metavar="BITS", help="How many of the 64 bits may differ, 0 to 8.")]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the file, e.g. shard_samples=64.", show_default=False),
]


def open_corpus(url: str) -> Any:
    from microdit.pipeline.corpus.corpus import Corpus

    return Corpus.open(url)


@contextlib.contextmanager
def json_answer(as_json: bool) -> Iterator[dict[str, Any]]:
    """A dictionary to fill; with `--json` it is what is printed, and what others print goes to standard error."""
    answer: dict[str, Any] = {}
    if not as_json:
        yield answer
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield answer
    print(json.dumps(finite(answer), default=str, ensure_ascii=False, allow_nan=False))


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
