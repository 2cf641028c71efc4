"""`microdit verify`: read all that is committed, and name what is not as docs/reference/corpus.md promises."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import DamagedError, RequestError, first_line
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import (
    COLUMN,
    COMMIT,
    IMAGES,
    SOURCE,
    UNITS,
    ShardId,
    column_kind,
    commit_name,
)
from microdit.pipeline.corpus.records import Declaration, UnitCommit
from microdit.pipeline.corpus.retry_units import counts_taken_again
from microdit.pipeline.tables.corpus_totals import Counted, failed_twice
from microdit.pipeline.upkeep.problem import WARNINGS, Problem
from microdit.pipeline.upkeep.verify_shard import Findings, ShardCheck, key_hashes
from microdit.pipeline.upkeep.verify_tables import check_selections, check_tables


@dataclass(frozen=True)
class VerifiedSamples:
    """The samples of one column by its commits: `inputs = out + failed`."""

    inputs: int
    out: int
    failed: int


@dataclass(frozen=True)
class VerifiedTotals:
    """Totals of what was read; `open_units` were begun and are not complete, which is no problem."""

    shards: int
    commits: int
    units: int
    open_units: int
    bytes: int
    samples: dict[str, VerifiedSamples]
    """By column."""


@dataclass(frozen=True)
class VerifiedPart:
    """Part of a corpus to check: objects of these columns (none: all), one source, a share of its shards by a seed.

    Another seed draws other shards, so that runs with one after the other come to see all.
    """

    columns: list[str] = field(default_factory=list)
    source: str | None = None
    sample: float = 1.0
    seed: int = 0

    def refuse_unknown(self, columns: Collection[str], sources: Collection[str]) -> None:
        """Raise RequestError if a column or the source is not declared, or the share is none."""
        for what, names, known in (
            ("columns", self.columns, columns),
            ("source", [] if self.source is None else [self.source], sources),
        ):
            if unknown := [name for name in names if name not in known]:
                raise RequestError(
                    f"{what}: {', '.join(unknown)} is not declared; there are {', '.join(sorted(known))}"
                )
        if not 0 < self.sample <= 1:
            raise RequestError(f"sample: {self.sample:g} is no share; expected a number above 0, at most 1")

    def has(self, shard: ShardId) -> bool:
        """Tell whether a shard is drawn."""
        digest = hashlib.sha256(f"{self.seed}/{shard[0]}/{shard[1]}".encode()).digest()
        return self.source in (None, shard[0]) and int.from_bytes(digest[:8]) < self.sample * 2**64


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. `part`: what of the corpus was checked, None if all."""

    corpus: str
    problems: list[Problem]
    totals: VerifiedTotals
    part: VerifiedPart | None = None

    @property
    def ok(self) -> bool:
        return all(problem.kind in WARNINGS for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        samples = {
            column: {"in": count.inputs, "out": count.out, "failed": count.failed}
            for column, count in self.totals.samples.items()
        }
        part = {} if self.part is None else {"part": asdict(self.part)}
        return part | {
            "corpus": self.corpus,
            "ok": self.ok,
            "problems": [asdict(problem) for problem in self.problems],
            "totals": asdict(self.totals) | {"samples": samples},
        }


@dataclass
class _Newest:
    """The newest generations that are listed: of shards by column, and of units."""

    shards: dict[ShardId, dict[str, int]] = field(default_factory=dict)
    units: dict[ShardId, int] = field(default_factory=dict)

    def limit(self, part: VerifiedPart) -> None:
        """Leave out what a part does not have."""
        self.shards = {
            shard: of
            for shard, of in self.shards.items()
            if part.has(shard) and (not part.columns or not of.keys().isdisjoint(part.columns))
        }
        whole = part.sample == 1 and (not part.columns or IMAGES in part.columns)
        self.units = {unit: n for unit, n in self.units.items() if whole and part.source in (None, unit[0])}


Spread = Callable[
    [Callable[[ShardId], tuple[ShardId, Findings]], Iterable[ShardId]], Iterable[tuple[ShardId, Findings]]
]
"""Calls a function for each shard, many at once, and gives the results in any order; `threaded` is one."""


def verify(
    corpus: Corpus,
    progress: Callable[[int, int, int], None] | None = None,
    part: VerifiedPart | None = None,
    spread: Spread = threaded,
) -> Verification:
    """Check every newest commit: objects and checksums, rows, counts, members, keys, lineage, fingerprints, units.

    Every byte of the corpus is read. A build may go on meanwhile: what it adds is left for the next time.

    Args:
        progress: called with the number of shards that are done, of all, and the bytes that were read.
        part: what of the corpus is read: then no tables and selections, and units only where all their shards are.
        spread: what the shards are checked with.

    Raises:
        RequestError: `part` names a column or source that is not there.
    """
    problems: list[Problem] = []
    columns, sources = (_declarations(corpus, folder, problems) for folder in ("columns", "sources"))
    if part is not None:
        part.refuse_unknown(columns, sources)
    strays: list[Problem] = []
    newest = _newest_commits(corpus, columns, sources, strays)
    if part is None:
        problems += strays
    else:
        newest.limit(part)
    only = None if part is None or not part.columns else frozenset(part.columns)
    check = partial(_check_shard, corpus, newest.shards, columns, sources, only)
    checked: dict[ShardId, Findings] = {}
    read = 0
    for number, (shard, findings) in enumerate(spread(check, sorted(newest.shards)), 1):
        checked[shard] = findings
        read += findings.bytes
        if progress:
            progress(number, len(newest.shards), read)
    for shard in sorted(checked):
        problems += checked[shard].problems
    if part is None or part.sample == 1:
        _check_units(corpus, newest.units, checked, sources, problems)
    _check_keys(corpus, newest, checked, problems)
    if part is None:
        check_tables(corpus, problems)
        check_selections(corpus, problems)
    again = _count_retries(corpus, problems)
    had = _had_again(checked, again)
    problems = [each for each in problems if each.kind != "unrepaired" or each.what.rpartition(".json")[0] not in had]
    return Verification(corpus.url, problems, _totals(newest, checked, again), part)


def _check_shard(
    corpus: Corpus,
    generations: Mapping[ShardId, Mapping[str, int]],
    columns: Mapping[str, Declaration | None],
    sources: Mapping[str, Declaration | None],
    only: frozenset[str] | None,
    shard: ShardId,
) -> tuple[ShardId, Findings]:
    return shard, ShardCheck(corpus, shard, generations[shard], columns, sources, only).run()


def _newest_commits(
    corpus: Corpus,
    columns: Mapping[str, Declaration | None],
    sources: Mapping[str, Declaration | None],
    problems: list[Problem],
) -> _Newest:
    """List the commits, and keep the newest generation of each shard and column, and of each unit."""
    newest = _Newest()
    for item in corpus.store.list("commits"):
        match = COMMIT.fullmatch(item.name)
        if not match or (match[1] not in columns and match[1] != UNITS) or match[2] not in sources:
            problems.append(Problem("stray", item.name, "it is no commit of a declared column and source"))
            continue
        column, shard, generation = match[1], (match[2], match[3]), int(match[4])
        if column == UNITS:
            newest.units[shard] = max(newest.units.get(shard, 0), generation)
        else:
            of_shard = newest.shards.setdefault(shard, {})
            of_shard[column] = max(of_shard.get(column, 0), generation)
    return newest


def _totals(newest: _Newest, checked: Mapping[ShardId, Findings], again: Counted) -> VerifiedTotals:
    samples: dict[str, Counter[str]] = {}
    for findings in checked.values():
        for column, counts in findings.samples.items():
            samples.setdefault(column, Counter()).update(counts)
    for column, counts in samples.items():  # no input counts twice
        twice = failed_twice(
            again, {shard for shard, findings in checked.items() if column in findings.samples}, column
        )
        counts.subtract({"in": twice.total(), "failed": twice.total()})
    begun = {(source, findings.unit) for (source, _), findings in checked.items() if findings.unit}
    return VerifiedTotals(
        shards=sum(IMAGES in generations for generations in newest.shards.values()),
        commits=sum(findings.commits for findings in checked.values()),
        units=len(newest.units),
        open_units=len(begun - newest.units.keys()),
        bytes=sum(findings.bytes for findings in checked.values()),
        samples={
            column: VerifiedSamples(counts["in"], counts["out"], counts["failed"])
            for column, counts in sorted(samples.items())
        },
    )


def _declarations(corpus: Corpus, folder: str, problems: list[Problem]) -> dict[str, Declaration | None]:
    """Read all declarations of columns or sources; None for one that is damaged."""
    declarations: dict[str, Declaration | None] = {}
    valid = COLUMN if folder == "columns" else SOURCE
    for item in corpus.store.list(folder):
        name = item.name.removeprefix(f"{folder}/").removesuffix(".json")
        if not item.name.endswith(".json") or not valid.fullmatch(name):
            problems.append(Problem("declaration", item.name, "no declaration has such a name; nothing reads it"))
            continue
        try:
            declaration = corpus.column(name) if folder == "columns" else corpus.source(name)
            kind = column_kind(name) if folder == "columns" else "source"
            if (declaration.name, declaration.kind) != (name, kind):
                raise RequestError(f"it declares {declaration.name!r} of kind {declaration.kind!r}, expected {kind!r}")
        except RequestError as error:
            declarations[name] = None
            problems.append(Problem("declaration", item.name, str(error)))
        else:
            declarations[name] = declaration
    return declarations


def _check_units(
    corpus: Corpus,
    units: Mapping[ShardId, int],
    checked: Mapping[ShardId, Findings],
    sources: Mapping[str, Declaration | None],
    problems: list[Problem],
) -> None:
    """Compare every unit's commit with the shards that name the unit."""
    shards: dict[ShardId, set[str]] = {}
    for (source, shard), findings in checked.items():
        shards.setdefault((source, findings.unit), set()).add(shard)
    for (source, unit), generation in sorted(units.items()):
        name = commit_name(UNITS, source, unit, generation)
        try:
            record = UnitCommit.parse(corpus.store.get(name))
            if (record.source, record.unit, record.generation) != (source, unit, generation):
                raise ValueError(f"it is the commit of unit {record.unit!r} of {record.source!r}")
        except (ValueError, FileNotFoundError) as error:
            problems.append(Problem("unit", name, first_line(error)))
            continue
        except (OSError, BaseError) as error:
            problems.append(Problem("unreadable", name, first_line(error)))
            continue
        declaration = sources[source]
        if declaration is not None and record.fingerprint != declaration.fingerprint:
            detail = f"{record.fingerprint}, declared is {declaration.fingerprint}"
            problems.append(Problem("fingerprint", name, detail))
        committed = shards.get((source, unit), set())
        missing = [shard for shard in record.shards if shard not in committed]
        if any(corpus.store.exists(commit_name(IMAGES, source, shard, 0)) for shard in missing):
            continue  # completed since the listing
        extra = sorted(committed.difference(record.shards))
        total = sum(checked[source, shard].inputs for shard in record.shards if shard in committed)
        if missing or extra:
            detail = f"shards that are not committed: {missing}; that it does not name: {extra}"
            problems.append(Problem("unit", name, detail))
        elif total != record.inputs and set(record.shards) == committed:
            problems.append(Problem("unit", name, f"its shards have {total} inputs, it says {record.inputs}"))


def _had_again(checked: Mapping[ShardId, Findings], again: Counted) -> set[str]:
    """Name the commits of images, without their end, whose failed rows are all rows of retry units: none is lost."""
    taken: Counter[ShardId] = Counter()
    for (source, shard, by), reasons in again.items():
        if (source, by) in checked:
            taken[source, shard] += reasons.total()
    return {
        commit_name(IMAGES, *shard, generation).removesuffix(".json")
        for shard, count in taken.items()
        if shard in checked and count >= checked[shard].samples.get(IMAGES, Counter())["failed"]
        for generation in [checked[shard].generation]
    }


def _count_retries(corpus: Corpus, problems: list[Problem]) -> Counted:
    """Count the rows that retry units take again, by the records of their inputs."""
    try:
        return counts_taken_again(corpus)
    except (DamagedError, OSError, BaseError) as error:
        problems.append(Problem("retry", "units", first_line(error)))
        return {}


def _check_keys(corpus: Corpus, newest: _Newest, checked: Mapping[ShardId, Findings], problems: list[Problem]) -> None:
    """Find the keys that are there more than once among a source's images that are ok.

    Hashes of 8 bytes tell which keys may be: those alone are read again.
    """
    by_source: dict[str, dict[str, np.ndarray]] = {}
    for (source, shard), findings in sorted(checked.items()):
        if findings.key_hashes is not None:
            by_source.setdefault(source, {})[shard] = findings.key_hashes
            findings.key_hashes = None
    for source, hashes in by_source.items():
        ordered = np.concatenate(list(hashes.values()))
        ordered.sort()
        double = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(double):
            continue
        shards: dict[str, list[str]] = {}
        for shard, own in hashes.items():
            if np.isin(own, double).any():
                for key in _ok_keys(corpus, source, shard, newest.shards[source, shard][IMAGES], double):
                    shards.setdefault(key, []).append(shard)
        for key, where in shards.items():
            if len(where) > 1:
                problems.append(
                    Problem("keys", f"{IMAGES}/{source}", f"key {key!r} is in the shards {[*dict.fromkeys(where)]}")
                )


def _ok_keys(corpus: Corpus, source: str, shard: str, generation: int, hashes: np.ndarray) -> list[str]:
    """Read the keys of a shard's images that are ok and have one of these hashes."""
    try:
        sidecar = corpus.sidecar(corpus.commit(IMAGES, source, shard, generation))
    except (OSError, ValueError, BaseError):  # it was read a moment ago
        return []
    keys = sidecar["key"].filter(pc.equal(sidecar["status"], "ok")).combine_chunks()
    found: list[str] = keys.filter(pa.array(np.isin(key_hashes(keys), hashes))).to_pylist()
    return found
