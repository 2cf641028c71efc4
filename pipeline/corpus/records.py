"""The records of a corpus and the grammar of its names (docs/corpus.md, sections 1, 2 and 4)."""

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

from microdit.pipeline.corpus.names import ATTEMPT, COLUMN, SHARD, SOURCE, column_kind, commit_name

VERSION: Literal[1] = 1


class Record(BaseModel):
    model_config = ConfigDict(frozen=True)

    def to_bytes(self) -> bytes:
        """The record as it is stored: JSON with sorted keys and no white space, so that its hash is well defined."""
        return canonical(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The record that was stored.

        Raises:
            ValueError: the bytes are no such record.
        """
        return cls.model_validate_json(data)


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

    version: Literal[1] = VERSION
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
    device: str = ""
    """What the process worked with: `cpu`, or its GPU's name; empty where it is not said."""
    _stored: str | None = PrivateAttr(None)
    _ours: bool = PrivateAttr(True)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        commit = super().parse(data)
        commit._stored = hashlib.sha256(data).hexdigest()
        return commit

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        """A commit can name no other objects than those of its attempt: nothing outside the corpus is ever opened."""
        if not (COLUMN.fullmatch(self.column) and SOURCE.fullmatch(self.source) and SHARD.fullmatch(self.shard)):
            raise ValueError(f"{self.column!r}, {self.source!r}, {self.shard!r} are no column, source and shard")
        base = f"{self.column}/{self.source}/{self.shard}.{self.attempt}"
        wanted = (
            (f"{base}.parquet",) * 2 if column_kind(self.column) == "table" else (f"{base}.tar", f"{base}.rows.parquet")
        )
        if not ATTEMPT.fullmatch(self.attempt) or (self.object.name, self.sidecar.name) != wanted:
            raise ValueError(f"it names {self.object.name!r} and {self.sidecar.name!r}, expected {wanted}")
        return self

    @property
    def name(self) -> str:
        return commit_name(self.column, self.source, self.shard, self.generation)

    @property
    def ref(self) -> ShardRef:
        return ShardRef(source=self.source, unit=self.unit, shard=self.shard)

    @property
    def ours(self) -> bool:
        """False of what `Attempt.commit` gives back if another attempt was faster."""
        return self._ours

    @property
    def size(self) -> int:
        """Size of its objects."""
        return sum({ref.name: ref.size for ref in (self.object, self.sidecar)}.values())

    @property
    def sha256(self) -> str:
        """Hash of the bytes that are stored, which another writer may have written in its own way."""
        return self._stored or hashlib.sha256(self.to_bytes()).hexdigest()

    def as_input(self) -> InputRef:
        return InputRef(column=self.column, generation=self.generation, sha256=self.sha256)


class UnitCommit(Record):
    """The record that all shards of a unit are committed; `inputs` is the unit's number of inputs."""

    version: Literal[1] = VERSION
    source: str
    unit: str
    generation: int = 0
    inputs: int
    shards: list[str]
    fingerprint: str


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
