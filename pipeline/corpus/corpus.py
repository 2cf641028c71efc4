"""Read a corpus: its declarations, commits and shards (docs/reference/corpus.md). `attempt` writes."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from sys import intern
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import DamagedError, RequestError, first_line
from microdit.pipeline.corpus.names import (
    COLUMN,
    COMMIT,
    RESERVED,
    SOURCE,
    UNITS,
    ShardId,
    column_kind,
    commit_name,
)
from microdit.pipeline.corpus.records import (
    VERSION,
    Commit,
    Declaration,
    Record,
    UnitCommit,
    canonical,
)
from microdit.pipeline.corpus.shard_files import (
    SCALAR_TYPES,
    SIDECAR,
    ColumnTypeError,
    RowCountError,
    check_types,
    open_table,
)
from microdit.pipeline.storage.store import Store, open_store

R = TypeVar("R", bound=Record)


class MadeOtherwiseError(RequestError):
    """A column or source was declared with other options; `changes` says which."""

    def __init__(self, what: str, name: str, url: str, changes: str, why: str = ""):
        super().__init__(
            f"{what} {name!r} of corpus {url} was made otherwise: {changes}. {why and f'{why}. '}"
            f"Put the old value back, or give the {what} a new name"
        )
        self.changes = changes


class Corpus:
    """A corpus, for reading and declaring; `Corpus.create` makes or opens it, `Corpus.open` opens it. Picklable."""

    def __init__(self, store: Store, name: str, shard_samples: int):
        self.store, self.name, self.shard_samples = store, name, shard_samples
        self._declarations: dict[str, Declaration] = {}

    @property
    def url(self) -> str:
        return self.store.url

    @classmethod
    def create(cls, url: str | Path, name: str, shard_samples: int = 2048) -> "Corpus":
        """Open the corpus at `url`, or make it if there is none.

        Raises:
            RequestError: there is one of another name or shard size, the root cannot be reached, or its storage does
                not let exactly one of two writers win.
        """
        store = open_store(url)
        about = {"name": name, "version": VERSION, "shard_samples": shard_samples, "format": "microdit-corpus"}
        try:
            store.check_exclusive()
            store.create("corpus.json", canonical(about))
        except FileExistsError:
            corpus = cls.open(url)
            for field, wanted in (("name", name), ("shard_samples", shard_samples)):
                if (present := getattr(corpus, field)) != wanted:
                    raise RequestError(
                        f"corpus {url}: its {field} is {present!r}, the config says {wanted!r}; "
                        f"set {field} to {present!r}, or give another corpus folder"
                    ) from None
            return corpus
        except (BaseError, OSError) as error:
            raise RequestError(
                f"corpus {url}: it cannot be written: {first_line(error)}; check the path and your rights"
            ) from error
        return cls(store, name, shard_samples)

    @classmethod
    def open(cls, url: str | Path) -> "Corpus":
        """Open the corpus at `url`.

        Raises:
            RequestError: there is none, it cannot be reached, or its `corpus.json` cannot be understood.
        """
        store = open_store(url)
        try:
            data = store.get("corpus.json")
        except FileNotFoundError:
            raise RequestError(
                f"corpus {url}: there is no corpus.json; expected the root of a corpus that `microdit build` made"
            ) from None
        except (BaseError, OSError) as error:
            raise RequestError(f"corpus {url}: it cannot be reached: {first_line(error)}") from error
        try:
            about = json.loads(data)
            version, name, shard_samples = about["version"], about["name"], about["shard_samples"]
            if not isinstance(name, str) or type(shard_samples) is not int or not 1 <= shard_samples < 2**31:
                raise ValueError(f"name is {name!r:.80}, shard_samples {shard_samples!r:.80}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RequestError(
                f"corpus {url}: corpus.json is damaged ({first_line(error)}); restore it or begin a new corpus"
            ) from None
        if version != VERSION:
            raise RequestError(
                f"corpus {url}: its format version is {version!r:.80}, this microdit reads {VERSION}; update microdit"
            )
        return cls(store, name, shard_samples)

    # -- declarations --------------------------------------------------------------------------------------------

    def declare_column(
        self, column: str, made_by: Mapping[str, Any], scalars: Mapping[str, str] | None = None
    ) -> Declaration:
        """Declare what makes a column, once for ever.

        Raises:
            RequestError: the column was declared with other options; the message lists the differences.
        """
        if not COLUMN.fullmatch(column) or column.split("/")[0] in RESERVED:
            raise RequestError(
                f"column {column!r}: a name has one or two parts of [A-Za-z0-9_.@-] that begin with no dot, "
                f"and is none of {sorted(RESERVED)}"
            )
        for scalar, kind in (scalars or {}).items():
            if kind not in SCALAR_TYPES or scalar in SIDECAR.names:
                raise ValueError(
                    f"column {column!r}: scalar {scalar!r} of type {kind!r}: types are {sorted(SCALAR_TYPES)}, "
                    f"names are other than {SIDECAR.names}"
                )
        return self._declare(
            f"columns/{column}.json",
            Declaration(name=column, kind=column_kind(column), stage=dict(made_by), scalars=dict(scalars or {})),
        )

    def declare_source(self, source: str, made_by: Mapping[str, Any]) -> Declaration:
        """Declare a source; raises `RequestError` as `declare_column` does."""
        if not SOURCE.fullmatch(source):
            raise RequestError(
                f"source {source!r}: a name is lower-case letters, digits, - and _, and begins with no - or _"
            )
        return self._declare(f"sources/{source}.json", Declaration(name=source, kind="source", stage=dict(made_by)))

    def _declare(self, name: str, wanted: Declaration) -> Declaration:
        wanted = Declaration.parse(wanted.to_bytes())  # as it will be read back
        try:
            self.store.create(name, wanted.to_bytes())
        except FileExistsError:
            declared = self._declaration(name)
            if declared.fingerprint != wanted.fingerprint or declared.scalars != wanted.scalars:
                changes = "; ".join(differences(declared.made_by, wanted.made_by)) or "its scalars differ"
                what = "source" if wanted.kind == "source" else "column"
                raise MadeOtherwiseError(what, wanted.name, self.url, changes) from None
            return declared
        return wanted

    def forget(self, name: str) -> None:
        """Forget a declaration that was removed."""
        self._declarations.pop(name, None)

    def _declaration(self, name: str) -> Declaration:
        if name not in self._declarations:
            self._declarations[name] = self.read_record(name, Declaration)
        return self._declarations[name]

    def column(self, column: str) -> Declaration:
        """Read the declaration of a column.

        Raises:
            RequestError: there is no such column.
        """
        try:
            return self._declaration(f"columns/{column}.json")
        except FileNotFoundError:
            known = ", ".join(sorted(self.columns())) or "none"
            raise RequestError(f"column {column!r}: corpus {self.url} has no such column; it has: {known}") from None

    def source(self, source: str) -> Declaration:
        """Read the declaration of a source; raises FileNotFoundError if there is none."""
        return self._declaration(f"sources/{source}.json")

    def columns(self) -> dict[str, Declaration]:
        """Read all declared columns."""
        return self._declared("columns")

    def sources(self) -> dict[str, Declaration]:
        """Read all declared sources."""
        return self._declared("sources")

    def _declared(self, folder: str) -> dict[str, Declaration]:
        valid = COLUMN if folder == "columns" else SOURCE
        files = sorted(item.name for item in self.store.list(folder) if item.name.endswith(".json"))
        names = {file.removeprefix(f"{folder}/").removesuffix(".json"): file for file in files}
        return {name: self._declaration(file) for name, file in names.items() if valid.fullmatch(name)}

    # -- commits -------------------------------------------------------------------------------------------------

    def committed(self, column: str, source: str | None = None) -> dict[ShardId, int]:
        """List the committed shards of a column: {(source, shard): highest generation}."""
        highest: dict[ShardId, int] = {}
        for shard_id, generation in self.listed(column, source):
            highest[shard_id] = max(highest.get(shard_id, 0), generation)
        return highest

    def listed(self, column: str, source: str | None = None) -> Iterator[tuple[ShardId, int]]:
        """List every commit of a column, all generations: ((source, shard), generation), in no order."""
        for name in self.store.names(f"commits/{column}/{source}" if source else f"commits/{column}"):
            match = COMMIT.fullmatch(name)  # `verify` reports other names
            if match and match[1] == column:  # "captions" lists "captions/long" too
                yield (intern(match[2]), match[3]), int(match[4])

    def listed_since(self, column: str) -> tuple[dict[ShardId, int], datetime | None]:
        """List the committed shards of a column as `committed` does, and when the newest commit was written."""
        highest: dict[ShardId, int] = {}
        newest: datetime | None = None
        for item in self.store.list(f"commits/{column}"):
            match = COMMIT.fullmatch(item.name)
            if match and match[1] == column:
                shard_id = (intern(match[2]), match[3])
                highest[shard_id] = max(highest.get(shard_id, 0), int(match[4]))
                newest = item.modified if newest is None else max(newest, item.modified)
        return highest, newest

    def commit(self, column: str, source: str, shard: str, generation: int) -> Commit:
        """Read one commit.

        Raises:
            FileNotFoundError: there is none.
            DamagedError: it cannot be understood.
        """
        return self.read_record(commit_name(column, source, shard, generation), Commit)

    def commits(self, column: str, source: str | None = None) -> list[Commit]:
        """Read the commits of the highest generation of every shard of a column, ordered by source and shard.

        Raises:
            DamagedError: one of them cannot be understood.
        """
        newest = sorted(self.committed(column, source).items())
        names = [commit_name(column, source, shard, generation) for (source, shard), generation in newest]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda name: self.read_record(name, Commit), names))

    def unit(self, source: str, unit: str, generation: int = 0) -> UnitCommit:
        """Read one unit's commit; raises as `commit` does."""
        return self.read_record(commit_name(UNITS, source, unit, generation), UnitCommit)

    def units(self, source: str) -> dict[str, UnitCommit]:
        """Read the newest commits of the units of a source."""
        newest = sorted(self.committed(UNITS, source).items())
        names = [commit_name(UNITS, source, unit, generation) for (_, unit), generation in newest]
        with ThreadPoolExecutor(16) as pool:
            records = list(pool.map(lambda name: self.read_record(name, UnitCommit), names))
        return {record.unit: record for record in records}

    def read_record(self, name: str, kind: type[R]) -> R:
        """Read an object that is a record; raises as `commit` does."""
        data = self.store.get(name)
        try:
            return kind.parse(data)
        except ValueError as error:
            raise DamagedError(
                f"corpus {self.url}: {name} is damaged ({first_line(error)}); "
                f"`microdit verify` lists all damage, `microdit build --repair` mends commits; "
                f"a declaration must be restored from a copy"
            ) from None

    # -- reading a shard -----------------------------------------------------------------------------------------

    def sidecar(self, commit: Commit, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the sidecar of a commit, or some columns of it: one line per row, in row order.

        Raises:
            DamagedError: it has other rows than the commit says, or columns of other types than are declared.
        """
        try:
            file = open_table(io.BytesIO(self.store.get(commit.sidecar.name)), commit.counts["in"])
            check_types(file.schema_arrow, self._scalars(commit.column))
            return file.read(columns, use_threads=False)
        except (RowCountError, ColumnTypeError) as error:
            raise DamagedError(
                f"corpus {self.url}: {commit.sidecar.name} is damaged: {error}; `microdit verify` lists all damage, "
                "`microdit build --repair` mends it"
            ) from None

    def _scalars(self, column: str) -> dict[str, str]:
        """Read the declared scalars of a column; none where its declaration is lost, which others report."""
        try:
            return self._declaration(f"columns/{column}.json").scalars
        except (FileNotFoundError, DamagedError):
            return {}

    def open_object(self, commit: Commit) -> BinaryIO:
        """Open the data object of a commit as a binary file."""
        return self.store.open(commit.object.name)


def differences(declared: Any, wanted: Any, path: str = "") -> list[str]:
    """List how two nested dictionaries differ, in words: `options.quality: the corpus has 90, the config says 95`."""
    if isinstance(declared, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(declared.keys() | wanted.keys())
            for line in differences(declared.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if declared == wanted else [f"{path}: the corpus has {declared!r}, the config says {wanted!r}"]
