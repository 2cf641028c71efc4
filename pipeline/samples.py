"""SQL over the sample table, and selections (docs/corpus.md, section 6)."""

import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from pipeline.corpus import Corpus, canonical
from pipeline.database import connect
from pipeline.duplicates import ContaminatedTable, DuplicatesTable
from pipeline.errors import RequestError
from pipeline.jobs import CONTAMINATED, DUPLICATES, SEMANTIC, Job, job_base
from pipeline.semantic import SemanticTable
from pipeline.store import first_line
from pipeline.tables import JOB_COLUMNS, ROW_GROUP, SampleTable, Table, cached, sample_table, table_schema

SELECTION = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)
READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI)  # multi is PIVOT
CONFINED: dict[str, str | bool | int | float | list[str]] = {  # the SQL may be a stranger's
    "enable_external_access": False,
    "python_enable_replacements": False,
}
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
JOBS: dict[str, tuple[type[Job], str, str]] = {  # a table job's folder: its record, its command, what the view shows
    DUPLICATES: (
        DuplicatesTable,
        "dedup",
        "duplicate_group, duplicate_distance, CASE WHEN {present} THEN coalesce(duplicate_exact, false) END AS "
        "duplicate_exact, CASE WHEN {present} THEN coalesce(duplicate_keep, true) END AS duplicate_keep",
    ),
    SEMANTIC: (
        SemanticTable,
        "dedup --semantic",
        "semantic_group, semantic_similarity, CASE WHEN {present} THEN coalesce(semantic_keep, true) END AS "
        "semantic_keep",
    ),
    CONTAMINATED: (
        ContaminatedTable,
        "decontaminate",
        "CASE WHEN {present} THEN contaminated_by IS NOT NULL END AS contaminated, contaminated_by, "
        "contaminated_distance",
    ),
}


@dataclass(frozen=True)
class Selection:
    """An immutable keep-list; `name@hash` identifies it, `path` is its object in the corpus."""

    name: str
    hash: str
    path: str
    rows: int
    query: str


# -- SQL -------------------------------------------------------------------------------------------------------------


def query(corpus: Corpus, sql: str) -> pa.Table:
    """The result of a SQL query over the view `samples`; nothing but that view can be reached.

    Raises:
        RequestError: the SQL is wrong; the message is DuckDB's.
    """
    with _connected(corpus, sample_table(corpus)) as connection:
        return _run(connection, sql)


@contextmanager
def _connected(corpus: Corpus, table: SampleTable) -> Iterator[duckdb.DuckDBPyConnection]:
    with (
        tempfile.TemporaryDirectory(prefix="microdit-sql-") as spill,
        connect(**CONFINED, temp_directory=spill) as connection,
    ):
        jobs = _jobs(corpus, table)
        connection.register("sample_rows" if jobs else "samples", _view(corpus, table, Path(spill)))
        shown, joined = ["sample_rows.*"], "sample_rows"
        for number, (folder, job) in enumerate(jobs.items()):
            connection.register(f"job_{number}", _view(corpus, job, Path(spill)))
            shown.append(JOBS[folder][2].format(present=job.present))
            joined += f" LEFT JOIN job_{number} USING (source, shard, row)"
        if jobs:
            connection.execute(f"CREATE VIEW samples AS SELECT {', '.join(shown)} FROM {joined}")
        connection.execute("SET lock_configuration=true")
        yield connection


def _view(corpus: Corpus, table: Table, spill: Path) -> ds.FileSystemDataset:
    """A published table for DuckDB: by a path, never a Python file, which several scans of one query would share; that
    deadlocks and mixes up reads."""
    path = spill / Path(table.object.name).name if corpus.store.root is None else corpus.store.root / table.object.name
    if corpus.store.root is None:
        with corpus.store.open(table.object.name) as file, path.open("wb") as copy:
            shutil.copyfileobj(file, copy, 16 << 20)
    try:
        fragment = ds.ParquetFileFormat().make_fragment(str(path), LocalFileSystem())
        return ds.FileSystemDataset([fragment], fragment.physical_schema, fragment.format)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(
            f"corpus {corpus.url}: {table.object.name} is damaged ({first_line(error)}); remove the folder "
            "tables, it is made again"
        ) from None


def _jobs(corpus: Corpus, table: SampleTable) -> dict[str, Job]:
    """The table jobs that read the very commits of this sample table, by folder."""
    found = {folder: cached(corpus, job_base(folder, table), kind) for folder, (kind, _, _) in JOBS.items()}
    return {folder: job for folder, job in found.items() if job is not None}


def _asked(sql: str) -> list[str]:
    """The folders of the table jobs whose columns the SQL names."""
    return [folder for folder in JOBS if folder.removeprefix("tables/").removesuffix("s") in sql.lower()]


def _run(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    try:
        kinds = [statement.type for statement in connection.extract_statements(sql)]
        if len(kinds) != 1 or kinds[0] not in READING:
            what = ", ".join(kind.name for kind in kinds) or "nothing"
            raise RequestError(f"SQL: {what}; expected one SELECT over the view samples")
        table = connection.sql(sql).to_arrow_table()
    except duckdb.Error as error:
        advice = [
            f"`microdit {JOBS[folder][1]}`" for folder in _asked(sql) if isinstance(error, duckdb.BinderException)
        ]
        again = f"\nThose columns come from {' and '.join(advice)}, run again whenever the corpus has changed"
        raise RequestError(f"SQL: {error}{again if advice else ''}") from None
    for where, field in enumerate(table.schema):
        if field.type == pa.decimal128(38, 0):  # what DuckDB's 128-bit sums come as
            with suppress(pa.ArrowInvalid):  # it is larger than 64 bits: it stays
                table = table.set_column(where, field.name, pc.cast(table[where], pa.int64()))
    return table


# -- selections ------------------------------------------------------------------------------------------------------


def select(corpus: Corpus, name: str, sql: str) -> Selection:
    """Save the rows that a query gives as a selection. The same query on the same commits gives the same file and hash.

    Args:
        sql: gives `source`, `shard`, `row` and, if wanted, `weight` (above 0; 1 if not given); other columns of
            `samples` may stand beside them, so that `SELECT * FROM samples WHERE ...` will do.

    Raises:
        RequestError: the name or the SQL is wrong, or the rows are none, double, or not samples with status `ok`.
    """
    if not NAME.fullmatch(name):
        raise RequestError(f"selection {name!r}: a name is letters, digits, - _ and ., and begins with no dot")
    table = sample_table(corpus)
    with _connected(corpus, table) as connection:
        jobs = _jobs(corpus, table)
        known = {*table_schema(corpus.columns()).names, *JOB_COLUMNS.names, "contaminated"}
        chosen = _chosen(_run(connection, sql), known)
        connection.register("chosen", chosen)
        _check(connection, len(chosen))
        chosen = connection.sql("SELECT * FROM chosen ORDER BY source, shard, row").to_arrow_table()
    asked = {folder: jobs[folder].asked() for folder in _asked(sql) if folder in jobs}
    pinned = {"name": name, "query": sql, "rows": len(chosen), "commits": table.commits}
    about = canonical(pinned | ({"jobs": asked} if asked else {}))
    chosen = chosen.cast(SELECTION.with_metadata({"microdit": about}))
    found = Selection(name, digest := selection_hash(about, chosen), _selection_path(name, digest), len(chosen), sql)
    buffer = io.BytesIO()
    pq.write_table(chosen.combine_chunks(), buffer, compression="zstd")
    try:
        corpus.store.create(found.path, buffer.getvalue())
    except FileExistsError:
        load_selection(corpus, f"{name}@{digest}")  # it is the same, or damaged
    return found


def _chosen(result: pa.Table, known: set[str]) -> pa.Table:
    """The columns of a selection, in its types."""
    columns = {name.lower(): name for name in result.column_names}
    absent, unknown = {"source", "shard", "row"} - columns.keys(), columns.keys() - known - {"weight"}
    if absent or unknown or len(columns) != result.num_columns:
        raise RequestError(
            f"SQL: it gives the columns {result.column_names}; expected source, shard and row, and weight if wanted"
        )
    if not len(result):
        raise RequestError("SQL: it gives no rows; a selection has at least one")
    arrays = {name: result[columns[name]] for name in columns if name in SELECTION.names}
    arrays.setdefault("weight", pa.repeat(1.0, len(result)))
    for field in SELECTION:
        try:
            arrays[field.name] = pc.cast(arrays[field.name], field.type, safe=field.name != "weight")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RequestError(f"SQL: {field.name} must be {field.type}: {error}") from None
        if arrays[field.name].null_count:
            raise RequestError(f"SQL: {field.name} is null in {arrays[field.name].null_count} rows")
    weight = arrays["weight"]
    bad = pc.invert(pc.and_(pc.is_finite(weight), pc.greater(weight, 0)))
    if pc.any(bad).as_py():
        raise RequestError(f"SQL: a weight is {pc.filter(weight, bad)[0].as_py()}; expected finite numbers above 0")
    return pa.table([arrays[field.name] for field in SELECTION], names=SELECTION.names)


def _check(connection: duckdb.DuckDBPyConnection, rows: int) -> None:
    """Refuse rows that are no samples, have no image, or are there twice."""
    bad = connection.execute(
        "SELECT c.source, c.shard, c.row, s.reason, count(*) OVER () FROM chosen c "
        "LEFT JOIN samples s USING (source, shard, row) WHERE s.status IS DISTINCT FROM 'ok' ORDER BY ALL LIMIT 1"
    ).fetchone()
    if bad:
        source, shard, row, reason, count = bad
        raise RequestError(
            f"SQL: {count} of {rows} rows are no samples with status ok (the first: row {row} of shard {shard} of "
            f"source {source}: {reason or 'there is no such row'}); add WHERE status = 'ok'"
        )
    double = connection.execute(
        "SELECT source, shard, row, count(*) AS n FROM chosen GROUP BY ALL HAVING n > 1 ORDER BY ALL LIMIT 1"
    ).fetchone()
    if double:
        source, shard, row, count = double
        raise RequestError(f"SQL: row {row} of shard {shard} of source {source} is there {count} times; expected once")


def selection_hash(about: bytes, table: pa.Table) -> str:
    """The first 16 hex digits of the SHA-256 over the metadata and the rows (docs/corpus.md, section 6)."""
    digest = hashlib.sha256(about + b"\n")
    for batch in table.to_batches(max_chunksize=ROW_GROUP):
        weights = pc.dictionary_encode(batch["weight"])
        texts = pa.array([f"{weight:.9g}" for weight in weights.dictionary.to_pylist()], pa.string())
        lines = pc.binary_join_element_wise(
            batch["source"], batch["shard"], pc.cast(batch["row"], pa.string()), texts.take(weights.indices), "\t"
        )
        digest.update("".join(f"{line}\n" for line in lines.to_pylist()).encode())
    return digest.hexdigest()[:16]


def _selection_path(name: str, digest: str) -> str:
    return f"selections/{name}@{digest}.parquet"


def list_selections(corpus: Corpus) -> list[Selection]:
    """All selections of a corpus, by name and hash."""
    found = []
    for item in sorted(item.name for item in corpus.store.list("selections")):
        name, _, digest = item.removeprefix("selections/").removesuffix(".parquet").partition("@")
        with corpus.store.open(item) as file:
            found.append(_about(item, name, digest, pq.read_metadata(file).metadata or {}))
    return found


def _about(path: str, name: str, digest: str, metadata: dict[bytes, bytes]) -> Selection:
    try:
        about = json.loads(metadata[b"microdit"])
        return Selection(name, digest, path, int(about["rows"]), str(about["query"]))
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{path} is damaged: it does not say what it is; make the selection again") from None


def load_selection(corpus: Corpus, selection: str) -> pa.Table:
    """The rows of a selection: `source`, `shard`, `row` (int32), `weight` (float32), ordered by the first three.

    Args:
        selection: `name@hash`, or `name` if there is only one of that name.

    Raises:
        RequestError: there is none, there are several, or it is damaged.
    """
    there = sorted(
        item.name.removeprefix("selections/").removesuffix(".parquet") for item in corpus.store.list("selections")
    )
    found = [full for full in there if selection in (full, full.partition("@")[0])]
    if len(found) != 1:
        what = "there is no such selection" if not found else "there are several of that name"
        raise RequestError(
            f"selection {selection!r} of corpus {corpus.url}: {what}; "
            f"give one of: {', '.join(found or there) or 'none, make one with `microdit select`'}"
        )
    name, _, digest = found[0].partition("@")
    path = _selection_path(name, digest)
    try:
        table = pq.ParquetFile(io.BytesIO(corpus.store.get(path))).read()
        damaged = (
            not table.schema.equals(SELECTION)
            or selection_hash((table.schema.metadata or {}).get(b"microdit", b""), table) != digest
        )
    except (pa.ArrowException, OSError, ValueError):
        damaged = True
    if damaged:
        raise RequestError(
            f"corpus {corpus.url}: {path} is damaged; restore it from a copy, or remove it and select again"
        )
    return table
