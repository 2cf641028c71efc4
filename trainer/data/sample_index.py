"""Which samples a run trains on: the rows of a selection that are ok in every column that the run needs."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.trainer.recipe import Recipe

Where = tuple[str, str]  # source, shard


@dataclass(frozen=True)
class SampleIndex:
    """Samples by shard and row: `shard` (int32, N) counts in `shards`; ordered by source, shard and row."""

    shards: list[Where]
    shard: np.ndarray
    row: np.ndarray
    weight: np.ndarray | None = None
    """How often each comes, by the mean (float32, N); None if all come alike."""

    def __len__(self) -> int:
        return len(self.row)

    def name(self, i: int) -> str:
        source, shard = self.shards[self.shard[i]]
        return f"{source}/{shard}/{self.row[i]}"

    def by_shard(self) -> dict[Where, list[int]]:
        """The rows of each shard that has some; shards and rows ascend."""
        found: dict[Where, list[int]] = {}
        for shard, row in zip(self.shard.tolist(), self.row.tolist(), strict=True):
            found.setdefault(self.shards[shard], []).append(row)
        return found

    def take(self, keep: np.ndarray) -> "SampleIndex":
        """The samples at these positions, or where this is true."""
        weight = None if self.weight is None else self.weight[keep]
        return SampleIndex(self.shards, self.shard[keep], self.row[keep], weight)

    def mixed(self, mix: Mapping[str, float]) -> "SampleIndex":
        """The same samples, with weights multiplied by their source's in `mix`, 1 if it is not there.

        Raises:
            RequestError: `mix` names a source of which there is no sample.
        """
        sources = [source for source, _ in self.shards]
        present = {sources[number] for number in np.unique(self.shard).tolist()}
        if unknown := sorted(mix.keys() - present):
            raise RequestError(
                f"mix: there is no sample of {', '.join(unknown)}; the sources are {', '.join(sorted(present))}"
            )
        factor = np.array([mix.get(source, 1.0) for source in sources], dtype=np.float32)[self.shard]
        weight = factor if self.weight is None else self.weight * factor
        return replace(self, weight=None if (weight == weight[0]).all() else weight)

    def hashes(self, seed: int) -> np.ndarray:
        """One number (uint64) a sample, of nothing but the seed, its shard's name and its row."""
        starts = [
            int.from_bytes(hashlib.sha256(f"{seed}/{source}/{shard}".encode()).digest()[:8])
            for source, shard in self.shards
        ]
        return splitmix(self.row.astype(np.uint64), np.array(starts, dtype=np.uint64)[self.shard])

    def lowest(self, count: int, seed: int) -> np.ndarray:
        """Positions, ascending, of the `count` samples that a seed draws: those of the lowest hashes."""
        return np.sort(np.argsort(self.hashes(seed), kind="stable")[:count])

    @property
    def digest(self) -> str:
        """A hash of the samples, by name, and of their weights."""
        digest = hashlib.sha256()
        bounds = np.searchsorted(self.shard, np.arange(len(self.shards) + 1))
        for (source, shard), start, end in zip(self.shards, bounds, bounds[1:], strict=False):
            if end > start:
                digest.update(f"{source}/{shard}\n".encode() + self.row[start:end].astype("<i4").tobytes())
        if self.weight is not None:
            digest.update(self.weight.astype("<f4").tobytes())
        return digest.hexdigest()[:16]


def splitmix(number: np.ndarray, start: np.ndarray | np.uint64) -> np.ndarray:
    """The `number`-th outputs (uint64) of the generators splitmix64 that begin at `start`."""
    x = start + number * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def open_columns(corpus: Corpus, columns: Sequence[str]) -> dict[str, dict[Where, Commit]]:
    """The newest commits of columns, by shard.

    Raises:
        RequestError: a column is unknown, empty, or stale: what it was made from was made anew since.
    """
    commits: dict[str, dict[Where, Commit]] = {}
    waiting = list(columns)
    while waiting:  # the columns, what they were made from, and so on
        column = waiting.pop()
        if column not in commits:
            corpus.column(column)
            commits[column] = {(c.source, c.shard): c for c in corpus.commits(column)}
            waiting += sorted({ref.column for commit in commits[column].values() for ref in commit.inputs})
    hashes = {name: {where: c.sha256 for where, c in found.items()} for name, found in commits.items()}
    for column, found in commits.items():
        for where, commit in found.items():
            for ref in commit.inputs:
                if hashes[ref.column].get(where) != ref.sha256:
                    now = commits[ref.column].get(where)
                    raise RequestError(
                        f"column {column}, shard {where[1]}: it was made from generation {ref.generation} of "
                        f"{ref.column}, the corpus now has "
                        f"{'none' if now is None else f'generation {now.generation}'}; "
                        "run `microdit build --repair`, which makes it anew"
                    )
    for column in columns:
        if not commits[column]:
            raise RequestError(f"column {column}: corpus {corpus.url} has no shard of it; build it first")
    return {column: commits[column] for column in columns}


def index_samples(
    corpus: Corpus, columns: Mapping[str, Mapping[Where, Commit]], selection: str | None = None
) -> tuple[SampleIndex, int]:
    """The samples that are kept and ok in every column, and how many kept ones are not.

    Without a selection all rows of shards that every column has are kept.

    Raises:
        RequestError: no such selection, none of its samples can be had, or a sidecar cannot be read.
    """
    kept = None if selection is None else _selected_rows(corpus, selection)
    wanted = sorted(set.intersection(*(set(found) for found in columns.values())))
    if kept is not None:
        wanted = [where for where in wanted if where in kept]

    def usable(where: Where) -> tuple[np.ndarray, np.ndarray]:
        ok = np.logical_and.reduce([_ok_rows(corpus, found[where]) for found in columns.values()])
        if kept is None:
            return np.flatnonzero(ok), np.ones(ok.sum(), dtype=np.float32)
        rows, weights = kept[where]
        use = (rows < len(ok)) & ok[np.minimum(rows, len(ok) - 1)]
        return rows[use], weights[use]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(usable, wanted))
    sizes = [len(rows) for rows, _ in found]
    if not sum(sizes):
        what = f"selection {selection}" if selection else "the corpus"
        raise RequestError(f"{what} has no sample that is ok in all of {', '.join(columns)}")
    index = SampleIndex(
        wanted,
        np.repeat(np.arange(len(wanted), dtype=np.int32), sizes),
        np.concatenate([rows for rows, _ in found]).astype(np.int32),
        np.concatenate([weights for _, weights in found]),
    )
    missing = 0 if kept is None else sum(len(rows) for rows, _ in kept.values()) - len(index)
    return index.mixed({}), missing


def _ok_rows(corpus: Corpus, commit: Commit) -> np.ndarray:
    try:
        return pc.equal(corpus.sidecar(commit)["status"], "ok").to_numpy()
    except (FileNotFoundError, pa.ArrowException) as error:
        raise RequestError(
            f"column {commit.column}, shard {commit.shard}: {commit.sidecar.name} is missing or damaged "
            f"({first_line(error)}), so that nobody knows its samples; run `microdit verify`, then "
            "`microdit build --repair`"
        ) from None


def _selected_rows(corpus: Corpus, selection: str) -> dict[Where, tuple[np.ndarray, np.ndarray]]:
    """Rows and weights by shard."""
    from microdit.pipeline.selection.selections import load_selection  # it brings duckdb

    table = load_selection(corpus, selection)
    if not len(table):
        return {}
    # ordered by source, shard and row: a shard's rows lie together
    names = [table[name].combine_chunks() for name in ("source", "shard")]
    changes = np.logical_or.reduce([np.diff(n.dictionary_encode().indices.to_numpy()) != 0 for n in names])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    shards = zip(*(name.take(pa.array(starts)).to_pylist() for name in names), strict=True)
    rows, weights = (np.split(table[name].to_numpy(), starts[1:]) for name in ("row", "weight"))
    return dict(zip(shards, zip(rows, weights, strict=True), strict=True))


def split(indexes: Sequence[SampleIndex], hold_out: int, seed: int) -> tuple[list[SampleIndex], list[SampleIndex]]:
    """What each stage trains on, and what is held out of all of them: the `hold_out` lowest hashes of the last one.

    The second list has, for each stage, those of them that it could have trained on: all of them for the last stage.

    Raises:
        RequestError: nothing would be left to train on.
    """
    last = indexes[-1]
    hashes = last.hashes(seed)[last.lowest(hold_out, seed)]
    left, held = [], []
    for index in indexes:
        own = index.hashes(seed)
        apart = own <= hashes.max() if hold_out else np.zeros(len(index), dtype=bool)
        left.append(index.take(~apart) if hold_out else index)
        apart[apart] = np.isin(own[apart], hashes)
        held.append(index.take(apart))
        if not len(left[-1]):
            raise RequestError(f"hold_out: {hold_out} leaves nothing to train on of {len(last)} samples; lower it")
    return left, held


@dataclass(frozen=True)
class RunSamples:
    """The samples of a run: `stages[i]` is what stage i trains on, `held` what no stage does.

    `held_by_stage[i]`: those of `held` that stage i's latents column and selection have.
    """

    corpus: Corpus
    columns: dict[str, dict[Where, Commit]]
    stages: list[SampleIndex]
    held_by_stage: list[SampleIndex]
    missing: int
    """Samples of the selection that are not ok in every column of the last stage."""

    @property
    def held(self) -> SampleIndex:
        return self.held_by_stage[-1]


def open_samples(recipe: Recipe) -> RunSamples:
    """Raises RequestError if the corpus, a selection or a column is missing, stale or empty."""
    corpus = Corpus.open(recipe.corpus)
    columns = open_columns(corpus, list(dict.fromkeys([*(stage.latents for stage in recipe.stages), *recipe.text])))
    wanted = [(stage.latents, stage.selection or recipe.selection) for stage in recipe.stages]
    found = {
        (latents, selection): index_samples(
            corpus, {name: columns[name] for name in (latents, *recipe.text)}, selection
        )
        for latents, selection in dict.fromkeys(wanted)
    }
    stages, held = split([found[one][0] for one in wanted], recipe.hold_out, recipe.seed)
    return RunSamples(corpus, columns, [index.mixed(recipe.mix) for index in stages], held, found[wanted[-1]][1])


def read_captions(corpus: Corpus, text: str, index: SampleIndex) -> list[str]:
    """The captions that a text column was made of, of samples, in the index' order."""
    column = f"captions/{text.partition('@')[2]}"
    commits = open_columns(corpus, [column])[column]
    tables = {where: corpus.sidecar(commits[where])["caption"].to_pylist() for where in index.by_shard()}
    return [tables[where][row] for where, rows in index.by_shard().items() for row in rows]
