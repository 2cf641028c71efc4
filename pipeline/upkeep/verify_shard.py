"""Check one shard in all its columns for `verify`: its commits, their objects, rows and lineage."""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, KEY, ShardId, commit_name
from microdit.pipeline.corpus.records import UNREPAIRED, Commit, Declaration, ObjectRef
from microdit.pipeline.corpus.shard_files import RowCountError, read_table, sidecar_schema
from microdit.pipeline.upkeep.problem import Kind, Problem

BLOCK = 1 << 20


@dataclass
class Findings:
    """Findings of the check of one shard."""

    problems: list[Problem] = field(default_factory=list)
    samples: dict[str, Counter[str]] = field(default_factory=dict)
    """By column the counts of its commit."""
    bytes: int = 0
    commits: int = 0
    unit: str = ""
    """The unit that its images name."""
    inputs: int = 0
    """Its number of rows, by the commit of its images."""
    generation: int = 0
    """Of that commit."""
    key_hashes: np.ndarray | None = None
    """Of the keys of its images that are ok, 8 bytes each (uint64)."""


class ShardCheck:
    """Check one shard in all its columns.

    Args:
        shard: its source and name.
        generations: by column the newest generation that was listed.
        columns, sources: all declarations; None for one that is damaged.
        only: columns whose objects are read; None for all. Of the others the commits are, for the lineage.
    """

    def __init__(
        self,
        corpus: Corpus,
        shard: ShardId,
        generations: Mapping[str, int],
        columns: Mapping[str, Declaration | None],
        sources: Mapping[str, Declaration | None],
        only: Collection[str] | None = None,
    ):
        self.corpus, self.shard, self.columns, self.sources = corpus, shard, columns, sources
        self.only = only
        self.generations = dict(generations)
        self.findings = Findings()
        self.commits: dict[str, Commit] = {}
        self.hashes: dict[str, str] = {}  # of the commits' bytes
        self.sidecars: dict[str, pa.Table] = {}

    def run(self) -> Findings:
        """Check commits, then objects, then rows and lineage; once more if a build wrote newer commits meanwhile."""
        # images first: the other columns are compared with them
        for column in sorted(self.generations, key=lambda column: (column != IMAGES, column)):
            self._check_commit(column)
        asked = {name: commit for name, commit in self.commits.items() if self.only is None or name in self.only}
        for column, commit in asked.items():
            self._check_objects(column, commit)
            self._check_earlier(commit)
        for column, commit in asked.items():
            if column in self.sidecars:
                self._check_rows(column, commit, self.sidecars[column])
            self._check_lineage(column, commit)
        if self.findings.problems and (newest := self._newest_generations()) != self.generations:
            return ShardCheck(self.corpus, self.shard, newest, self.columns, self.sources, self.only).run()
        return self.findings

    def _add(self, kind: Kind, what: str, detail: str) -> None:
        self.findings.problems.append(Problem(kind, what, detail))

    def _newest_generations(self) -> dict[str, int]:
        """Ask the store for the newest generation of every declared column of this shard."""
        newest = {}
        for column in self.columns:
            generation = self.generations.get(column, -1)
            while self.corpus.store.exists(commit_name(column, *self.shard, generation + 1)):
                generation += 1
            if generation >= 0:
                newest[column] = generation
        return newest

    def _check_commit(self, column: str) -> None:
        """Read a column's commit; check its name, fingerprint, shard and unit."""
        name = commit_name(column, *self.shard, self.generations[column])
        try:
            data = self.corpus.store.get(name)
            self.hashes[column] = hashlib.sha256(data).hexdigest()
            commit = Commit.parse(data)
            if commit.name != name:
                raise ValueError(f"it is the commit {commit.name}")
        except (ValueError, FileNotFoundError) as error:
            self._add("commit", name, first_line(error))
            return
        except (OSError, BaseError) as error:
            self._add("unreadable", name, first_line(error))
            return
        self.commits[column] = commit
        if self.only is None or column in self.only:
            self.findings.commits += 1
            self.findings.samples[column] = Counter(commit.counts)
            self.findings.bytes += commit.size
        maker = self.sources[commit.source] if column == IMAGES else self.columns[column]
        if maker is not None and commit.fingerprint != maker.fingerprint:
            self._add("fingerprint", name, f"{commit.fingerprint}, declared is {maker.fingerprint}")
        if not (commit.shard.startswith(f"{commit.unit}-") and commit.unit.startswith(f"{commit.source}-")):
            self._add("commit", name, f"shard, unit {commit.unit!r} and source do not fit")
        if unrepaired := int(commit.timings.get(UNREPAIRED, 0)):
            self._add("unrepaired", name, f"{unrepaired} rows were damaged and could not be had again from the source")
        if column == IMAGES:
            self.findings.unit, self.findings.inputs = commit.unit, commit.counts.get("in", 0)
            self.findings.generation = commit.generation
        elif IMAGES in self.commits and commit.unit != self.commits[IMAGES].unit:
            self._add("commit", name, f"its unit is {commit.unit!r}, that of the images {self.findings.unit!r}")

    def _check_earlier(self, commit: Commit) -> None:
        """Find an earlier generation with more good rows whose object is still there: rows that a repair lost."""
        if commit.timings.get(UNREPAIRED, 0):  # named already
            return
        best: Commit | None = None
        for generation in range(commit.generation):
            try:
                earlier = self.corpus.commit(commit.column, *self.shard, generation)
                fewer = commit.counts["out"] < earlier.counts["out"]
                if fewer and (best is None or best.counts["out"] < earlier.counts["out"]):
                    best = earlier if self.corpus.store.exists(earlier.object.name) else best
            except (OSError, ValueError, BaseError):  # of a generation that does not count
                continue
        if best is not None:
            self._add(
                "fewer",
                commit.name,
                f"shard {commit.shard}: generation {commit.generation} has {commit.counts['out']:,} good rows, "
                f"generation {best.generation} had {best.counts['out']:,}, and its object {best.object.name} is still "
                "there",
            )

    # -- objects -----------------------------------------------------------------------------------------------------

    def _check_objects(self, column: str, commit: Commit) -> None:
        """Read and hash sidecar and data object; check the sidecar's schema and the tar's members."""
        data = self._read_object(commit.sidecar, lambda file: file.read())
        if data is not None:
            try:
                sidecar = read_table(data, commit.counts.get("in", -1))
                declaration = self.columns[column]
                wanted = sidecar_schema(declaration.scalars) if declaration else sidecar.schema
                fields = [(item.name, item.type) for item in sidecar.schema]
                if fields != [(item.name, item.type) for item in wanted]:
                    raise ValueError(f"its columns are {fields}")
                self.sidecars[column] = sidecar
            except RowCountError as error:
                self._add("counts", commit.sidecar.name, str(error))
            except (pa.ArrowException, ValueError, KeyError, OSError) as error:
                self._add("sidecar", commit.sidecar.name, first_line(error))
        if commit.object == commit.sidecar:
            return
        try:
            members = self._read_object(commit.object, tar_members)
        except ValueError as error:
            self._add("tar", commit.object.name, f"it is no tar: {first_line(error)}")
            return
        if members is not None and column in self.sidecars:
            self._check_members(commit, self.sidecars[column], members)

    def _read_object(self, ref: ObjectRef, read: Callable[[BinaryIO], Any]) -> Any:
        """Read and hash an object whole; returns what `read` returns, or None if size or checksum are wrong.

        Raises:
            ValueError: `read` raised it, and the object is as its commit says.
        """
        try:
            with self.corpus.store.open(ref.name) as file:
                hashing = Hashing(file)
                result, error = None, None
                try:
                    result = read(hashing)  # type: ignore[arg-type]
                except ValueError as caught:
                    error = caught
                hashing.drain()
        except FileNotFoundError:
            self._add("missing", ref.name, "the commit names this object, and it is not there")
            return None
        except (OSError, BaseError) as caught:
            self._add("unreadable", ref.name, first_line(caught))
            return None
        if hashing.size != ref.size:
            self._add("size", ref.name, f"{hashing.size} bytes, the commit says {ref.size}")
        elif hashing.digest.hexdigest() != ref.sha256:
            self._add("checksum", ref.name, f"{hashing.digest.hexdigest()}, the commit says {ref.sha256}")
        elif error is not None:
            raise error
        else:
            return result
        return None

    def _check_members(self, commit: Commit, sidecar: pa.Table, members: list[tuple[str, int, int]]) -> None:
        """Compare the members of a tar with the samples of its sidecar: names, order, offsets and sizes."""
        alive = sidecar.filter(pc.equal(sidecar["status"], "ok"))
        keys = alive["key"].to_pylist()
        spans = list(zip(alive["offset"].to_pylist(), alive["size"].to_pylist(), strict=True))
        names = [name for name, _, _ in members]
        first = names[0].partition(".")[0] if names else ""
        extensions = [name.partition(".")[2] for name in takewhile(lambda name: name.startswith(f"{first}."), names)]
        step = max(len(extensions), 1)
        wanted = [f"{key}.{extension}" for key in keys for extension in extensions]
        if len(names) != step * len(keys):
            detail = f"{len(names)} members, expected {step} of each of {len(keys)} samples"
        elif names != wanted:
            detail = next(f"it has {n!r}, expected {w!r}" for n, w in zip(names, wanted, strict=True) if n != w)
        elif [(offset, size) for _, offset, size in members[::step]] != spans:
            detail = "offsets and sizes of the samples are not those in the sidecar"
        else:
            return
        self._add("tar", commit.object.name, detail)

    # -- rows and lineage --------------------------------------------------------------------------------------------

    def _check_rows(self, column: str, commit: Commit, sidecar: pa.Table) -> None:
        """Check that a sidecar agrees with itself, with its commit's counts, and with the images' keys."""
        name, count = commit.sidecar.name, len(sidecar)

        def expect(condition: bool, kind: Kind, detail: str) -> None:
            if not condition:
                self._add(kind, name, detail)

        keys, alive = sidecar["key"].combine_chunks(), pc.equal(sidecar["status"], "ok")
        expect(sidecar["row"].to_pylist() == list(range(count)), "rows", f"its rows are not 0 to {count - 1}")
        states = set(pc.unique(sidecar["status"]).to_pylist())
        expect(states <= {"ok", "failed"}, "rows", f"the status is one of {sorted(map(str, states))}")
        failed = sidecar.filter(pc.equal(sidecar["status"], "failed"))
        reasons = Counter(failed["reason"].to_pylist())
        counts = {"in": count, "out": pc.sum(alive).as_py() or 0, "failed": len(failed)}
        expect(counts["in"] == counts["out"] + counts["failed"], "counts", f"{counts}: in is not out + failed")
        expect(commit.counts == counts, "counts", f"{counts}, the commit says {commit.counts}")
        expect(commit.reasons == reasons, "counts", f"reasons {dict(reasons)}, the commit says {commit.reasons}")
        expect(None not in reasons, "rows", "a failed row has no reason")
        expect(len(sidecar.filter(alive)["reason"].drop_null()) == 0, "rows", "a row that is ok has a reason")
        for column_name in ("offset", "size"):
            present = pc.is_valid(sidecar[column_name])
            expect(
                present.equals(alive) if commit.object != commit.sidecar else not pc.any(present).as_py(),
                "rows",
                f"{column_name} is there where there is no sample, or the other way round",
            )
        texts = keys.to_pylist()
        expect(all(KEY.fullmatch(key or "") for key in texts), "keys", "a key is not 1 to 80 of [A-Za-z0-9_-]")
        expect(len(set(texts)) == count, "keys", "a key is there twice")
        if column == IMAGES:
            expect(count <= self.corpus.shard_samples, "rows", f"{count} rows, at most {self.corpus.shard_samples}")
            self.findings.key_hashes = key_hashes(keys.filter(alive))
        elif IMAGES in self.sidecars:
            images = self.sidecars[IMAGES]["key"].combine_chunks()
            expect(keys.equals(images), "keys", f"its {count} keys are not those of the images ({len(images)})")

    def _check_lineage(self, column: str, commit: Commit) -> None:
        """Check that the inputs that a commit names are the newest ones, with the hash that they have."""
        if column != IMAGES and not commit.inputs:
            self._add("lineage", commit.name, "it names no inputs")
        for item in commit.inputs:
            newest = self.generations.get(item.column)
            wanted = commit_name(item.column, *self.shard, item.generation)
            if newest is None or item.generation > newest:
                self._add("lineage", commit.name, f"its input {wanted} is not there")
            elif item.generation < newest:
                self._add("stale", commit.name, f"it was made from {wanted}; generation {newest} is there")
            elif item.sha256 != self.hashes.get(item.column):
                self._add("lineage", commit.name, f"its input {wanted} has another hash now")
            elif column in self.sidecars and item.column in self.sidecars:
                self._check_inherited(column, commit, item.column)

    def _check_inherited(self, column: str, commit: Commit, upstream: str) -> None:
        """Check that the rows that failed in an input failed here for the reason `upstream`."""
        mine, theirs = self.sidecars[column], self.sidecars[upstream]
        if len(mine) != len(theirs):
            self._add("rows", commit.sidecar.name, f"{len(mine)} rows, its input {upstream} has {len(theirs)}")
            return
        reasons = mine.filter(pc.equal(theirs["status"], "failed"))["reason"]
        if pc.any(pc.fill_null(pc.not_equal(reasons, "upstream"), True)).as_py():
            self._add(
                "rows", commit.sidecar.name, f"a row that failed in {upstream} has another reason than `upstream`"
            )


def key_hashes(keys: pa.Array) -> np.ndarray:
    """Hash keys to 8 bytes each (uint64)."""
    digests = (hashlib.blake2b(str(key).encode(), digest_size=8).digest() for key in keys.to_pylist())
    return np.frombuffer(b"".join(digests), np.uint64)


class Hashing:
    """Hash a file while it is read once, in order."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        """Read what is left."""
        while self.read(BLOCK):
            pass


def tar_members(file: BinaryIO) -> list[tuple[str, int, int]]:
    """List name, offset and size in bytes of all members of a plain ustar, in order, forty times faster than `tarfile`.

    Raises:
        ValueError: it is no plain ustar, or it is cut.
    """
    members, position = [], 0
    while any(header := file.read(tarfile.BLOCKSIZE)):
        name = header[:100].rstrip(b"\0").decode()
        if len(header) < tarfile.BLOCKSIZE:
            raise ValueError(f"it is cut at {position + len(header)}")
        if header[257:262] != b"ustar" or header[156] not in b"0\0" or header[345]:
            raise ValueError(f"member {name[:100]!r} at {position} is no regular file of a plain ustar")
        size = int(header[124:136].rstrip(b" \0"), 8)
        padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if size < 0 or len(file.read(padded)) < padded:
            raise ValueError(f"member {name!r} at {position} is cut")
        position += tarfile.BLOCKSIZE
        members.append((name, position, size))
        position += padded
    if not header:
        raise ValueError(f"it ends at {position} without an empty block")
    return members
