"""The samples of a training run: what each leg trains on and what no leg does, made once for all processes.

    commit table --> commits, hash --> kept on this machine? --mapped--> RunSamples
                                       else: status table, selections --> indexes --> kept

All of it is a function of the commits, the selections and what is asked, whose hash names what is kept.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import ShardId
from microdit.pipeline.corpus.records import Commit, canonical
from microdit.pipeline.selection.lineage import CommitOf, newest_commit_lines
from microdit.pipeline.selection.mapped_arrays import Arrays, Made, open_or_make
from microdit.pipeline.selection.sample_index import SampleIndex, join_samples, lowest, selected_rows, shared_shards
from microdit.pipeline.tables.status_table import ShardStatus, read_statuses

LAYOUT = 1
FitCheck = Callable[[Mapping[str, Sequence[int]]], None]
"""Told by column the bytes of each shard that a leg reads; may refuse."""


@dataclass(frozen=True)
class AskedSamples:
    """Request of a run to a corpus: latents column and selection of each leg, text columns, and the held-out share."""

    legs: list[tuple[str, str | None]]
    text: list[str]
    hold_out: int
    seed: int
    mix: dict[str, float]


class StoredCommits(Mapping[ShardId, Commit]):
    """The commits of a column, decoded when they are asked for. `sizes`: bytes of each one's objects."""

    def __init__(self, shards: Sequence[ShardId], ends: np.ndarray, data: np.ndarray, sizes: np.ndarray):
        self._numbers = {shard: number for number, shard in enumerate(shards)}
        self._ends, self._data, self.sizes = ends, data, sizes

    def __getitem__(self, shard: ShardId) -> Commit:
        number = self._numbers[shard]
        start = int(self._ends[number - 1]) if number else 0
        return Commit.parse(self._data[start : int(self._ends[number])].tobytes())

    def __iter__(self) -> Iterator[ShardId]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def commit_sizes(commits: Mapping[ShardId, Commit]) -> np.ndarray:
    """Return the bytes of each commit's objects."""
    return commits.sizes if isinstance(commits, StoredCommits) else np.array([c.size for c in commits.values()])


@dataclass(frozen=True)
class RunSamples:
    """The samples of a run: `legs[i]` is what leg i trains on, `held` what no leg does.

    `held_by_leg[i]`: those of `held` that leg i's latents column and selection have.
    """

    corpus: Corpus
    columns: Mapping[str, StoredCommits]
    """Of the shards that a leg reads."""
    legs: list[SampleIndex]
    held_by_leg: list[SampleIndex]
    missing: int
    """Samples of the selection that are not ok in every column of the last leg."""
    longest: dict[str, int | None]
    """By text column the most tokens of a row of its shards, None where it does not say."""

    @property
    def held(self) -> SampleIndex:
        return self.held_by_leg[-1]


def split(indexes: Sequence[SampleIndex], hold_out: int, seed: int) -> tuple[list[SampleIndex], list[SampleIndex]]:
    """Split off what is held out of all legs: the `hold_out` lowest hashes of the last one.

    Returns what each leg trains on and, for each leg, those held out that it could have trained on: all of them for the
    last leg.

    Raises:
        RequestError: nothing would be left to train on.
    """
    last = indexes[-1]
    of_last = last.hashes(seed)
    hashes = of_last[lowest(of_last, hold_out)]
    done: dict[int, tuple[SampleIndex, SampleIndex]] = {}  # legs that share an index share what is made of it
    for index in indexes:
        if id(index) in done:
            continue
        own = of_last if index is last else index.hashes(seed)
        apart = own <= hashes.max() if hold_out else np.zeros(len(index), dtype=bool)
        left = index.take(~apart) if hold_out else index
        apart[apart] = np.isin(own[apart], hashes)
        done[id(index)] = left, index.take(apart)
        if not len(left):
            raise RequestError(f"hold_out: {hold_out} leaves nothing to train on of {len(last)} samples; lower it")
    return [done[id(index)][0] for index in indexes], [done[id(index)][1] for index in indexes]


def samples_key(corpus: Corpus, asked: AskedSamples, lines: Mapping[str, Mapping[ShardId, CommitOf]]) -> str:
    """Hash what the samples are a function of."""
    commits = {
        column: hashlib.sha256("".join(f"{of.name} {of.sha256}\n" for of in own.values()).encode()).hexdigest()
        for column, own in lines.items()
    }
    about = {"layout": LAYOUT, "corpus": corpus.url, "commits": commits, "asked": asdict(asked)}
    return hashlib.sha256(canonical(about)).hexdigest()


def prepare_samples(corpus: Corpus, asked: AskedSamples, folder: Path, check: FitCheck) -> tuple[str, AskedSamples]:
    """Make the samples of a run and keep them in a folder of this machine, if they are not there.

    Returns what `map_samples` takes in other processes. `check` is asked before anything is read of a shard.

    Raises:
        RequestError: selection or column is missing, stale or empty, or a sidecar cannot be read.
    """
    from microdit.pipeline.selection.selections import find_selection  # it brings duckdb

    names = {name: find_selection(corpus, name) for _, name in asked.legs if name is not None}
    asked = AskedSamples(**asdict(asked) | {"legs": [(column, names.get(name or "")) for column, name in asked.legs]})
    lines, listed = newest_commit_lines(corpus, [*dict.fromkeys([*(leg[0] for leg in asked.legs), *asked.text])])
    key = samples_key(corpus, asked, lines)
    open_or_make(folder, key, lambda: _make(corpus, asked, lines, listed, check))
    return key, asked


def map_samples(corpus: Corpus, key: str, asked: AskedSamples, folder: Path) -> RunSamples:
    """Map the samples that `prepare_samples` keeps; on another machine they are made again, by one of its processes.

    Raises:
        RequestError: as `prepare_samples`; or the corpus has changed meanwhile.
    """

    def make() -> Made:
        columns = [*dict.fromkeys([*(leg[0] for leg in asked.legs), *asked.text])]
        lines, listed = newest_commit_lines(corpus, columns)
        if samples_key(corpus, asked, lines) != key:
            raise RequestError(f"corpus {corpus.url}: it changes while the processes of the run begin; begin again")
        return _make(corpus, asked, lines, listed, lambda _: None)

    about, arrays = open_or_make(folder, key, make)
    indexes = [
        SampleIndex(
            [(source, shard) for source, shard in shards],
            arrays[f"shard-{number}"],
            arrays[f"row-{number}"],
            arrays.get(f"weight-{number}"),
        )
        for number, shards in enumerate(about["shards"])
    ]
    columns = {
        column: StoredCommits(
            [(source, shard) for source, shard in shards],
            *(arrays[f"{name}-{number}"] for name in ("ends", "commits", "sizes")),
        )
        for number, (column, shards) in enumerate(about["columns"])
    }
    legs, held = ([indexes[number] for number in about[name]] for name in ("legs", "held"))
    return RunSamples(corpus, columns, legs, held, about["missing"], about["longest"])


def _make(
    corpus: Corpus,
    asked: AskedSamples,
    lines: Mapping[str, Mapping[ShardId, CommitOf]],
    listed: Mapping[str, str],
    check: FitCheck,
) -> Made:
    """Make the indexes of a run; `lines` are the newest commits of its columns, `listed` all of the corpus."""
    selected = {name: selected_rows(corpus, name) for _, name in asked.legs if name is not None}
    shards: dict[str, set[ShardId]] = {column: set() for column in lines}
    for latents, name in dict.fromkeys(asked.legs):
        columns = {column: lines[column] for column in (latents, *asked.text)}
        own = shared_shards(columns, None if name is None else selected[name])
        check({column: [of[shard].size for shard in own] for column, of in columns.items()})
        for column in columns:
            shards[column].update(own)
    wanted = {lines[column][shard].name: lines[column][shard].sha256 for column, own in shards.items() for shard in own}
    statuses = read_statuses(corpus, dict(sorted(wanted.items())), listed)

    def status(column: str, shard: ShardId) -> ShardStatus:
        return statuses[lines[column][shard].name]

    joined = {
        (latents, name): join_samples(
            {column: lines[column] for column in (latents, *asked.text)},
            lambda column, shard: status(column, shard).ok,
            name,
            None if name is None else selected[name],
        )
        for latents, name in dict.fromkeys(asked.legs)
    }
    legs, held = split([joined[leg][0] for leg in asked.legs], asked.hold_out, asked.seed)
    mixed = {id(index): index.mixed(asked.mix) for index in legs}
    about: dict[str, Any] = {"missing": joined[asked.legs[-1]][1], "columns": [], "shards": []}
    arrays: Arrays = {}
    about["legs"] = _add_indexes([mixed[id(index)] for index in legs], about["shards"], arrays)
    about["held"] = _add_indexes(held, about["shards"], arrays)
    about["longest"] = {
        column: max((n for shard in shards[column] if (n := status(column, shard).longest) is not None), default=None)
        for column in asked.text
    }
    for number, (column, own_shards) in enumerate(shards.items()):
        ordered = sorted(own_shards)
        records = [status(column, shard).commit for shard in ordered]
        about["columns"].append([column, ordered])
        arrays[f"ends-{number}"] = np.cumsum([len(record) for record in records], dtype=np.int64)
        arrays[f"commits-{number}"] = np.frombuffer(b"".join(records), np.uint8)
        arrays[f"sizes-{number}"] = np.array([lines[column][shard].size for shard in ordered], np.int64)
    return about, arrays


def _add_indexes(indexes: Sequence[SampleIndex], shards: list[list[ShardId]], arrays: Arrays) -> list[int]:
    """Add the arrays of indexes, each once; return their numbers."""
    numbers: dict[int, int] = {}
    for index in indexes:
        if id(index) in numbers:
            continue
        numbers[id(index)] = number = len(shards)
        shards.append(index.shards)
        arrays |= {f"shard-{number}": index.shard, f"row-{number}": index.row}
        if index.weight is not None:
            arrays[f"weight-{number}"] = index.weight
    return [numbers[id(index)] for index in indexes]
