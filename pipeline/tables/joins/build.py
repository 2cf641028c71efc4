"""Build join tables: further captions or scores of samples, sorted once by key and then looked up by any worker.

Such tables come with millions of rows in any order and in four kinds of files. The driver streams one through DuckDB's
sort, which spills to disk, into a Parquet file in the corpus (`tables/joins/`, docs/reference/corpus.md, section 6).
A worker reads the row group that a key must be in and keeps a few: neighbours in key order cost one read, and no table
is ever in memory as a whole.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import ObjectRef
from microdit.pipeline.files.scratch import make_scratch
from microdit.pipeline.tables.database import connect
from microdit.pipeline.tables.joins.readers import JoinTally, read_table, record_error
from microdit.pipeline.tables.joins.spec import JoinSpec, JoinTable
from microdit.pipeline.tables.published import cached, publish

ROW_GROUP = 20_480  # rows that a look-up reads at once: some 10 MB of captions
SORT_MEMORY = "600MB"  # of DuckDB; what does not fit goes to the scratch folder
SPILL, OLD_SPILL = "microdit-join-", 48 * 3600.0  # folders in scratch; seconds after which a leftover is removed


def build(corpus: Corpus, spec: JoinSpec, scratch: Path, report: Callable[[str], None]) -> None:
    """Sort a table into the corpus; returns immediately if it exists.

    A key whose rows have different values is joined to nothing (`ambiguous_key`). Its rows, rows without a key, lines
    that are not JSON and the rest of a damaged archive are counted in the table's record, and reported.

    Raises:
        RequestError: a column is absent, or nothing can be read.
    """
    if cached(corpus, spec.base, JoinTable) is not None:
        return
    tally = JoinTally(report)
    last: list[str] = []

    def write(path: Path) -> int:
        _write_sorted(spec, scratch, tally, path)
        last.extend(_last_keys(path))
        if not spec.first_counts:
            _count_ambiguous(path, tally)
        return tally.rows

    def record(object: ObjectRef, rows: int) -> JoinTable:
        left_out = dict(tally.left_out)
        fields, examples = list(spec.fields), tally.examples
        return JoinTable(object=object, rows=rows, fields=fields, last=last, left_out=left_out, examples=examples)

    publish(corpus, spec.base, write, record)
    report(f"{spec.what}: a table of {tally.rows:,} rows, sorted by key")
    for reason, count in tally.left_out.items():
        report(f"{spec.listing.files[0].name}: {count:,} left out, {reason}")
    for example in tally.examples:
        report(f"{spec.listing.files[0].name}: {example}")


def _write_sorted(spec: JoinSpec, scratch: Path, tally: JoinTally, path: Path) -> None:
    """Write the table at `path`, sorted by key and then by the order of the rows.

    Raises:
        RequestError: a column is absent, or nothing can be read.
    """
    make_scratch(scratch)
    _sweep_spills(scratch)
    with TemporaryDirectory(dir=scratch, prefix=SPILL) as spill:
        schema, batches = read_table(spec, scratch, tally)
        with connect(memory_limit=SORT_MEMORY, temp_directory=spill, threads=1) as database:
            database.register("rows", pa.RecordBatchReader.from_batches(schema, record_error(batches, tally)))
            names = ", ".join(["key", *(f"f{i}" for i in range(len(spec.fields)))])
            try:
                database.execute(
                    f"COPY (SELECT {names} FROM rows ORDER BY key, number) TO '{_quoted(path)}' "
                    f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP})"
                )
            except duckdb.Error as error:
                raise (tally.error or error) from None
    if tally.rows == 0:
        files = ", ".join(file.name for file in spec.listing.files[:3])
        reasons = "; ".join(tally.examples) or "it is empty"
        raise RequestError(f"{spec.what}: nothing in {files} can be read; {reasons}")


def _sweep_spills(scratch: Path) -> None:
    """Remove what killed builds left in the scratch folder."""
    for folder in scratch.glob(f"{SPILL}*"):
        with suppress(OSError):  # another process was faster
            if time.time() - folder.stat().st_mtime > OLD_SPILL:
                shutil.rmtree(folder)


def _last_keys(path: Path) -> list[str]:
    """Read the last key of each row group. Statistics will not do: they hold only the beginning of long keys."""
    with pq.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        return [file.read_row_group(number, ["key"])["key"][-1].as_py() for number in groups]


def _count_ambiguous(path: Path, tally: JoinTally) -> None:
    """Count the rows of a sorted table whose key comes again with other values. They stay; no look-up takes them."""
    key, values, rows, differs = "", "", 0, False
    with pq.ParquetFile(path) as file:
        for number in range(file.metadata.num_row_groups):
            alive()
            group = file.read_row_group(number)
            keys = group["key"].combine_chunks()
            equal = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
            again = np.flatnonzero(equal) + 1
            for index in np.union1d(np.concatenate([again - 1, again]), [0, len(keys) - 1]).tolist():
                this = keys[index].as_py()
                row = repr(group.slice(index, 1).drop_columns(["key"]).to_pylist()[0])
                if rows and this == key:
                    rows, differs = rows + 1, differs or row != values
                    continue
                if differs:
                    tally.leave_out("ambiguous_key", f"{key!r} comes {rows:,} times with different values", rows)
                key, values, rows, differs = this, row, 1, False
    if differs:
        tally.leave_out("ambiguous_key", f"{key!r} comes {rows:,} times with different values", rows)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
