"""A corpus: declarations, attempts and commits (docs/corpus.md). What this module promises is exactly-once."""

import hashlib
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from obstore.exceptions import BaseError
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import RequestError
from pipeline.shards import TarWriter, read_table, sha256_file, sidecar_table, write_table
from pipeline.store import Store

VERSION = 1
MAX_ATTEMPT_HOURS = 12
KEY = re.compile(r"[A-Za-z0-9_-]+")
COLUMN = re.compile(r"[A-Za-z0-9_.@-]+(/[A-Za-z0-9_.@-]+)?")
SOURCE = re.compile(r"[a-z0-9][a-z0-9_-]*")
RESERVED = {"units", "commits", "columns", "sources", "tables", "selections"}
UNITS = "units"


class Record(BaseModel):
    model_config = ConfigDict(frozen=True)

    def to_bytes(self) -> bytes:
        """The record as it is stored: JSON with sorted keys and no white space, so that its hash is well defined."""
        return canonical(self.model_dump(mode="json", by_alias=True))


class ShardRef(Record):
    """Which shard: its source, its unit and its name."""

    source: str
    unit: str
    shard: str


class Declaration(Record):
    """What a column or a source is made by. `scalars` maps the sidecar's own columns to type names."""

    name: str
    kind: str
    stage: dict[str, Any]
    scalars: dict[str, str] = {}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(canonical(self.stage)).hexdigest()


class ObjectRef(Record):
    name: str
    size: int
    sha256: str


class InputRef(Record):
    column: str
    generation: int
    sha256: str


class Commit(Record):
    """The record that makes an attempt the shard (docs/corpus.md, section 4)."""

    version: int = VERSION
    column: str
    source: str
    unit: str
    shard: str
    generation: int
    attempt: str
    object: ObjectRef
    sidecar: ObjectRef
    counts: dict[str, int]
    reasons: dict[str, int]
    fingerprint: str
    inputs: list[InputRef]
    timings: dict[str, float]
    host: str

    @property
    def name(self) -> str:
        return commit_name(self.column, self.source, self.shard, self.generation)

    @property
    def ref(self) -> ShardRef:
        return ShardRef(source=self.source, unit=self.unit, shard=self.shard)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def as_input(self) -> InputRef:
        return InputRef(column=self.column, generation=self.generation, sha256=self.sha256)


class UnitCommit(Record):
    """The record that all shards of a unit are committed; `inputs` is the unit's number of inputs."""

    version: int = VERSION
    source: str
    unit: str
    generation: int = 0
    inputs: int
    shards: list[str]
    fingerprint: str


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def column_kind(column: str) -> str:
    """`table` for captions and scores, `tar` for everything else."""
    return "table" if column.split("/")[0] in ("captions", "scores") else "tar"


def commit_name(column: str, source: str, shard: str, generation: int) -> str:
    return f"commits/{column}/{source}/{shard}.{generation}.json"


def unit_name(source: str, number: int) -> str:
    return f"{source}-{number:06d}"


def shard_name(unit: str, number: int) -> str:
    return f"{unit}-{number:02d}"


class Corpus:
    """A corpus at a root. `Corpus.create` makes or opens it, `Corpus.open` opens it. Picklable."""

    def __init__(self, store: Store, name: str, shard_samples: int):
        self.store, self.name, self.shard_samples = store, name, shard_samples
        self._declarations: dict[str, Declaration] = {}

    @property
    def url(self) -> str:
        return self.store.url

    @classmethod
    def create(cls, url: str | Path, name: str, shard_samples: int = 2048) -> "Corpus":
        """The corpus at `url`, made if there is none.

        Raises:
            RequestError: there is one that was made otherwise, or the root cannot be reached.
        """
        store = Store(url)
        about = {"name": name, "version": VERSION, "shard_samples": shard_samples, "format": "microdit-corpus"}
        try:
            store.create("corpus.json", canonical(about))
        except FileExistsError:
            corpus = cls.open(url)
            for field, wanted in (("name", name), ("shard_samples", shard_samples)):
                if (found := getattr(corpus, field)) != wanted:
                    raise RequestError(
                        f"corpus {url}: its {field} is {found!r}, the config says {wanted!r}; "
                        f"set {field} to {found!r}, or give another corpus folder"
                    ) from None
            return corpus
        except (BaseError, OSError) as error:
            raise RequestError(
                f"corpus {url}: it cannot be written: {_one_line(error)}; check the path and your rights"
            ) from error
        return cls(store, name, shard_samples)

    @classmethod
    def open(cls, url: str | Path) -> "Corpus":
        """The corpus at `url`.

        Raises:
            RequestError: there is none, it cannot be reached, or its `corpus.json` cannot be understood.
        """
        store = Store(url)
        try:
            data = store.get("corpus.json")
        except FileNotFoundError:
            raise RequestError(
                f"corpus {url}: there is no corpus.json; expected the root of a corpus that `microdit build` made"
            ) from None
        except (BaseError, OSError) as error:
            raise RequestError(f"corpus {url}: it cannot be reached: {_one_line(error)}") from error
        try:
            about = json.loads(data)
            version, name, shard_samples = about["version"], str(about["name"]), int(about["shard_samples"])
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"corpus {url}: corpus.json is damaged ({_one_line(error)}); restore it or begin a new corpus"
            ) from None
        if version != VERSION:
            raise RequestError(
                f"corpus {url}: its format version is {version!r}, this microdit reads {VERSION}; update microdit"
            )
        return cls(store, name, shard_samples)

    # -- declarations --------------------------------------------------------------------------------------------

    def declare_column(
        self, column: str, stage: Mapping[str, Any], scalars: Mapping[str, str] | None = None
    ) -> Declaration:
        """Declare what makes a column, once for ever.

        Raises:
            RequestError: the column is there and was made by something else; the message tells the difference.
        """
        if not COLUMN.fullmatch(column) or column.split("/")[0] in RESERVED:
            raise RequestError(
                f"column {column!r}: a name has one or two parts of [A-Za-z0-9_.@-], and is none of {sorted(RESERVED)}"
            )
        return self._declare(
            f"columns/{column}.json",
            Declaration(name=column, kind=column_kind(column), stage=dict(stage), scalars=dict(scalars or {})),
        )

    def declare_source(self, source: str, stage: Mapping[str, Any]) -> Declaration:
        """Declare a source; raises `RequestError` as `declare_column` does."""
        if not SOURCE.fullmatch(source):
            raise RequestError(
                f"source {source!r}: a name is lower-case letters, digits, - and _, and begins with no - or _"
            )
        return self._declare(f"sources/{source}.json", Declaration(name=source, kind="source", stage=dict(stage)))

    def _declare(self, name: str, wanted: Declaration) -> Declaration:
        wanted = Declaration.model_validate_json(wanted.to_bytes())  # as it will be read back
        try:
            self.store.create(name, wanted.to_bytes())
        except FileExistsError:
            found = self._declaration(name)
            if found.fingerprint != wanted.fingerprint or found.scalars != wanted.scalars:
                changes = "; ".join(differences(found.stage, wanted.stage)) or "its scalars differ"
                what = "source" if wanted.kind == "source" else "column"
                raise RequestError(
                    f"{what} {wanted.name!r} of corpus {self.url} was made otherwise: {changes}. "
                    f"Put the old value back, or give the {what} a new name"
                ) from None
            return found
        return wanted

    def _declaration(self, name: str) -> Declaration:
        if name not in self._declarations:
            self._declarations[name] = Declaration.model_validate_json(self.store.get(name))
        return self._declarations[name]

    def column(self, column: str) -> Declaration:
        """The declaration of a column.

        Raises:
            RequestError: there is no such column.
        """
        try:
            return self._declaration(f"columns/{column}.json")
        except FileNotFoundError:
            known = ", ".join(sorted(self.columns())) or "none"
            raise RequestError(f"column {column!r}: corpus {self.url} has no such column; it has: {known}") from None

    def source(self, source: str) -> Declaration:
        return self._declaration(f"sources/{source}.json")

    def columns(self) -> dict[str, Declaration]:
        return self._declared("columns")

    def sources(self) -> dict[str, Declaration]:
        return self._declared("sources")

    def _declared(self, folder: str) -> dict[str, Declaration]:
        names = sorted(item.name for item in self.store.list(folder))
        return {name.removeprefix(f"{folder}/").removesuffix(".json"): self._declaration(name) for name in names}

    # -- commits -------------------------------------------------------------------------------------------------

    def committed(self, column: str, source: str | None = None) -> dict[tuple[str, str], int]:
        """What is committed of a column, from one listing: {(source, shard): highest generation}."""
        prefix = f"commits/{column}/{source}" if source else f"commits/{column}"
        highest: dict[tuple[str, str], int] = {}
        for item in self.store.list(prefix):
            folder, _, file = item.name.rpartition("/")
            shard, generation, _ = file.rsplit(".", 2)
            # "captions" lists "captions/long" too: a commit's folder is exactly its column and source
            if folder.rpartition("/")[0] == f"commits/{column}":
                where = (folder.rpartition("/")[2], shard)
                highest[where] = max(highest.get(where, 0), int(generation))
        return highest

    def commit(self, column: str, source: str, shard: str, generation: int) -> Commit:
        """One commit, read.

        Raises:
            FileNotFoundError: there is none.
        """
        return Commit.model_validate_json(self.store.get(commit_name(column, source, shard, generation)))

    def commits(self, column: str, source: str | None = None) -> list[Commit]:
        """The commits of the highest generation of every shard of a column, ordered by source and shard."""
        found = sorted(self.committed(column, source).items())
        names = [commit_name(column, source, shard, generation) for (source, shard), generation in found]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda name: Commit.model_validate_json(self.store.get(name)), names))

    def units(self, source: str) -> dict[str, UnitCommit]:
        """The committed units of a source."""
        found = sorted(self.committed(UNITS, source).items())
        names = [commit_name(UNITS, source, unit, generation) for (_, unit), generation in found]
        with ThreadPoolExecutor(16) as pool:
            records = list(pool.map(lambda name: UnitCommit.model_validate_json(self.store.get(name)), names))
        return {record.unit: record for record in records}

    def commit_unit(self, source: str, unit: str, inputs: int, shards: Sequence[str]) -> UnitCommit:
        """Record that a unit is complete; a second worker that did the same finds the first one's record."""
        record = UnitCommit(
            source=source, unit=unit, inputs=inputs, shards=list(shards), fingerprint=self.source(source).fingerprint
        )
        name = commit_name(UNITS, source, unit, 0)
        try:
            self.store.create(name, record.to_bytes())
        except FileExistsError:
            return UnitCommit.model_validate_json(self.store.get(name))
        return record

    # -- reading a shard -----------------------------------------------------------------------------------------

    def sidecar(self, commit: Commit) -> pa.Table:
        """The sidecar of a commit: one line per row, in row order."""
        return read_table(self.store.get(commit.sidecar.name))

    def open_object(self, commit: Commit) -> BinaryIO:
        """The data object of a commit, as a binary file."""
        return self.store.open(commit.object.name)

    # -- writing a shard -----------------------------------------------------------------------------------------

    @contextmanager
    def attempt(
        self, column: str, ref: ShardRef, inputs: Iterable[Commit] = (), generation: int = 0
    ) -> Iterator["Attempt"]:
        """Begin one try to write one shard of one column; what is not committed when the block ends is dropped."""
        declaration = self.column(column)
        maker = self.source(ref.source) if column == "images" else declaration
        with ExitStack() as stack:
            yield Attempt(self, declaration, ref, [c.as_input() for c in inputs], generation, maker.fingerprint, stack)


class Attempt:
    """One try to write one shard of one column: `add` or `fail` every row, then `commit`. Made by `Corpus.attempt`."""

    def __init__(
        self,
        corpus: Corpus,
        declaration: Declaration,
        ref: ShardRef,
        inputs: list[InputRef],
        generation: int,
        fingerprint: str,
        stack: ExitStack,
    ):
        self.corpus, self.declaration, self.ref = corpus, declaration, ref
        self.inputs, self.generation, self.fingerprint = inputs, generation, fingerprint
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(4).hex()}"
        self.rows: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._stack = stack
        base = f"{declaration.name}/{ref.source}/{ref.shard}.{self.id}"
        self._tar: TarWriter | None = None
        if declaration.kind == "tar":
            self._object_name, self._sidecar_name = f"{base}.tar", f"{base}.rows.parquet"
            self._object_path = stack.enter_context(corpus.store.scratch(self._object_name))
            self._tar = TarWriter(self._object_path)
            stack.callback(self._tar.close)
        else:
            self._object_name = self._sidecar_name = f"{base}.parquet"
        self._sidecar_path = stack.enter_context(corpus.store.scratch(self._sidecar_name))

    def add(self, row: int, key: str, members: Mapping[str, bytes] | None = None, **scalars: Any) -> None:
        """A sample that succeeded: its tar members, `{extension: bytes}` (none in a table), and its scalars.

        Raises:
            ValueError: the key has other characters than `[A-Za-z0-9_-]`.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"key {key!r}: expected letters, digits, - and _ only")
        line: dict[str, Any] = {"row": row, "key": key, "status": "ok", **scalars}
        if self._tar is not None:
            assert members, f"column {self.declaration.name} is a tar: sample {key} needs members"
            line["offset"], line["size"] = self._tar.add(key, members)
        self.rows.append(line)

    def fail(self, row: int, key: str, reason: str, detail: str = "", **scalars: Any) -> None:
        """A sample that failed: a short code to group by, and one line for a person."""
        detail = " ".join(detail.split())[:500]
        self.rows.append({"row": row, "key": key, "status": "failed", "reason": reason, "detail": detail, **scalars})

    def commit(self, **timings: float) -> Commit:
        """Publish the objects, then write the commit.

        If another attempt was faster, its commit is returned and our objects are removed.

        Args:
            timings: seconds and counts worth keeping; `seconds`, from the attempt's beginning, is added if absent.

        Raises:
            ValueError: a row is missing or double, or the attempt is older than 12 hours.
        """
        store = self.corpus.store
        table = sidecar_table(self.rows, self.declaration.scalars)
        write_table(self._sidecar_path, table)
        sidecar = ObjectRef(
            name=self._sidecar_name, size=self._sidecar_path.stat().st_size, sha256=sha256_file(self._sidecar_path)
        )
        data = sidecar
        if self._tar is not None:
            self._tar.close()
            data = ObjectRef(
                name=self._object_name, size=self._object_path.stat().st_size, sha256=sha256_file(self._object_path)
            )
            store.publish(self._object_name, self._object_path)
        store.publish(self._sidecar_name, self._sidecar_path)
        age = time.monotonic() - self._began
        if age > MAX_ATTEMPT_HOURS * 3600:
            raise ValueError(
                f"attempt {self.id} of {self.ref.shard} is {age / 3600:.1f} hours old, "
                f"at most {MAX_ATTEMPT_HOURS} are allowed"
            )
        reasons = Counter(row["reason"] for row in self.rows if row["status"] == "failed")
        failed = sum(reasons.values())
        record = Commit(
            column=self.declaration.name,
            **self.ref.model_dump(),
            generation=self.generation,
            attempt=self.id,
            object=data,
            sidecar=sidecar,
            counts={"in": len(self.rows), "out": len(self.rows) - failed, "failed": failed},
            reasons=dict(reasons),
            fingerprint=self.fingerprint,
            inputs=self.inputs,
            timings={"seconds": round(age, 3)} | {k: round(float(v), 3) for k, v in timings.items()},
            host=socket.gethostname(),
        )
        try:
            store.create(record.name, record.to_bytes())
        except FileExistsError:
            winner = self.corpus.commit(record.column, record.source, record.shard, record.generation)
            if winner.attempt != self.id:  # ours, if the answer to our first request was lost and it was sent again
                store.delete(sorted({data.name, sidecar.name}))
            return winner
        return record


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """What two nested dictionaries differ in, in words: `options.quality: the corpus has 90, the config says 95`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(found.keys() | wanted.keys())
            for line in differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if found == wanted else [f"{path}: the corpus has {found!r}, the config says {wanted!r}"]


def _one_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


__all__ = [
    "Attempt",
    "Commit",
    "Corpus",
    "Declaration",
    "ShardRef",
    "UnitCommit",
    "ValidationError",
    "shard_name",
    "unit_name",
]
