"""`microdit convert`: MDS folders of the official micro_diffusion code to a corpus, and a corpus to such a folder."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.terminal import printable, printable_json

if TYPE_CHECKING:
    from microdit.pipeline.base.progress import Progress
    from microdit.pipeline.mds.summary import ExportSummary, ImportSummary


@dataclass(frozen=True)
class _ToCorpusOptions:
    """The options of MDS to corpus, named as they are given."""

    source: str | None
    captions: str | None
    autoencoder: str | None
    text_encoder: str | None
    as_built: bool
    repair: bool


@dataclass(frozen=True)
class _ToMdsOptions:
    """The options of corpus to MDS, named as they are given."""

    selection: str | None
    text: str | None
    latents: list[str] | None
    compression: str | None


# longer than 60 lines by its options and its help alone
def convert(
    origin: Annotated[
        str, typer.Argument(metavar="FROM", help="A folder of MDS shards, or a corpus.", show_default=False)
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TO", help="A corpus (it is made if there is none), or a new folder.", show_default=False
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="MDS to corpus: what the samples are called there, e.g. `cc12m`."),
    ] = None,
    captions: Annotated[
        str | None, typer.Option(metavar="NAME", help="MDS to corpus: they become `captions/NAME`. Default: `source`.")
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="MDS to corpus: what made the latents. Default: `sdxl`, of 16 `ostris`."),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="MDS to corpus: what made the text. Default: `dfn-clip-h`.")
    ] = None,
    as_built: Annotated[
        bool,
        typer.Option(
            "--as-built",
            help="MDS to corpus: declare latents and text as `microdit build` does, so that a build can add images to "
            "them. The hub, or its cache, is asked which models those are.",
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="MDS to corpus: read all that is there first; make again what is damaged, lost or stale."
        ),
    ] = False,
    text_shape: Annotated[
        str, typer.Option(metavar="TOKENSxWIDTH", help="Of a caption's embedding in MDS.")
    ] = "77x1024",
    selection: Annotated[
        str | None, typer.Option(metavar="NAME", help="Corpus to MDS: these samples alone. Default: all.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Corpus to MDS: the text, and so the captions. Default: the only one."),
    ] = None,
    latents: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Corpus to MDS: give it once for each resolution. Default: all."),
    ] = None,
    compression: Annotated[
        str | None, typer.Option(metavar="zstd", help="Corpus to MDS: pack the shards. Default: plain, as official.")
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Shards at a time.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Take over what the official micro_diffusion code has encoded, or give it what is in a corpus.

    FROM says which way it goes. Nothing is encoded again, no model is loaded, and no network is needed. Stopped or
    killed, the same command goes on; the outcomes of all samples are counted at the end, and add up.

    **MDS to corpus.** FROM is what `precompute.py` wrote (columns `caption`, `caption_latents`, `latents_256`,
    `latents_512`, and `jpg` if you kept it), plain or packed with zstd, with one folder for each worker or one index
    for all. One source for each dataset: run it once for each, into one corpus. The files do not say which models
    made them: the paper's are taken (SDXL's autoencoder, of 16 channels Ostris', and DFN-CLIP-H) unless you name
    others. A file that is damaged is set aside; mend it, and the same command takes it again.

    **Corpus to MDS.** TO is a new folder, ready for `train.py` when `index.json` is in it. Samples that lack the
    text or a resolution are left out, and counted. Pictures stay: the official trainer reads none.

    **Examples**

    - `microdit convert datadir/cc12m/mds_latents_sdxl1_dfnclipH14/train my/corpus --source cc12m`

    - `microdit convert datadir/jdb/mds_latents_ostris/train my/other --source journeydb`

    - `microdit convert my/corpus my/mds --selection large`

    - `microdit convert s3://bucket/corpus my/mds --latents latents/sdxl-256 --text text/dfn-clip-h@long`
    """
    from microdit.pipeline.base.progress import shown

    shape = _parse_shape(text_shape)
    to_corpus = _ToCorpusOptions(source, captions, autoencoder, text_encoder, as_built, repair)
    to_mds = _ToMdsOptions(selection, text, latents, compression)
    with _stoppable(), shown() as progress:
        if _is_mds(origin):
            _refuse(to_mds, "FROM is a folder of MDS shards")
            summary: ImportSummary | ExportSummary = _to_corpus(
                Path(origin), target, to_corpus, shape, threads, progress
            )
        else:
            _refuse(to_corpus, "FROM is a corpus")
            summary = _to_mds(origin, target, to_mds, shape, threads, progress)
    print(printable_json(summary.to_json()) if as_json else printable("\n".join(summary.lines())))
    raise typer.Exit(summary.exit_status)


def _to_corpus(
    origin: Path,
    target: str,
    options: _ToCorpusOptions,
    shape: tuple[int, int],
    threads: int,
    progress: "Progress",
) -> "ImportSummary":
    """Convert MDS shards to a corpus."""
    from microdit.pipeline.mds.columns import Naming
    from microdit.pipeline.mds.to_corpus import to_corpus

    if options.source is None:
        raise RequestError("--source: name the samples, e.g. --source cc12m; it becomes part of every name")
    naming = Naming(
        options.source,
        options.captions or "source",
        options.autoencoder,
        options.text_encoder or "dfn-clip-h",
        shape,
        options.as_built,
    )
    return to_corpus(origin, target, naming, threads, progress, options.repair)


def _to_mds(
    origin: str,
    target: str,
    options: _ToMdsOptions,
    shape: tuple[int, int],
    threads: int,
    progress: "Progress",
) -> "ExportSummary":
    """Convert a corpus to MDS shards."""
    from microdit.pipeline.corpus.corpus import Corpus
    from microdit.pipeline.mds.from_corpus import plan_export, to_mds

    if "://" in target:
        raise RequestError(f"TO {target!r}: MDS is written to a folder of this machine; copy that folder then")
    if options.compression not in (None, "zstd"):
        raise RequestError(f"--compression {options.compression!r}: expected zstd")
    export = plan_export(
        Corpus.open(origin),
        selection=options.selection,
        text=options.text,
        latents=options.latents or (),
        text_shape=shape,
        compression="zstd" if options.compression else None,
    )
    return to_mds(export, Path(target).expanduser(), threads, progress)


def _is_mds(origin: str) -> bool:
    """Tell a folder of MDS shards from a corpus.

    Raises:
        RequestError: it is neither.
    """
    from microdit.pipeline.mds.format import is_mds
    from microdit.pipeline.storage.store import open_store

    if "://" in origin or open_store(origin).exists("corpus.json"):
        return False
    folder = Path(origin)
    if not folder.is_dir():
        raise RequestError(f"FROM {origin!r}: there is no such folder; expected MDS shards, or a corpus")
    if not is_mds(folder):
        raise RequestError(
            f"FROM {origin!r}: it is no corpus (there is no corpus.json), and no folder of MDS shards (there is no "
            "index.json in it, nor below it)"
        )
    return True


def _refuse(options: _ToCorpusOptions | _ToMdsOptions, because: str) -> None:
    """Raise RequestError if an option of the other direction was given."""
    given = [f"--{item.name.replace('_', '-')}" for item in fields(options) if getattr(options, item.name)]
    if given:
        raise RequestError(f"{', '.join(sorted(given))}: it is for the other way; {because}")


def _parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise RequestError(f"--text-shape {text!r}: expected tokens and width, as in 77x1024")
    return int(match[1]), int(match[2])


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the block as SIGINT does: shards in progress are finished, no other is begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from microdit.pipeline.base.signals import Stopped

    def stop(signum: int, frame: object) -> None:
        raise Stopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
