"""`microdit verify`, one shard in all its columns: its commits, their objects, rows and lineage."""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import KEY, commit_name
from microdit.pipeline.corpus.records import Commit, Declaration, ObjectRef
from microdit.pipeline.corpus.shard_files import read_table, sidecar_schema

BLOCK = 1 << 20
Where = tuple[str, str]  # source and shard


@dataclass
class Findings:
    """What was found in one shard, or in all."""

    problems: list[dict[str, str]] = field(default_factory=list)
    samples: dict[str, Counter[str]] = field(default_factory=dict)
    bytes: int = 0
    commits: int = 0
    unit: str = ""  # of one shard: the unit that its images name,
    inputs: int = 0  # the number of its rows,
    keys: pa.Array | None = None  # and the keys of its images that are ok

    def problem(self, kind: str, what: str, detail: str) -> None:
        self.problems.append({"kind": kind, "what": what, "detail": detail})


class ShardCheck:
    """One shard in all its columns."""

    def __init__(
        self,
        corpus: Corpus,
        where: Where,
        generations: Mapping[str, int],
        columns: Mapping[str, Declaration | None],
        sources: Mapping[str, Declaration | None],
    ):
        self.corpus, self.where, self.columns, self.sources = corpus, where, columns, sources
        self.generations = dict(generations)
        self.found = Findings()
        self.commits: dict[str, Commit] = {}
        self.hashes: dict[str, str] = {}  # of the commits' bytes
        self.sidecars: dict[str, pa.Table] = {}

    def run(self) -> Findings:
        # `images` first: the other columns are compared with it
        for column in sorted(self.generations, key=lambda column: (column != "images", column)):
            self._commit(column)
        for column, commit in self.commits.items():
            self._objects(column, commit)
        for column, commit in self.commits.items():
            if column in self.sidecars:
                self._rows(column, commit, self.sidecars[column])
            self._lineage(column, commit)
        if self.found.problems and (newer := self._newest()) != self.generations:
            # a build went on since the listing: look at what is there now
            return ShardCheck(self.corpus, self.where, newer, self.columns, self.sources).run()
        return self.found

    def _newest(self) -> dict[str, int]:
        newest = {}
        for column in self.columns:
            generation = self.generations.get(column, -1)
            while self.corpus.store.exists(commit_name(column, *self.where, generation + 1)):
                generation += 1
            if generation >= 0:
                newest[column] = generation
        return newest

    def _commit(self, column: str) -> None:
        name = commit_name(column, *self.where, self.generations[column])
        try:
            data = self.corpus.store.get(name)
            self.hashes[column] = hashlib.sha256(data).hexdigest()
            commit = Commit.parse(data)
            if commit.name != name:
                raise ValueError(f"it is the commit {commit.name}")
        except (ValueError, OSError, BaseError) as error:
            self.found.problem("commit", name, first_line(error))
            return
        self.commits[column] = commit
        self.found.commits += 1
        self.found.samples[column] = Counter(commit.counts)
        self.found.bytes += sum({ref.name: ref.size for ref in (commit.object, commit.sidecar)}.values())
        maker = self.sources[commit.source] if column == "images" else self.columns[column]
        if maker is not None and commit.fingerprint != maker.fingerprint:
            self.found.problem("fingerprint", name, f"{commit.fingerprint}, declared is {maker.fingerprint}")
        if not (commit.shard.startswith(f"{commit.unit}-") and commit.unit.startswith(f"{commit.source}-")):
            self.found.problem("commit", name, f"shard, unit {commit.unit!r} and source do not fit")
        if column == "images":
            self.found.unit, self.found.inputs = commit.unit, commit.counts.get("in", 0)
        elif "images" in self.commits and commit.unit != self.commits["images"].unit:
            self.found.problem("commit", name, f"its unit is {commit.unit!r}, that of the images {self.found.unit!r}")

    # -- objects -----------------------------------------------------------------------------------------------------

    def _objects(self, column: str, commit: Commit) -> None:
        data = self._whole(commit.sidecar, lambda file: file.read())
        if data is not None:
            try:
                sidecar = read_table(data)
                declaration = self.columns[column]
                wanted = sidecar_schema(declaration.scalars) if declaration else sidecar.schema
                fields = [(item.name, item.type) for item in sidecar.schema]
                if fields != [(item.name, item.type) for item in wanted]:
                    raise ValueError(f"its columns are {fields}")
                self.sidecars[column] = sidecar
            except (pa.ArrowException, ValueError, KeyError, OSError) as error:
                self.found.problem("sidecar", commit.sidecar.name, first_line(error))
        if commit.object == commit.sidecar:
            return
        try:
            members = self._whole(commit.object, tar_members)
        except ValueError as error:
            self.found.problem("tar", commit.object.name, f"it is no tar: {first_line(error)}")
            return
        if members is not None and column in self.sidecars:
            self._members(commit, self.sidecars[column], members)

    def _whole(self, ref: ObjectRef, read: Callable[[BinaryIO], Any]) -> Any:
        """What `read` makes of an object whose size and checksum are right; None if they are not.

        Raises:
            Exception: what `read` raises on an object that is right.
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
            self.found.problem("missing", ref.name, "the commit names this object, and it is not there")
            return None
        except (OSError, BaseError) as caught:
            self.found.problem("unreadable", ref.name, first_line(caught))
            return None
        if hashing.size != ref.size:
            self.found.problem("size", ref.name, f"{hashing.size} bytes, the commit says {ref.size}")
        elif hashing.digest.hexdigest() != ref.sha256:
            self.found.problem("checksum", ref.name, f"{hashing.digest.hexdigest()}, the commit says {ref.sha256}")
        elif error is not None:
            raise error
        else:
            return result
        return None

    def _members(self, commit: Commit, sidecar: pa.Table, members: list[tuple[str, int, int]]) -> None:
        alive = sidecar.filter(pc.equal(sidecar["status"], "ok"))
        keys = alive["key"].to_pylist()
        places = list(zip(alive["offset"].to_pylist(), alive["size"].to_pylist(), strict=True))
        names = [name for name, _, _ in members]
        first = names[0].partition(".")[0] if names else ""
        extensions = [name.partition(".")[2] for name in takewhile(lambda name: name.startswith(f"{first}."), names)]
        step = max(len(extensions), 1)
        wanted = [f"{key}.{extension}" for key in keys for extension in extensions]
        if len(names) != step * len(keys):
            detail = f"{len(names)} members, expected {step} of each of {len(keys)} samples"
        elif names != wanted:
            detail = next(f"it has {n!r}, expected {w!r}" for n, w in zip(names, wanted, strict=True) if n != w)
        elif [(offset, size) for _, offset, size in members[::step]] != places:
            detail = "offsets and sizes of the samples are not those in the sidecar"
        else:
            return
        self.found.problem("tar", commit.object.name, detail)

    # -- rows and lineage --------------------------------------------------------------------------------------------

    def _rows(self, column: str, commit: Commit, sidecar: pa.Table) -> None:
        name, count = commit.sidecar.name, len(sidecar)

        def expect(condition: bool, kind: str, detail: str) -> None:
            if not condition:
                self.found.problem(kind, name, detail)

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
        for place in ("offset", "size"):
            there = pc.is_valid(sidecar[place])
            expect(
                there.equals(alive) if commit.object != commit.sidecar else not pc.any(there).as_py(),
                "rows",
                f"{place} is there where there is no sample, or the other way round",
            )
        texts = keys.to_pylist()
        expect(all(KEY.fullmatch(key or "") for key in texts), "keys", "a key is not 1 to 80 of [A-Za-z0-9_-]")
        expect(len(set(texts)) == count, "keys", "a key is there twice")
        if column == "images":
            expect(count <= self.corpus.shard_samples, "rows", f"{count} rows, at most {self.corpus.shard_samples}")
            self.found.keys = keys.filter(alive)
        elif "images" in self.sidecars:
            images = self.sidecars["images"]["key"].combine_chunks()
            expect(keys.equals(images), "keys", f"its {count} keys are not those of the images ({len(images)})")

    def _lineage(self, column: str, commit: Commit) -> None:
        if column != "images" and not commit.inputs:
            self.found.problem("lineage", commit.name, "it names no inputs")
        for item in commit.inputs:
            newest = self.generations.get(item.column)
            wanted = commit_name(item.column, *self.where, item.generation)
            if newest is None or item.generation > newest:
                self.found.problem("lineage", commit.name, f"its input {wanted} is not there")
            elif item.generation < newest:
                self.found.problem("stale", commit.name, f"it was made from {wanted}; generation {newest} is there")
            elif item.sha256 != self.hashes.get(item.column):
                self.found.problem("lineage", commit.name, f"its input {wanted} has another hash now")
            elif column in self.sidecars and item.column in self.sidecars:
                self._inherited(column, commit, item.column)

    def _inherited(self, column: str, commit: Commit, upstream: str) -> None:
        mine, theirs = self.sidecars[column], self.sidecars[upstream]
        if len(mine) != len(theirs):
            self.found.problem("rows", commit.sidecar.name, f"{len(mine)} rows, its input {upstream} has {len(theirs)}")
            return
        reasons = mine.filter(pc.equal(theirs["status"], "failed"))["reason"]
        if pc.any(pc.fill_null(pc.not_equal(reasons, "upstream"), True)).as_py():
            self.found.problem(
                "rows", commit.sidecar.name, f"a row that failed in {upstream} has another reason than `upstream`"
            )


class Hashing:
    """A file that is read once, in order, and hashed on the way."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        while self.read(BLOCK):
            pass


def tar_members(file: BinaryIO) -> list[tuple[str, int, int]]:
    """Name, offset and size of all members of a plain ustar, in order; `tarfile` takes forty times as long.

    Raises:
        ValueError: it is something else.
    """
    found, position = [], 0
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
        found.append((name, position, size))
        position += padded
    if not header:
        raise ValueError(f"it ends at {position} without an empty block")
    return found
