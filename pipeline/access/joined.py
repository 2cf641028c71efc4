"""Join columns by row: which shards and rows, and what each column says of a row.

    columns, selection --plan_join--> JoinedShard, one by one --read_joined--> JoinedRow, row by row
                                                              --ok_rows, read_row--> JoinedRow, in any order

A row is there if it is ok in every column that was asked for. Everything here can be pickled.
"""

import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, column_kind
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, read_rows
from microdit.pipeline.corpus.shard_files import SIDECAR
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.sample_index import selected_rows

ColumnValue = bytes | np.ndarray | str | dict[str, Any] | None


@dataclass(frozen=True)
class JoinedShard:
    """One shard of several columns. `rows` and `weights`: what a selection keeps of it; None keeps all, weight 1."""

    source: str
    shard: str
    commits: dict[str, Commit]
    rows: np.ndarray | None = None
    weights: np.ndarray | None = None

    def weight_by_row(self) -> dict[int, float] | None:
        """Map the kept rows to their weights; None keeps all."""
        if self.rows is None or self.weights is None:
            return None
        return dict(zip(self.rows.tolist(), self.weights.tolist(), strict=True))


@dataclass(frozen=True)
class JoinedRow:
    """One sample. `row["latents/sdxl-256"]` is what a column says of it.

    By the kind of the column that is

    images              the encoded picture, bytes; None where the sample came without one
    latents, text       float16 array (C, H, W), (tokens, width); quantised text as float16, too
    captions            the caption
    scores              a dictionary of the scorer's numbers; of `scores/embedding` a float16 array (width,)
    """

    source: str
    shard: str
    row: int
    key: str
    weight: float
    """Weight in the selection, relative to its other rows; 1 without one."""
    lines: Mapping[str, Mapping[str, Any]]
    """By column its line of the sidecar: the scalars of the images, for example `width` and `license`."""
    members: Mapping[str, Mapping[str, bytes]]
    """By column the files of its tar, by extension."""

    @property
    def id(self) -> str:
        """`source/key`, as in the view `samples`."""
        return f"{self.source}/{self.key}"

    def __getitem__(self, column: str) -> ColumnValue:
        line = self.lines[column]
        if column_kind(column) == "table":
            if column.startswith("captions/"):
                return str(line["caption"])
            return {name: value for name, value in line.items() if name not in SIDECAR.names}
        data = next(iter(self.members[column].values()))
        if column == IMAGES:
            return None if line["format"] is None else data
        return array_from_bytes(data)


def plan_join(corpus: Corpus, columns: str | Sequence[str], selection: str | None = None) -> list[JoinedShard]:
    """List the shards that all columns have, ordered by source and shard; of a selection those that it names.

    Args:
        selection: `name@hash`, or `name` if there is only one of that name.

    Raises:
        RequestError: as `newest_commits` and `load_selection`; or no column was named, or the columns share no shard.
    """
    names = [columns] if isinstance(columns, str) else list(dict.fromkeys(columns))
    if not names:
        raise RequestError(f"columns: none was named; corpus {corpus.url} has {', '.join(corpus.columns())}")
    commits = newest_commits(corpus, names)
    kept = None if selection is None else selected_rows(corpus, selection)
    shared = set.intersection(*(set(of) for of in commits.values()))
    wanted = sorted(shared if kept is None else shared & kept.keys())
    if not wanted:
        what = f"corpus {corpus.url}" if selection is None else f"selection {selection}"
        raise RequestError(f"{what} has no shard that is built in all of {', '.join(names)}")
    return [
        JoinedShard(*where, {name: of[where] for name, of in commits.items()}, *(kept[where] if kept else ()))
        for where in wanted
    ]


def read_joined(corpus: Corpus, shard: JoinedShard) -> Iterator[JoinedRow]:
    """Read the kept rows of a shard that are ok in all columns, in row order; every tar is read once, as a stream.

    Raises:
        RequestError: an object is missing or damaged, or the columns disagree about a row.
    """
    kept = shard.weight_by_row()
    streams = [_read_column(corpus, commit) for commit in shard.commits.values()]
    rows: dict[str, Row]
    for several in _aligned(shard, streams):
        first = several[0]
        if all(one.ok for one in several) and (kept is None or first.row in kept):
            rows = dict(zip(shard.commits, several, strict=True))
            yield JoinedRow(
                shard.source,
                shard.shard,
                first.row,
                first.key,
                1.0 if kept is None else kept[first.row],
                {column: row.scalars for column, row in rows.items()},
                {column: row.members for column, row in rows.items()},
            )


def _read_column(corpus: Corpus, commit: Commit) -> Iterator[Row]:
    with _faults_of(commit):
        yield from read_rows(corpus, commit)


def _aligned(shard: JoinedShard, streams: Sequence[Iterator[Row]]) -> Iterator[tuple[Row, ...]]:
    """Zip the columns of a shard, and refuse a row that has another key in one of them."""
    while True:
        several = [row for stream in streams if (row := next(stream, None)) is not None]
        if not several:
            return
        if len(several) != len(streams) or len({(row.row, row.key) for row in several}) > 1:
            raise RequestError(
                f"shard {shard.shard} of source {shard.source}: the columns {', '.join(shard.commits)} disagree about "
                f"row {several[0].row}; run `microdit verify`"
            )
        yield tuple(several)


@contextmanager
def _faults_of(commit: Commit) -> Iterator[None]:
    """Turn what a missing or damaged object raises into a RequestError that names it."""
    try:
        yield
    except RequestError:
        raise
    except (FileNotFoundError, tarfile.TarError, pa.ArrowException, ValueError) as error:
        raise RequestError(
            f"column {commit.column}, shard {commit.shard}: {commit.object.name} or its sidecar is missing or damaged "
            f"({first_line(error)}); run `microdit verify`, then `microdit build --repair`"
        ) from None


# -- in any order ------------------------------------------------------------------------------------------------------
def ok_rows(corpus: Corpus, shard: JoinedShard) -> tuple[np.ndarray, np.ndarray]:
    """Find the kept rows (int32) that are ok in all columns, and their weights (float32), from the sidecars alone.

    Raises:
        RequestError: as `read_joined`.
    """
    ok = np.logical_and.reduce(
        [pc.equal(_sidecar(corpus, commit)["status"], "ok").to_numpy() for commit in shard.commits.values()]
    )
    if shard.rows is None or shard.weights is None:
        rows = np.flatnonzero(ok).astype(np.int32)
        return rows, np.ones(len(rows), np.float32)
    use = (shard.rows < len(ok)) & ok[np.minimum(shard.rows, len(ok) - 1)]
    return shard.rows[use], shard.weights[use]


def _sidecar(corpus: Corpus, commit: Commit) -> pa.Table:
    with _faults_of(commit):
        return corpus.sidecar(commit)


class RowReader:
    """Read rows of shards in any order. The sidecars of the shards that were read last are kept in memory."""

    def __init__(self, corpus: Corpus, most_shards: int = 64):
        self.corpus, self.most_shards = corpus, most_shards
        self._sidecars: OrderedDict[str, pa.Table] = OrderedDict()

    def read(self, shard: JoinedShard, row: int, weight: float) -> JoinedRow:
        """Read one row that is ok in all columns; of each tar the sample's first member alone.

        Raises:
            RequestError: as `read_joined`.
        """
        lines: dict[str, dict[str, Any]] = {}
        members: dict[str, dict[str, bytes]] = {}
        for column, commit in shard.commits.items():
            with _faults_of(commit):
                lines[column] = line = self._sidecar(commit).slice(row, 1).to_pylist()[0]
                members[column] = {}
                if line["offset"] is not None:
                    data = self.corpus.store.get_range(commit.object.name, line["offset"], line["size"])
                    members[column] = {"": bytes(data)}
        key = next(iter(lines.values()))["key"]
        return JoinedRow(shard.source, shard.shard, row, key, weight, lines, members)

    def _sidecar(self, commit: Commit) -> pa.Table:
        name = commit.sidecar.name
        if name not in self._sidecars:
            self._sidecars[name] = self.corpus.sidecar(commit)
            while len(self._sidecars) > self.most_shards:
                self._sidecars.popitem(last=False)
        self._sidecars.move_to_end(name)
        return self._sidecars[name]
