"""`microdit convert CORPUS MDS`: a corpus as the folder of MDS shards that the official micro_diffusion trainer reads.

`pipeline.mds.columns` says which column becomes which. Each shard of the corpus becomes a sub-folder, which appears as
a whole or not at all, and in the end one index names the shards of all of them: as the official precompute does it with
a folder for each of its workers. `convert.json` says what the folder is made of: the same request goes on with it, any
other one is refused.
"""

import fcntl
import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.fail_points import fail_point
from microdit.pipeline.base.progress import Progress
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, ShardId
from microdit.pipeline.corpus.records import Commit, Declaration, canonical
from microdit.pipeline.mds.columns import CAPTION, DOWNSAMPLE, TEXT
from microdit.pipeline.mds.format import INDEX, SIZE_LIMIT, MdsWriter, merged_index
from microdit.pipeline.mds.progress import ConversionProgress
from microdit.pipeline.mds.summary import ExportSummary
from microdit.pipeline.selection.sample_index import selected_rows
from microdit.pipeline.storage.disk import sync
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.tables.commit_table import commit_table, totals

REQUEST, COUNTS = "convert.json", "counts.json"
UNFINISHED = ".unfinished-"
HASHES = ("sha256",)


@dataclass(frozen=True)
class Export:
    """The part of a corpus that is written."""

    corpus: Corpus
    captions: str
    fields: dict[str, str]
    """MDS column to column of arrays."""
    shapes: dict[str, tuple[int, ...]]
    """MDS column to the shape of a sample's array."""
    commits: dict[str, dict[ShardId, Commit]]
    """By column."""
    shards: list[ShardId]
    """In the order of the MDS index."""
    rows: dict[ShardId, np.ndarray] | None
    """The rows of each shard; None for all of them."""
    compression: Literal["zstd"] | None

    @property
    def columns(self) -> list[str]:
        """The columns that a sample must be in, in the order in which they are computed."""
        return [IMAGES, self.captions, *self.fields.values()]


@dataclass(frozen=True)
class ShardCounts:
    """Samples of one shard: `inputs` = `out` + those that were `left_out`; MDS shards, and their `size` in bytes."""

    inputs: int
    out: int
    left_out: Mapping[str, int]
    """By the column and reason for it."""
    mds_shards: int
    size: int

    def to_bytes(self) -> bytes:
        """Encode as `counts.json`."""
        return canonical(
            {
                "in": self.inputs,
                "out": self.out,
                "left_out": self.left_out,
                "mds_shards": self.mds_shards,
                "bytes": self.size,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> "ShardCounts":
        """Decode `counts.json`."""
        counts = json.loads(data)
        return cls(counts["in"], counts["out"], counts["left_out"], counts["mds_shards"], counts["bytes"])


# -- planning an export ----------------------------------------------------------------------------------------------
def plan_export(
    corpus: Corpus,
    *,
    selection: str | None = None,
    text: str | None = None,
    latents: Sequence[str] = (),
    text_shape: tuple[int, int] = (77, 1024),
    compression: Literal["zstd"] | None = None,
) -> Export:
    """Choose the columns, shards and rows of a corpus to write.

    Args:
        selection: `name` or `name@hash`; None takes every sample.
        text, latents: columns; without them the corpus has one text column, and latents of one autoencoder.
        text_shape: what the official trainer reshapes every text to.

    Raises:
        RequestError: a column or selection is not there, is stale, or is of a shape that the official trainer cannot
            read.
    """
    declared = corpus.columns()
    fields = {TEXT: _choose_text(declared, text)} | _choose_latents(declared, latents)
    captions = f"captions/{fields[TEXT].partition('@')[2]}"
    used = [IMAGES, captions, *fields.values()]
    counted = totals(commit_table(corpus))
    for column in used:
        corpus.column(column)
        if stale := sum(counts.stale for (name, _), counts in counted.items() if name == column):
            raise RequestError(
                f"column {column}: {stale} shards were made from what was made again since; `microdit build --repair` "
                "makes them again"
            )
    commits = {column: {(c.source, c.shard): c for c in corpus.commits(column)} for column in used}
    rows = None if selection is None else _unweighted(corpus, selection)
    shards = sorted(commits[IMAGES] if rows is None else rows)
    shapes = {name: _shape(corpus, column, commits[column], shards) for name, column in fields.items()}
    if shapes[TEXT] != text_shape:
        raise RequestError(
            f"column {fields[TEXT]} has texts of {shapes[TEXT]} (tokens, width), but the official trainer reshapes all "
            f"of them to {text_shape}: take a text column that has all positions, as dfn-clip-h has, or give the "
            "--text-shape that you train with"
        )
    for name, column in fields.items():
        side = 0 if name == TEXT else int(corpus.column(column).made_by["resolution"]) // DOWNSAMPLE
        if side and (len(shapes[name]) != 3 or shapes[name][1:] != (side, side)):
            raise RequestError(
                f"column {column} has latents of {shapes[name]}, but the official trainer takes (channels, {side}, "
                f"{side}): those of an autoencoder that reduces sides by {DOWNSAMPLE}"
            )
    return Export(corpus, captions, fields, shapes, commits, shards, rows, compression)


def _choose_text(declared: Mapping[str, Declaration], text: str | None) -> str:
    available = sorted(column for column in declared if column.startswith("text/"))
    chosen = [text] if text else available
    if len(chosen) != 1 or chosen[0] not in available:
        what = f"--text {text}: there is no such column" if text else "--text: say which text the samples get"
        raise RequestError(f"{what}; the corpus has {', '.join(available) or 'no text column'}")
    return chosen[0]


def _choose_latents(declared: Mapping[str, Declaration], latents: Sequence[str]) -> dict[str, str]:
    """Choose the columns of latents, by their MDS names."""
    available = sorted(column for column in declared if column.startswith("latents/"))
    if unknown := sorted(set(latents) - set(available)):
        raise RequestError(f"--latents {unknown[0]}: there is no such column; the corpus has {', '.join(available)}")
    fields: dict[str, str] = {}
    autoencoders = set()
    for column in latents or available:
        made_by = declared[column].made_by
        if not isinstance(made_by.get("resolution"), int):
            raise RequestError(f"column {column}: its declaration says no resolution, so it cannot be named for MDS")
        fields.setdefault(f"latents_{made_by['resolution']}", column)
        autoencoders.add(str(made_by.get("autoencoder")))
    if not fields or len(fields) < len(set(latents or available)) or len(autoencoders) > 1:
        raise RequestError(
            "--latents: say which latents the samples get, of one autoencoder, at most one of each resolution; the "
            f"corpus has {', '.join(available) or 'none'}"
        )
    return dict(sorted(fields.items(), key=lambda item: (len(item[0]), item[0])))


def _unweighted(corpus: Corpus, selection: str) -> dict[ShardId, np.ndarray]:
    """Read the rows of a selection by shard, and refuse weights."""
    selected = selected_rows(corpus, selection)
    if any((weights != 1).any() for _, weights in selected.values()):
        raise RequestError(f"selection {selection} has weights, which MDS cannot hold; select without weights")
    return {shard_id: rows for shard_id, (rows, _) in selected.items()}


def _shape(
    corpus: Corpus, column: str, commits: Mapping[ShardId, Commit], shards: Sequence[ShardId]
) -> tuple[int, ...]:
    """Read the shape of the first array of a column."""
    for shard_id in shards:
        if shard_id in commits and commits[shard_id].counts["out"]:
            commit = commits[shard_id]
            line = next(line for line in corpus.sidecar(commit).to_pylist() if line["status"] == "ok")
            data = corpus.store.get_range(commit.object.name, line["offset"], line["size"])
            return _array(commit, line["row"], data).shape
    raise RequestError(f"column {column}: corpus {corpus.url} has no sample of it; build it first")


def _array(commit: Commit, row: int, data: bytes) -> np.ndarray:
    try:
        return array_from_bytes(data)
    except ValueError as error:
        raise RequestError(
            f"column {commit.column}, shard {commit.shard}, row {row}: {commit.object.name} is damaged ({error}); run "
            "`microdit verify`, then `microdit build --repair`"
        ) from error


# -- writing the folder ----------------------------------------------------------------------------------------------
def to_mds(export: Export, folder: Path, threads: int = 4, progress: Progress | None = None) -> ExportSummary:
    """Write the folder, or go on with it.

    Args:
        threads: shards at a time; each holds up to 256 MiB.

    Raises:
        RequestError: the folder has something else in it, another run writes to it, or an object of the corpus is
            damaged.
    """
    with _begun(export, folder):
        return _go_on(export, folder, threads, progress)


def _go_on(export: Export, folder: Path, threads: int, progress: Progress | None) -> ExportSummary:
    """Write the shards that are not in the folder yet, then the index, and add up the counts of all."""
    began = time.monotonic()
    names = [shard for _, shard in export.shards]
    todo = [shard_id for shard_id in export.shards if not (folder / shard_id[1]).is_dir()]
    reporter = ConversionProgress(progress, began, len(names), len(names) - len(todo), threads)
    reporter.begin()
    for counts in threaded(partial(_write_shard, export, folder), todo, threads):
        reporter.add(counts.out, sum(counts.left_out.values()), counts.size)
    store = open_store(folder)
    if not store.exists(INDEX):
        fail_point("indexing")
        store.create(INDEX, merged_index(folder, names))
    written = [ShardCounts.parse((folder / name / COUNTS).read_bytes()) for name in names]
    left_out = Counter[str]()
    for counts in written:
        left_out.update(counts.left_out)
    return ExportSummary(
        corpus=export.corpus.url,
        folder=str(folder),
        columns={CAPTION: export.captions, **export.fields},
        shards=len(names),
        mds_shards=sum(counts.mds_shards for counts in written),
        inputs=sum(counts.inputs for counts in written),
        out=sum(counts.out for counts in written),
        left_out=dict(left_out.most_common()),
        written=reporter.samples,
        seconds=round(time.monotonic() - began, 3),
    )


@contextmanager
def _begun(export: Export, folder: Path) -> Iterator[None]:
    """Lock the folder, which is new or was begun for the same export, and remove what a killed run left in it."""
    request = _request(export)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is no folder; give a new one")
    store = open_store(folder)
    other = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if other and not store.exists(REQUEST) and next(store.list(), None) is not None:
        raise RequestError(f"{folder} has something in it ({other[0]}); give a new folder, nothing is overwritten")
    try:
        store.create(REQUEST, request)
    except FileExistsError:
        if store.get(REQUEST) != request:
            raise RequestError(
                f"{folder} was begun with other samples, columns or options ({REQUEST} in it tells which; the corpus "
                "may have grown since); give a new folder, or remove that one"
            ) from None
    with (folder / REQUEST).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        except BlockingIOError:
            raise RequestError(f"{folder}: another microdit is writing to it; wait for it, or stop it") from None
        for path in folder.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(path)
        yield


def _request(export: Export) -> bytes:
    """Encode what a folder is made of: equal requests write equal folders."""
    digest = hashlib.sha256()
    for shard_id in export.shards:
        rows = None if export.rows is None else export.rows[shard_id].tolist()
        hashes = [
            export.commits[column][shard_id].sha256 for column in export.columns if shard_id in export.commits[column]
        ]
        digest.update(canonical([*shard_id, hashes, rows]) + b"\n")
    return canonical(
        {
            "version": 1,
            "made_of": digest.hexdigest(),
            "columns": {CAPTION: export.captions, **export.fields},
            "stages": {column: export.corpus.column(column).made_by for column in export.columns},
            "shapes": export.shapes,
            "compression": export.compression,
            "size_limit": SIZE_LIMIT,
        }
    )


def _write_shard(export: Export, folder: Path, shard_id: ShardId) -> ShardCounts:
    """Write one shard's sub-folder: MDS shards, their index, and the counts."""
    partial_folder = Path(tempfile.mkdtemp(prefix=f"{shard_id[1]}{UNFINISHED}", dir=folder))
    try:
        counts = _write_samples(export, partial_folder, shard_id)
        (partial_folder / COUNTS).write_bytes(counts.to_bytes())
        partial_folder.chmod(0o755)
        for path in (partial_folder / COUNTS, partial_folder):
            sync(path)
        fail_point("moving")
        partial_folder.rename(folder / shard_id[1])
        sync(folder)
        return counts
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _write_samples(export: Export, folder: Path, shard_id: ShardId) -> ShardCounts:
    """Write the samples of one shard that are whole, and count the others by what they lack."""
    corpus = export.corpus
    commits = {column: by_shard[shard_id] for column, by_shard in export.commits.items() if shard_id in by_shard}
    lines = {column: corpus.sidecar(commit).to_pylist() for column, commit in commits.items()}
    count = max(map(len, lines.values()), default=0)
    rows = range(count) if export.rows is None else export.rows[shard_id].tolist()
    columns = {CAPTION: "str", **dict.fromkeys(export.fields, "bytes")}
    left_out: Counter[str] = Counter()
    out = 0
    writer = MdsWriter(folder, columns, export.compression, HASHES)
    with ExitStack() as stack:
        files = {
            column: stack.enter_context(corpus.open_object(commits[column]))
            for column in export.fields.values()
            if column in commits
        }
        for row in rows:
            fault = next((f for column in export.columns if (f := _fault(lines.get(column), column, row))), "")
            sample = {} if fault else {CAPTION: lines[export.captions][row]["caption"].encode()}
            for name, column in export.fields.items() if not fault else ():
                line = lines[column][row]
                files[column].seek(line["offset"])
                array = _array(commits[column], row, files[column].read(line["size"]))
                if array.dtype != np.float16 or array.shape != export.shapes[name]:
                    fault = f"{column}: wrong_size"
                    break
                sample[name] = np.ascontiguousarray(array, "<f2").tobytes()
            if fault:
                left_out[fault] += 1
            else:
                writer.write(sample)
                out += 1
    writer.close()
    mds_files = [path for path in folder.iterdir() if path.name != INDEX]
    size = sum(path.stat().st_size for path in mds_files)
    return ShardCounts(inputs=len(rows), out=out, left_out=left_out, mds_shards=len(mds_files), size=size)


def _fault(lines: Sequence[Mapping[str, Any]] | None, column: str, row: int) -> str:
    """Name the reason why a row of a column cannot be written; empty if it can."""
    if lines is None or row >= len(lines):
        return f"{column}: not_made"
    return "" if lines[row]["status"] == "ok" else f"{column}: {lines[row]['reason']}"
