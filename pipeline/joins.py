"""Tables to look samples up in by key: built once into the corpus, sorted, and read a part at a time.

Nothing is held in memory as a whole: rows are streamed through DuckDB's sort, which spills to the scratch folder, into
one parquet file whose row groups are small, and a look-up reads the one row group in which its key must be.
"""

import hashlib
import json
import shutil
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus import Corpus, canonical
from pipeline.errors import DamagedError, RequestError
from pipeline.join_readers import CUTS, READERS, Notes, Wanted
from pipeline.sources.remote import Listing, local_copy
from pipeline.store import Store
from pipeline.tables import Table, cached, publish

LAYOUT = 1  # of a join table; one of another layout is not taken
FOLDER = "tables/joins"
MEMORY = "512MB"  # of the sort; what is more goes to the scratch folder
THREADS = 2
SORTED_ROWS = 4096  # that come out of the sort at once
GROUP_ROWS, GROUP_BYTES = 5 * SORTED_ROWS, 16 << 20  # of a row group: what a look-up reads
KEPT = 4  # row groups that a process keeps of a table
SCRATCH, OLD_SCRATCH = "microdit-join-", 48 * 3600.0  # seconds
METADATA = b"microdit"

Value = Any
"""What a table says: str, int, float, bool or None; of jsonl lists and dictionaries too, of parquet these as JSON."""


@dataclass(frozen=True)
class JoinSpec:
    """A table of things to know about samples."""

    listing: Listing
    """Its files, read in order: where a key comes twice, the first one stays."""
    reader: str
    """`parquet`; `jsonl`, packed with gzip or not; `tar_txt`: `<key>.txt` files in a tar; `tar_jsonl`: .jsonl files in
    one."""
    key: str
    """The column with the key, dotted inside of structs; several, joined by `/`, as in `part_id/image_name`: then the
    keys are `12/0b4f.webp`. Put first what a unit's samples share, as neighbours are cheap. `tar_txt` has no such
    column: its keys are the names of the files."""
    fields: Mapping[str, str]
    """Name here: column there (dotted inside of structs). The one column of `tar_txt` is `txt`."""
    key_of: str = ""
    """What to take of a key: all (of `tar_txt` the stem), `stem` (`a/12.x.jpg` is `12`), or `path_dir_stem`
    (`./a/12.jpg` is `a/12`)."""


class JoinTable(Table):
    """A published join table, and what came of reading its files."""

    unreadable: int
    without_key: int
    repeated: int
    faults: list[str]
    """The first rows that could not be read."""
    damaged: list[str]
    """Files of which only the beginning could be read."""


def reader_of(listing: Listing, key: str | None, what: str) -> str:
    """How to read files with such names; a tar has jsonl inside if a column is named for the key, and else texts.

    Raises:
        RequestError: the name of `what`'s first file says nothing that is known.
    """
    name = listing.files[0].name.lower()
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(packed)
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return "jsonl"
    if name.endswith((".tar", ".tgz")):
        return "tar_txt" if key is None else "tar_jsonl"
    raise RequestError(
        f"{what}: {listing.files[0].name}: expected .parquet, .jsonl or .jsonl.gz, or .tar, .tar.gz or .tgz"
    )


def table_name(spec: JoinSpec) -> str:
    """Where a table lies in a corpus, without the ending: equal for equal files read in the same way."""
    about = {
        "layout": LAYOUT,
        "identity": spec.listing.identity,
        "files": [[file.name, file.size, file.etag] for file in spec.listing.files],
        "reader": spec.reader,
        "key": spec.key,
        "fields": list(map(list, spec.fields.items())),
        "key_of": spec.key_of,
    }
    return f"{FOLDER}/{hashlib.sha256(canonical(about)).hexdigest()}"


# -- building --------------------------------------------------------------------------------------------------------


def build(corpus: Corpus, spec: JoinSpec, scratch: Path, say: Callable[[str], None]) -> JoinTable:
    """Have the table in the corpus. If it is there, nothing is read.

    Args:
        scratch: a folder for downloads and for what the sort spills, about as much as the texts are.
        say: told every few seconds how far it is, and at the end what could not be read.

    Raises:
        RequestError: a file cannot be read as what it is said to be, has not the columns, or no row with a key.
    """
    base = table_name(spec)
    if (found := cached(corpus, base, JoinTable)) is not None:
        return found
    others = f" and {len(spec.listing.files) - 1} more" if len(spec.listing.files) > 1 else ""
    notes = Notes(say, f"join table {spec.listing.files[0].name}{others}")
    say(f"{notes.label}: reading")
    repeated = 0

    def write(path: Path) -> int:
        nonlocal repeated
        with _spill(scratch) as spill, closing(_read(spec, scratch, notes)) as batches:
            rows, repeated = _write(path, _sorted(batches, spill, notes), spec, notes)
        return rows

    def record(object: Any, rows: int) -> JoinTable:
        return JoinTable(object=object, rows=rows, repeated=repeated, **_counts(notes))

    table = publish(corpus, base, write, record)
    for line in _told(table):
        say(f"{notes.label}: {line}")
    return table


def is_built(corpus: Corpus, spec: JoinSpec) -> bool:
    return cached(corpus, table_name(spec), JoinTable) is not None


def _counts(notes: Notes) -> dict[str, Any]:
    return {
        "unreadable": notes.unreadable,
        "without_key": notes.without_key,
        "faults": notes.faults,
        "damaged": notes.damaged,
    }


def _told(table: JoinTable) -> Iterator[str]:
    yield f"{table.rows:,} keys"
    if table.unreadable:
        yield f"{table.unreadable:,} rows could not be read, the first: {'; '.join(table.faults)}"
    if table.without_key:
        yield f"{table.without_key:,} rows have no key"
    if table.repeated:
        yield f"{table.repeated:,} rows repeat a key, of which the first row counts"
    if table.damaged:
        yield f"only the beginning could be read of {'; '.join(table.damaged)}"


def _read(spec: JoinSpec, scratch: Path, notes: Notes) -> Generator[pa.RecordBatch]:
    """All files' rows in order, numbered: `n`, `key`, `f0`, `f1`, ... in the types of the first file."""
    if spec.reader == "tar_txt" and set(spec.fields.values()) != {"txt"}:
        raise RequestError(f"{notes.label}: its one column is txt; asked for: {', '.join(spec.fields.values())}")
    wanted = Wanted(tuple(spec.key.split("/")), CUTS[spec.key_of], tuple(spec.fields.values()))
    number, schema = 0, None
    for file in spec.listing.files:
        with local_copy(file, scratch) as path:
            for batch in READERS[spec.reader](path, file.name, wanted, notes):
                if schema is None:
                    schema = batch.schema
                if batch.schema != schema:
                    try:
                        batch = batch.cast(schema)
                    except pa.ArrowException as error:
                        raise RequestError(f"{notes.label}: {file.name} has other types: {error}") from error
                numbers = pa.array(range(number, number + len(batch)), pa.int64())
                number += len(batch)
                yield pa.record_batch([numbers, *batch.columns], ["n", *batch.schema.names])
    if not number:
        why = "; ".join([*notes.faults[:1], *notes.damaged[:1]]) or f"{notes.without_key} rows have no key"
        raise RequestError(f"{notes.label}: no row can be used ({why})")


@contextmanager
def _spill(scratch: Path) -> Iterator[Path]:
    """A folder for the sort; what killed builds left there long ago is removed."""
    try:
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in scratch.glob(f"{SCRATCH}*"):
            with suppress(OSError):  # another process was faster
                if time.time() - old.stat().st_mtime > OLD_SCRATCH:
                    shutil.rmtree(old)
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=scratch))
    except OSError as error:
        raise RequestError(
            f"scratch folder {scratch}: it cannot be written ({error.strerror}); set resources.scratch to another one"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sorted(batches: Iterator[pa.RecordBatch], spill: Path, notes: Notes) -> Iterator[pa.RecordBatch]:
    """The rows by key and number. What the readers raise is raised here as it is, and not as DuckDB's."""
    import duckdb

    first = next(batches)
    raised: list[BaseException] = []

    def rows() -> Iterator[pa.RecordBatch]:
        try:
            yield first
            yield from batches
            notes.say(f"{notes.label}: {notes.rows:,} rows read; sorting")
        except BaseException as error:
            raised.append(error)
            raise

    settings: dict[str, Any] = {"memory_limit": MEMORY, "threads": THREADS, "temp_directory": str(spill)}
    with duckdb.connect(config=settings) as database:
        database.register("rows", pa.RecordBatchReader.from_batches(first.schema, rows()))
        try:
            fields = ", ".join(first.schema.names[1:])
            yield from database.sql(f"SELECT {fields} FROM rows ORDER BY key, n").to_arrow_reader(SORTED_ROWS)
        except duckdb.Error as error:
            if raised:
                raise raised[0] from None
            raise OSError(f"{notes.label}: it cannot be sorted in {spill}: {error}") from error


def _write(path: Path, batches: Iterator[pa.RecordBatch], spec: JoinSpec, notes: Notes) -> tuple[int, int]:
    """Write sorted rows, of equal keys the first one alone; gives the numbers of rows, and of those left out."""
    rows = repeated = 0
    last: str | None = None
    firsts: list[str] = []
    waiting: list[pa.RecordBatch] = []
    writer: pq.ParquetWriter | None = None

    def flush() -> None:
        nonlocal writer, waiting
        if waiting:
            table = pa.Table.from_batches(waiting).rename_columns(["key", *spec.fields])
            if writer is None:
                writer = pq.ParquetWriter(
                    path, table.schema, compression="zstd", use_dictionary=False, write_statistics=False
                )
            firsts.append(table["key"][0].as_py())
            writer.write_table(table, len(table))
            waiting = []

    try:
        for batch in batches:
            keys = batch.column("key")
            new = pc.not_equal(keys, pa.concat_arrays([pa.array([last], pa.string()), keys[:-1]]))
            kept = batch.filter(pc.fill_null(new, True))
            last = keys[-1].as_py()
            rows, repeated = rows + len(kept), repeated + len(batch) - len(kept)
            waiting.append(kept)
            if sum(map(len, waiting)) >= GROUP_ROWS or sum(each.nbytes for each in waiting) >= GROUP_BYTES:
                flush()
        flush()
        assert writer is not None  # there is a row at least
        about = {"rows": rows, "repeated": repeated, "json": spec.reader in ("jsonl", "tar_jsonl"), "first": firsts}
        writer.add_key_value_metadata({METADATA: json.dumps(about | _counts(notes))})
    finally:
        if writer is not None:
            writer.close()
    return rows, repeated


# -- looking up ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Open:
    file: pq.ParquetFile
    firsts: list[str]
    """The first key of each row group."""
    json: bool


class Joined:
    """A table that was built, opened by the first look-up. Picklable; not for several threads at once."""

    def __init__(self, store: Store, spec: JoinSpec):
        self._store, self._base, self._names = store, table_name(spec), tuple(spec.fields)
        self._label = spec.listing.files[0].name
        self._open: _Open | None = None
        self._groups: OrderedDict[int, tuple[list[str], pa.Table]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_groups": OrderedDict()}

    def get(self, key: str) -> dict[str, Value] | None:
        """The fields of a key, or None if the table does not have it. Next to the last key asked it costs little.

        Raises:
            FileNotFoundError: the table was not built, or somebody removed it.
            DamagedError: it cannot be understood.
        """
        table = self._opened()
        number = bisect_right(table.firsts, key) - 1
        if number < 0:
            return None
        keys, rows = self._group(table, number)
        at = bisect_left(keys, key)
        if at == len(keys) or keys[at] != key:
            return None
        values = (rows.column(i + 1)[at].as_py() for i in range(len(self._names)))
        if table.json:
            values = (None if value is None else json.loads(value) for value in values)
        return dict(zip(self._names, values, strict=True))

    def get_many(self, keys: Iterable[str]) -> dict[str, dict[str, Value]]:
        """Of those keys that the table has the fields; each part of the table is read at most once. Errors as `get`."""
        found = ((key, self.get(key)) for key in sorted(set(keys)))
        return {key: fields for key, fields in found if fields is not None}

    def _opened(self) -> _Open:
        if self._open is None:
            about = "remove the folder tables/joins and build again"
            try:
                name = JoinTable.parse(self._store.get(f"{self._base}.json")).object.name
                file = pq.ParquetFile(self._store.open(name))
                found = json.loads(file.metadata.metadata[METADATA])
                self._open = _Open(file, list(found["first"]), bool(found["json"]))
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"corpus {self._store.url}: the join table of {self._label} is not there ({self._base}.json); "
                    "`microdit build` makes it again"
                ) from None
            except (ValueError, KeyError, pa.ArrowException) as error:
                raise DamagedError(f"corpus {self._store.url}: {self._base} is damaged ({error}); {about}") from error
        return self._open

    def _group(self, table: _Open, number: int) -> tuple[list[str], pa.Table]:
        if number in self._groups:
            self._groups.move_to_end(number)
        else:
            rows = table.file.read_row_group(number)
            self._groups[number] = rows.column(0).to_pylist(), rows
            while len(self._groups) > KEPT:
                self._groups.popitem(last=False)
        return self._groups[number]


__all__ = ["JoinSpec", "JoinTable", "Joined", "build", "is_built", "reader_of", "table_name"]
