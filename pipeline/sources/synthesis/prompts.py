"""Open the prompts that pictures are made from: prepared once into a Parquet file, and read by ranges."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.prompts import PromptsConfig
from microdit.pipeline.content.text_bytes import NotTextError, decode_text
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import RemoteFile, digest
from microdit.pipeline.files.scratch import make_scratch
from microdit.pipeline.sources.synthesis.prompt_choice import Blocklist, accepted, choose
from microdit.pipeline.sources.synthesis.prompt_corpus import CorpusPrompts
from microdit.pipeline.sources.synthesis.prompt_files import PromptFile
from microdit.pipeline.sources.synthesis.prompt_table import GROUP, write_prompts
from microdit.pipeline.sources.synthesis.prompt_tally import LeftOut, RawPrompts
from microdit.pipeline.sources.synthesis.prompt_templates import Templates

VERSION = 1
"""Of what is made of the same options."""
PREFIX = "microdit-prompts-"  # of names in the scratch folder
OLD_FILE, OLD_FOLDER = 30 * 86_400.0, 2 * 86_400.0  # seconds without use after which they are removed


@dataclass(frozen=True)
class Prompt:
    """A prompt, its 0-based place in the prompt source, and the values that the source has beside it."""

    text: str
    row: int
    fields: dict[str, str | int | float]


class Prompts:
    """Prompts in a prepared file. Picklable: copies open the file where they are read.

    Raises:
        RequestError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: pq.ParquetFile | None = None
        try:
            metadata = self._open().metadata.metadata
            self.identity: str = metadata[b"identity"].decode()
            """SHA-256 of the prompts, their places and their fields."""
            self.left_out: dict[str, int] = json.loads(metadata[b"left_out"])
            """Prompts of the source that were not taken, by reason."""
            self.examples: list[str] = json.loads(metadata[b"examples"])
            """The first few of those, with their reasons."""
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise RequestError(f"prepared prompts {path}: they cannot be read ({error}); remove that file") from None

    def __len__(self) -> int:
        return int(self._open().metadata.num_rows)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def read(self, start: int, stop: int) -> list[Prompt]:
        """Read the prompts from `start` to before `stop`."""
        start, stop = max(0, start), min(stop, len(self))
        if start >= stop:
            return []
        first = start // GROUP
        groups = list(range(first, (stop - 1) // GROUP + 1))
        table = self._open().read_row_groups(groups, use_threads=False).slice(start - first * GROUP, stop - start)
        columns = (table[name].to_pylist() for name in ("text", "row", "fields"))
        return [Prompt(text, row, json.loads(fields)) for text, row, fields in zip(*columns, strict=True)]

    def _open(self) -> pq.ParquetFile:
        if self._file is None:
            self._file = pq.ParquetFile(self.path)
        return self._file


def open_prompts(config: PromptsConfig, scratch: Path, what: str = "prompts") -> Prompts:
    """Open the prompts of a config; they are read and chosen once, and kept in `scratch` for the next time.

    Args:
        what: the block of the config, for messages.

    Raises:
        RequestError: they cannot be read, or none is left.
    """
    make_scratch(scratch)
    left = LeftOut()
    key, raw = _raw_prompts(config, scratch, what, left)
    blocklist = Blocklist(_entries(config.blocklist, f"{what}.blocklist"), what)
    options = config.model_dump(mode="json", exclude={"path", "corpus", "lists", "blocklist"})
    about = json.dumps([VERSION, key, options, blocklist.entries], sort_keys=True)
    _sweep(scratch)
    path = scratch / f"{PREFIX}{hashlib.sha256(about.encode()).hexdigest()[:32]}.parquet"
    if path.exists():
        path.touch()
    else:
        with TemporaryDirectory(dir=scratch, prefix=PREFIX) as folder:
            made = Path(folder) / "prompts.parquet"
            chosen = choose(accepted(raw, config, blocklist, left), config, Path(folder), left)
            write_prompts(made, chosen, left.counts, left.examples)
            made.replace(path)
    prompts = Prompts(path)
    if not len(prompts):
        counts = ", ".join(f"{count:,} {reason}" for reason, count in prompts.left_out.items())
        why = f"all are left out: {counts} ({'; '.join(prompts.examples)})" if counts else "it is empty"
        raise RequestError(f"{what}.{config.origin}: there is no prompt; {why}")
    return prompts


def _sweep(scratch: Path) -> None:
    """Remove prepared prompts that nobody has opened for long, and what killed builds left."""
    for path in scratch.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process was faster
            age = time.time() - path.stat().st_mtime
            if path.is_dir() and age > OLD_FOLDER:
                shutil.rmtree(path)
            elif age > OLD_FILE:
                path.unlink()


def _raw_prompts(config: PromptsConfig, scratch: Path, what: str, left: LeftOut) -> tuple[str, RawPrompts]:
    """Return what tells the source of the prompts from others on this machine, and its prompts."""
    if config.corpus is not None:
        corpus = CorpusPrompts(config, what)
        return corpus.version, corpus.read()
    if config.path is not None:
        files = list_files(config.path, f"{what}.path").files
        return digest((file.name, file.url, file.size, file.etag) for file in files), _of_files(
            files, config, scratch, what, left
        )
    lists = {name: _entries(given, f"{what}.lists.{name}") for name, given in config.lists.items()}
    templates = Templates(config.templates, lists, what, config.shuffle, config.limit)
    return json.dumps(lists, sort_keys=True), templates.read()


def _of_files(
    files: Iterable[RemoteFile], config: PromptsConfig, scratch: Path, what: str, left: LeftOut
) -> RawPrompts:
    row = 0
    for file in files:
        with local_copy(file, scratch) as path:
            prompts = PromptFile(path, file.name, f"{what}.path", config.column, config.fields, row, left)
            yield from prompts.read()
            row = prompts.next


def _entries(given: list[str] | str, what: str) -> list[str]:
    """Return the entries of a list, or read them from a text file with one a line.

    Raises:
        RequestError: the file cannot be read, or is empty.
    """
    if isinstance(given, list):
        return given
    try:
        lines = decode_text(Path(given).expanduser().read_bytes()).splitlines()
    except (OSError, NotTextError) as error:
        raise RequestError(
            f"{what} = {given!r}: it cannot be read as text ({error}); expected an entry a line"
        ) from None
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise RequestError(f"{what} = {given!r}: it is empty; expected an entry a line")
    return entries
