"""The command `explore`: a page on which a corpus is looked at."""

from pathlib import Path
from typing import Annotated

import typer

from microdit.pipeline.base.signals import stop_signals
from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.command import CorpusUrl, open_corpus


def explore(
    corpus: CorpusUrl,
    port: Annotated[int, typer.Option(metavar="N", help="0 takes any that is free.", min=0, max=65535)] = 8421,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Who can reach the page; other than this machine needs --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(metavar="SECRET", help="The address has to end with it the first time.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Save no selection and no mark.")] = False,
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with training runs. Default: the corpus' parent.")
    ] = None,
) -> None:
    """Serve a page on which you look at the pictures, filter them, compare, mark and select.

    It opens where the corpus lies, in a folder or a bucket, also while a build writes it. Every filter is the `WHERE`
    that `microdit select` takes.

    **Examples**

    - `microdit explore my/corpus`

    - `microdit explore s3://bucket/corpus --host 0.0.0.0 --token "$(openssl rand -hex 16)"`
    """
    import asyncio
    import contextlib

    from microdit.pipeline.explore.guard import check_host
    from microdit.pipeline.explore.server import bind, serve

    check_host(host, token)
    opened = open_corpus(corpus)
    address = bind(host, port)
    if runs is None and opened.store.root is not None:
        runs = opened.store.root.parent

    def ready(url: str) -> None:
        print(printable(f"{opened.name}: {url} (Ctrl-C ends it)"), flush=True)

    async def served() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(signum: int) -> None:
            loop.call_soon_threadsafe(task.cancel)

        signals.stop = stop
        with contextlib.suppress(asyncio.CancelledError):
            await serve(opened, address, token, read_only, runs, ready)

    with stop_signals() as signals:
        asyncio.run(served())
    if signals.received is not None:
        raise typer.Exit(128 + signals.received)
