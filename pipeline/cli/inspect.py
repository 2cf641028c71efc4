"""The command `inspect`: what a data set is, and the config that builds it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.command import Json, json_answer
from microdit.pipeline.cli.shown import print_rows

if TYPE_CHECKING:
    from microdit.pipeline.inspect.found import Found
    from microdit.pipeline.inspect.sheet import Shown


def inspect(
    place: Annotated[
        str,
        typer.Argument(
            metavar="PLACE",
            help="A file, a folder, a pattern, s3://bucket/prefix, hf://datasets/OWNER/NAME, or a config (.yaml).",
            show_default=False,
        ),
    ],
    write: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Write the config that builds it.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a sheet of pictures.")] = None,
    as_json: Json = False,
) -> None:
    """Look at a few samples of a data set, say what is in it, and write the config that builds it.

    One file of it is read, and fetched whole where it is not on this machine; of a list of URLs the first are fetched.
    Of files with prompts the first are shown. Of a config the first samples of each source are; with `--out` a source
    `synthesize` loads its models and draws them.

    **Examples**

    - `microdit inspect my/tars --write my.yaml --out page.html`, then `microdit build my.yaml`
    - `microdit inspect prompts.txt --write my.yaml`, then `microdit inspect my.yaml --out page.html`
    """
    from microdit.pipeline.inspect.sheet import example_of, lines_of, page

    with json_answer(as_json) as answer:
        if place.endswith((".yaml", ".yml")):
            found, samples, config = _of_config(place, write, out is not None)
        else:
            found, samples, config = _of_place(place)
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


def _of_place(place: str) -> "tuple[Found, Sequence[Shown], str]":
    """Look at a data set, or at files with prompts."""
    from microdit.pipeline.files.scratch import scratch_folder
    from microdit.pipeline.inspect.find import inspect as look
    from microdit.pipeline.inspect.prompts import few_prompts
    from microdit.pipeline.inspect.sheet import config_text, read_few

    scratch = scratch_folder(None)
    found = look(place, scratch)
    config = config_text(place, found)
    if found.layout == "prompts":
        return found, few_prompts(found, scratch), config
    pointers = any("git-lfs" in note or "HTML" in note for note in found.notes)
    return found, [] if pointers else read_few(config, scratch), config


def _of_config(place: str, write: Path | None, draw: bool) -> "tuple[Found, Sequence[Shown], str]":
    """Look at the sources of a config."""
    from microdit.pipeline.config.build import load_config
    from microdit.pipeline.inspect.prompts import look_at_config

    if write is not None:
        raise RequestError(f"--write {write}: {place} is a config already")
    config = load_config(place)
    found, samples = look_at_config(config, draw)
    return found, samples, Path(place).read_text(encoding="utf-8") if Path(place).is_file() else ""
