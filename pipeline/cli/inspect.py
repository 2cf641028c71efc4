"""The command `inspect`: what a data set is, and the config that builds it."""

from pathlib import Path
from typing import Annotated

import typer

from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.command import Json, json_answer
from microdit.pipeline.cli.shown import print_rows


def inspect(
    place: Annotated[
        str,
        typer.Argument(
            metavar="PLACE",
            help="A file, a folder, a pattern, s3://bucket/prefix, or hf://datasets/OWNER/NAME.",
            show_default=False,
        ),
    ],
    write: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Write the config that builds it.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a sheet of pictures.")] = None,
    as_json: Json = False,
) -> None:
    """Look at a few samples of a data set, say what is in it, and write the config that builds it.

    One file of it is read, and fetched whole where it is not on this machine; of a list of URLs the first are fetched.

    **Examples**

    - `microdit inspect my/tars --write my.yaml --out page.html`, then `microdit build my.yaml`
    """
    from microdit.pipeline.files.scratch import scratch_folder
    from microdit.pipeline.inspect.find import inspect as look
    from microdit.pipeline.inspect.sheet import config_text, example_of, lines_of, page, read_few

    scratch = scratch_folder(None)
    with json_answer(as_json) as answer:
        found = look(place, scratch)
        config = config_text(place, found)
        pointers = any("git-lfs" in note or "HTML" in note for note in found.notes)
        samples = [] if pointers else read_few(config, scratch)
        columns = [{"column": name, "example": example_of(values)} for name, values in found.columns.items()]
        answer.update({"layout": found.layout, "files": found.files, "bytes": found.bytes, "samples": found.estimate})
        answer.update({"columns": columns, "notes": found.notes, "config": config})
        if write is not None:
            write.write_text(config, encoding="utf-8")
        if out is not None:
            out.write_text(page(place, found, samples, config), encoding="utf-8")
    if not as_json:
        for line in lines_of(found):
            print(printable(line))
        print_rows(["column", "example"], columns)
        print_rows(
            ["origin", "what", "caption"],
            [{"origin": s.origin, "what": s.reason or "ok", "caption": s.caption[:120]} for s in samples],
        )
        print(printable(config))
