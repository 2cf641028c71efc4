"""Write to a corpus: an attempt is one try to write one shard of one column.

The contract: docs/reference/corpus.md, sections 3 and 4.

Guarantee: each generation of a shard, and of a unit, is committed exactly once.
"""

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from microdit.pipeline.base.digest import sha256_file
from microdit.pipeline.base.fail_points import fail_point
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.versions import versions
from microdit.pipeline.corpus.carried import CarriedRows, scalars_of
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import KEY, UNITS, commit_name
from microdit.pipeline.corpus.records import Commit, Declaration, InputRef, ObjectRef, ShardRef, UnitCommit
from microdit.pipeline.corpus.shard_files import TarWriter, sidecar_table, write_table

MAX_ATTEMPT_HOURS = 12


@contextmanager
def begin_attempt(
    corpus: Corpus, column: str, ref: ShardRef, inputs: Iterable[Commit] = (), generation: int = 0
) -> Iterator["Attempt"]:
    """Begin one try to write one shard of one column; it is dropped if the block ends without a commit."""
    declaration = corpus.column(column)
    maker = corpus.source(ref.source) if column == "images" else declaration
    with ExitStack() as stack:
        yield Attempt(corpus, declaration, ref, [c.as_input() for c in inputs], generation, maker.fingerprint, stack)


def commit_unit(
    corpus: Corpus, source: str, unit: str, inputs: int, shards: Sequence[str], generation: int = 0
) -> UnitCommit:
    """Record that a unit is complete; returns the record of the worker that was first.

    Raises:
        ValueError: that worker counted other inputs or shards.
    """
    record = UnitCommit(
        source=source,
        unit=unit,
        generation=generation,
        inputs=inputs,
        shards=list(shards),
        fingerprint=corpus.source(source).fingerprint,
    )
    name = commit_name(UNITS, source, unit, generation)
    try:
        corpus.store.create(name, record.to_bytes())
    except FileExistsError:
        first = corpus.unit(source, unit, generation)
        if (first.inputs, first.shards) != (record.inputs, record.shards):
            raise ValueError(
                f"unit {unit}: {name} has {first.inputs} inputs in {len(first.shards)} shards, "
                f"this worker read {inputs} in {len(shards)}; the source gave other inputs than before"
            ) from None
        return first
    return record


class Attempt:
    """One try to write one shard of one column: `add` or `fail` every row, then `commit`. Made by `begin_attempt`."""

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
        self.carried: CarriedRows | None = None
        """Rows of the generation before that are kept as they are: `add` and `fail` leave them alone."""
        self._began, self._worked = (time.monotonic(), time.time()), time.process_time()
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
        """Add a sample that succeeded: its tar members, `{extension: bytes}` (none in a table), and its scalars.

        Raises:
            ValueError: the key is not 1 to 80 of `[A-Za-z0-9_-]`, a scalar is a string that UTF-8 cannot encode, or
                there are no members or others than of the samples before. Nothing was added then.
        """
        if self.carries(row):
            return
        self._carry_over(row)
        self._add(row, key, members, **scalars)

    def _add(self, row: int, key: str, members: Mapping[str, bytes] | None = None, **scalars: Any) -> None:
        alive()
        fail_point("writing")
        _check_key(key)
        for name, value in scalars.items():
            if isinstance(value, str) and value != _writable(value):
                raise ValueError(f"sample {key}: {name} has lone surrogates, which UTF-8 cannot write: {value[:80]!r}")
        line: dict[str, Any] = {"row": row, "key": key, "status": "ok", **scalars}
        if self._tar is not None:
            line["offset"], line["size"] = self._tar.add(key, members or {})
        self.rows.append(line)

    def fail(self, row: int, key: str, reason: str, detail: str = "", **scalars: Any) -> None:
        """Add a sample that failed: a short code to group by, and one line for a person.

        Raises:
            ValueError: the key is not 1 to 80 of `[A-Za-z0-9_-]`.
        """
        if not self.carries(row):
            self._fail(row, key, reason, detail, **scalars)

    def _fail(self, row: int, key: str, reason: str, detail: str, **scalars: Any) -> None:
        alive()
        _check_key(key)
        line = {"reason": reason, "detail": " ".join(detail.split())[:500], **scalars}
        line = {name: _writable(value) if isinstance(value, str) else value for name, value in line.items()}
        self.rows.append({"row": row, "key": key, "status": "failed", **line})

    def carry_over(self, commit: Commit, again: Callable[[str], bool]) -> None:
        """Keep the rows of the generation before, but for those that failed for a reason that `again` is true of.

        Raises:
            ValueError: it is damaged, or was made from other inputs.
        """
        if commit.inputs != self.inputs:
            raise ValueError(
                f"{commit.name}: its inputs have been made again since, and its rows cannot be carried over: "
                "`microdit build --repair` makes the shard again"
            )
        self.carried = CarriedRows(self.corpus, commit, again)

    def carries(self, row: int) -> bool:
        """Tell whether a row is carried over unchanged."""
        return self.carried is not None and row in self.carried

    @property
    def has_gained(self) -> bool:
        """Return True if a commit is worth it: some row is good that was not, or nothing is carried over."""
        good = (line["row"] for line in self.rows if line["status"] == "ok")
        return self.carried is None or any(row not in self.carried for row in good)

    def _carry_over(self, until: int | None = None) -> None:
        """Add the carried rows before this one: samples lie in the order of their rows."""
        for row in self.carried.before(until) if self.carried is not None else ():
            if row.ok:
                self._add(row.row, row.key, row.members, **scalars_of(row))
            else:
                line = row.scalars
                self._fail(row.row, row.key, line["reason"], line["detail"] or "", **scalars_of(row))

    def commit(self, **timings: float) -> Commit:
        """Publish the objects, then write the commit.

        If another attempt was faster, its commit is returned and our objects are removed.

        Args:
            timings: seconds and counts worth keeping; `seconds` and `cpu_seconds` (of the whole process), from the
                attempt's beginning, are added if absent.

        Raises:
            ValueError: a row or a key is missing or double, a scalar is not declared, or the attempt is older than
                12 hours.
        """
        self._carry_over()
        data, sidecar = self._publish()
        fail_point("written")
        stored = self._record(data, sidecar, self._check_age(), timings).to_bytes()
        commit = Commit.parse(stored)
        try:
            fail_point("committing")
            self.corpus.store.create(commit.name, stored)
        except FileExistsError:
            return self._lost_to(self.corpus.commit(commit.column, commit.source, commit.shard, commit.generation))
        fail_point("committed")
        return commit

    def _publish(self) -> tuple[ObjectRef, ObjectRef]:
        """Make the objects complete and durable; returns data object and sidecar, which are one in a table."""
        write_table(self._sidecar_path, sidecar_table(self.rows, self.declaration.scalars))
        data = sidecar = _object_ref(self._sidecar_name, self._sidecar_path)
        paths = {self._sidecar_name: self._sidecar_path}
        if self._tar is not None:
            self._tar.close()
            data = _object_ref(self._object_name, self._object_path)
            paths[self._object_name] = self._object_path
        self.corpus.store.publish(paths)
        return data, sidecar

    def _check_age(self) -> float:
        """Return the seconds since the attempt began; raises ValueError if it is too old to be committed."""
        # a machine that slept has a monotonic clock that stood still
        age = max(time.monotonic() - self._began[0], time.time() - self._began[1])
        if age > MAX_ATTEMPT_HOURS * 3600:
            raise ValueError(
                f"attempt {self.id} of {self.ref.shard} is {age / 3600:.1f} hours old, "
                f"at most {MAX_ATTEMPT_HOURS} are allowed"
            )
        return age

    def _record(self, data: ObjectRef, sidecar: ObjectRef, seconds: float, timings: Mapping[str, float]) -> Commit:
        """Build the commit of what was published."""
        reasons = Counter(row["reason"] for row in self.rows if row["status"] == "failed")
        failed = sum(reasons.values())
        device, gpu = _device()
        return Commit(
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
            timings={
                "seconds": round(seconds, 3),
                "cpu_seconds": round(time.process_time() - self._worked, 3),
                **{name: round(float(value), 6) for name, value in timings.items()},
            },
            host=socket.gethostname(),
            device=device,
            gpu=gpu,
            software=versions(),
        )

    def _lost_to(self, winner: Commit) -> Commit:
        """Return the commit that exists, and remove our objects unless it is ours: a lost answer makes us ask again."""
        if winner.attempt != self.id:
            self.corpus.store.delete(sorted({self._object_name, self._sidecar_name}))
            winner._ours = False
        return winner


def _object_ref(name: str, path: Path) -> ObjectRef:
    return ObjectRef(name=name, size=path.stat().st_size, sha256=sha256_file(path))


def _check_key(key: str) -> None:
    if not KEY.fullmatch(key):
        raise ValueError(f"key {key!r}: expected 1 to 80 letters, digits, - and _")


def _device() -> tuple[str, str]:
    """Name the GPU that this process works with, and tell it from others, or `cpu`; torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "cpu", ""
    return torch.cuda.get_device_name(), str(getattr(torch.cuda.get_device_properties(), "uuid", ""))


def _writable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
