"""The status table: which rows of which shards are ok, as lines of one object, so that a run reads no sidecar twice.

It is a cache like the commit table (corpus.md, section 6): of the commits that it lacks, record and sidecar are
read, and when those were many, a new table is published.
"""

import hashlib
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.threads import chunks, threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, TABLE
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.shard_files import check_footer
from microdit.pipeline.tables.published import Table, if_allowed, publish

FOLDER = "tables/statuses"
LEAST = 1000  # commits that were read one by one before a table is worth its writing; later a tenth of all

AT_ONCE = 16  # commits that a thread reads in one go

LINE = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("commit", pa.binary()),
        pa.field("rows", pa.int32()),
        pa.field("ok", pa.binary()),
        pa.field("longest", pa.int64()),
    ]
)


@dataclass(frozen=True)
class ShardStatus:
    """Status of a shard by its commit and sidecar.

    commit: the stored record. packed: a bit for each of `rows`, set where the row is ok. longest: the most `tokens` of
    a row that is ok, None where the column has no such number.
    """

    commit: bytes
    rows: int
    packed: bytes
    longest: int | None

    @property
    def ok(self) -> np.ndarray:
        """Mask of the rows that are ok (bool)."""
        return np.unpackbits(np.frombuffer(self.packed, np.uint8), count=self.rows).astype(bool)


def read_statuses(corpus: Corpus, wanted: Mapping[str, str], listed: Mapping[str, str]) -> dict[str, ShardStatus]:
    """Read the statuses of commits, by the commits' names.

    Args:
        wanted: names of commits, and the SHA-256 of their stored bytes.
        listed: the same of all commits of the corpus; lines of others are not published again.

    Raises:
        RequestError: a sidecar cannot be read.
        DamagedError: a commit cannot be understood.
    """
    known = [line for line in _newest(corpus).to_pylist() if listed.get(line["name"]) == line["sha256"]]
    lines: dict[str, dict[str, Any]] = {line["name"]: line for line in known}
    missing = [name for name in wanted if name not in lines]
    read = threaded(lambda names: [_read(corpus, name) for name in names], chunks(missing, AT_ONCE))
    lines |= {line["name"]: line for some in read for line in some}
    if len(missing) >= max(LEAST, len(known) // 10):
        _publish(corpus, list(lines.values()))
    return {
        name: ShardStatus(line["commit"], line["rows"], line["ok"], line["longest"])
        for name in wanted
        for line in [lines[name]]
    }


def read_ok_rows(corpus: Corpus, commit: Commit) -> tuple[np.ndarray, int | None]:
    """Read from a sidecar which rows are ok (bool), and the most `tokens` of those, if it has any such number.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        sidecar = corpus.sidecar(commit, ["status", "tokens"])
    except (FileNotFoundError, pa.ArrowException) as error:
        raise RequestError(
            f"column {commit.column}, shard {commit.shard}: {commit.sidecar.name} is missing or damaged "
            f"({first_line(error)}), so that nobody knows its samples; run `microdit verify`, then "
            "`microdit build --repair`"
        ) from None
    ok = pc.equal(sidecar["status"], "ok")
    longest = pc.max(sidecar["tokens"].filter(ok)).as_py() if "tokens" in sidecar.column_names else None
    return ok.to_numpy(), longest


def _read(corpus: Corpus, name: str) -> dict[str, Any]:
    """Read a commit and its sidecar as a line."""
    match = COMMIT.fullmatch(name)
    assert match is not None
    commit = corpus.commit(match[1], match[2], match[3], int(match[4]))
    ok, longest = read_ok_rows(corpus, commit)
    return {
        "name": name,
        "sha256": commit.sha256,
        "commit": commit.to_bytes(),
        "rows": len(ok),
        "ok": np.packbits(ok).tobytes(),
        "longest": longest,
    }


def _newest(corpus: Corpus) -> pa.Table:
    """Open the table that was published last; an empty one if there is none. Delete damaged ones."""
    for item in sorted(corpus.store.list(FOLDER), key=lambda item: item.modified, reverse=True):
        if not (item.name.endswith(".json") and TABLE.fullmatch(item.name)):
            continue
        try:
            record = Table.parse(corpus.store.get(item.name))
            data = corpus.store.get(record.object.name)
            if hashlib.sha256(data).hexdigest() == record.object.sha256:
                file = pq.ParquetFile(io.BytesIO(data))
                check_footer(file.metadata, record.rows, "its record")
                if file.schema_arrow.equals(LINE):
                    return file.read()
        except FileNotFoundError:
            continue
        except ValueError:  # pyarrow's errors are, too
            pass
        with if_allowed():
            corpus.store.delete([item.name])
    return LINE.empty_table()


def _publish(corpus: Corpus, lines: Collection[dict[str, Any]]) -> None:
    """Publish a table of these lines, if there is the right to write."""
    table = pa.Table.from_pylist(sorted(lines, key=lambda line: str(line["name"])), LINE)
    digest = hashlib.sha256()
    for line in zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True):
        digest.update("{} {}\n".format(*line).encode())

    def write(path: Path) -> int:
        pq.write_table(table, path, compression="zstd")
        return len(table)

    with if_allowed():
        publish(corpus, f"{FOLDER}/{digest.hexdigest()}", write, lambda object, rows: Table(object=object, rows=rows))
