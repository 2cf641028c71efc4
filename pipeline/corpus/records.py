"""The JSON records of a corpus: declarations, commits, references (docs/reference/corpus.md, sections 1, 4 and 5)."""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from microdit.pipeline.corpus.names import ATTEMPT, COLUMN, SHARD, SOURCE, column_kind, commit_name

VERSION: Literal[1] = 1
UNREPAIRED = "unrepaired"
"""In a commit's timings: rows that were damaged and could not be had again, or whose bytes could not be checked."""
Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
"""A number of rows or a generation: a JSON integer of 0 to 2^31 - 1."""
Size = Annotated[int, Field(strict=True, ge=0, le=2**53)]
"""Of bytes, or of the rows of a whole corpus: what JSON holds exactly."""
Timing = Annotated[float, Field(allow_inf_nan=False, ge=-1e15, le=1e15)]


class Record(BaseModel):
    """An immutable object of the corpus, stored as JSON."""

    model_config = ConfigDict(frozen=True, serialize_by_alias=True)

    def to_bytes(self) -> bytes:
        """Encode as stored: JSON with sorted keys and no white space, so that its hash is well defined."""
        return canonical(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode what `to_bytes` encoded.

        Raises:
            ValueError: the bytes are no such record.
        """
        return cls.model_validate_json(data)


class ShardRef(Record):
    """A shard's source, unit and name."""

    source: str
    unit: str
    shard: str


class Declaration(Record):
    """The declaration of a column or a source (docs/reference/corpus.md, section 5)."""

    name: str
    kind: str
    """`tar` or `table`, or `source`."""
    made_by: dict[str, Any] = Field(alias="stage")
    """Determines the numbers: name and version of a stage or adapter, options, models with revisions or hashes."""
    scalars: dict[str, str] = {}
    """The sidecar's own columns, by type name."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `made_by`, which every commit of the column repeats."""
        return hashlib.sha256(canonical(self.made_by)).hexdigest()


class ObjectRef(Record):
    """An object of the corpus, with size in bytes and hash."""

    name: str
    size: Size
    sha256: str


class InputRef(Record):
    """A commit that an attempt read; `sha256` is that of its stored bytes."""

    column: Annotated[str, Field(pattern=f"^(?:{COLUMN.pattern})$")]
    generation: Count
    sha256: str


class Commit(Record):
    """The record that makes an attempt the shard (docs/reference/corpus.md, section 4)."""

    version: Literal[1] = VERSION
    column: str
    source: str
    unit: str
    shard: str
    generation: Count
    attempt: str
    object: ObjectRef
    sidecar: ObjectRef
    counts: dict[str, Count]
    reasons: dict[str, Count]
    fingerprint: str
    inputs: list[InputRef]
    timings: dict[str, Timing]
    host: str
    device: str = ""
    """Device of the process: `cpu`, or its GPU's name; empty if not recorded."""
    gpu: str = ""
    """Unique id of that GPU; empty on a CPU, or if not recorded."""
    software: dict[str, str] = {}
    """Versions of the packages that made the numbers, and of this one's code; empty where it is not said."""
    _stored: str | None = PrivateAttr(None)
    _ours: bool = PrivateAttr(True)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        commit = super().parse(data)
        commit._stored = hashlib.sha256(data).hexdigest()
        return commit

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        """Refuse a commit that names other objects than its attempt's: nothing outside the corpus is ever opened."""
        if not (COLUMN.fullmatch(self.column) and SOURCE.fullmatch(self.source) and SHARD.fullmatch(self.shard)):
            raise ValueError(f"{self.column!r}, {self.source!r}, {self.shard!r} are no column, source and shard")
        base = f"{self.column}/{self.source}/{self.shard}.{self.attempt}"
        wanted = (
            (f"{base}.parquet",) * 2 if column_kind(self.column) == "table" else (f"{base}.tar", f"{base}.rows.parquet")
        )
        if not ATTEMPT.fullmatch(self.attempt) or (self.object.name, self.sidecar.name) != wanted:
            raise ValueError(f"it names {self.object.name!r} and {self.sidecar.name!r}, expected {wanted}")
        if missing := {"in", "out", "failed"} - self.counts.keys():
            raise ValueError(f"its counts have no {', '.join(sorted(missing))}")
        return self

    @property
    def name(self) -> str:
        return commit_name(self.column, self.source, self.shard, self.generation)

    @property
    def ref(self) -> ShardRef:
        return ShardRef(source=self.source, unit=self.unit, shard=self.shard)

    @property
    def ours(self) -> bool:
        """False if `Attempt.commit` returned the commit of another attempt that was faster."""
        return self._ours

    @property
    def size(self) -> int:
        """Bytes of its objects together."""
        return sum({ref.name: ref.size for ref in (self.object, self.sidecar)}.values())

    @property
    def sha256(self) -> str:
        """Hash of the stored bytes, whose JSON another writer may have formatted differently."""
        return self._stored or hashlib.sha256(self.to_bytes()).hexdigest()

    def as_input(self) -> InputRef:
        """Refer to this commit from a commit that was computed from it."""
        return InputRef(column=self.column, generation=self.generation, sha256=self.sha256)


class UnitCommit(Record):
    """The record that all shards of a unit are committed.

    `inputs` is the number of inputs of the unit: the sum of its shards' `in`.
    """

    version: Literal[1] = VERSION
    source: str
    unit: str
    generation: Count = 0
    inputs: Size
    shards: list[str]
    fingerprint: str


def canonical(value: Any) -> bytes:
    """Encode as UTF-8 JSON with sorted keys and no white space; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
