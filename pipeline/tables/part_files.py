"""Parts of the sample table as files of this machine, held against each other before they are read."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.disk_cache import DiskCache
from microdit.pipeline.corpus.records import ObjectRef
from microdit.pipeline.corpus.shard_files import check_footer
from microdit.pipeline.tables.part_specs import ROWS, FieldGroup
from microdit.pipeline.tables.sample_parts import FOLDER, ROW_GROUP, private_folder
from microdit.pipeline.tables.sample_table import SampleTable, view_columns

CACHE_BYTES = 32 << 30  # at most, of copies of a bucket's parts; a third of the disk if that is less
DOWNLOADS = 4  # at once: each is in memory


class PartFiles:
    """The files of a table's parts: those of a corpus in a folder, or verified copies of a bucket's.

    Copies are kept in `microdit` in `$XDG_CACHE_HOME` or `~/.cache`; what has no room there goes to `spill`.
    """

    def __init__(self, corpus: Corpus, table: SampleTable, spill: Path):
        self.corpus, self.table, self.spill = corpus, table, spill
        self.declared = corpus.columns()
        self._rows: dict[int, int] = {}
        self._paths: dict[FieldGroup, dict[int, str]] = {}
        self._cache = _cache() if corpus.store.root is None else None

    @property
    def folders(self) -> list[str]:
        """The folders in which the files are: nothing in them is of another corpus."""
        root = [] if self.corpus.store.root is None else [str(self.corpus.store.root / FOLDER)]
        made = {str(Path(ref.name).parent) for refs in self.table.parts.values() for ref in refs if ref.name[:1] == "/"}
        return [*root, str(self.spill), str(private_folder()), *sorted(made)]

    def make(self, groups: Iterable[FieldGroup]) -> None:
        """Make the parts that are not there yet, which is cheapest for all that is needed at once."""
        self.table.make(self.corpus, groups)

    def paths(self, group: FieldGroup, runs: Sequence[int] | None = None) -> list[str]:
        """List the files of a group of fields, in the order of the rows.

        Args:
            runs: numbers of the parts that are wanted; by default all.

        Raises:
            RequestError: one is damaged, or has other rows than the images' one beside it.
        """
        self.make([group])
        refs, known = self.table.parts[group], self._paths.setdefault(group, {})
        runs = range(len(refs)) if runs is None else runs
        if missing := [number for number in runs if number not in known]:
            if group != ROWS:
                self.paths(ROWS, missing)
            schema = self.table.schemas[group]
            wanted = [(refs[number], self._rows.get(number)) for number in missing]
            files = threaded(lambda item: self._checked(*item, schema), wanted, DOWNLOADS)
            for number, (path, rows) in zip(missing, files, strict=True):
                known[number] = path
                self._rows[number] = rows
        return [known[number] for number in runs]

    def rows(self) -> list[int]:
        """Count the rows of each part. Raises as `paths`."""
        return [self._rows[number] for number, _ in enumerate(self.paths(ROWS))]

    def _checked(self, ref: ObjectRef, wanted: int | None, schema: pa.Schema) -> tuple[str, int]:
        """Return the file of a part and its number of rows, which is `wanted` if that is given."""
        try:
            path = self._local(ref)
            footer = pq.read_metadata(path)
            check_footer(footer, wanted, "the part of the images")
            if not footer.schema.to_arrow_schema().equals(schema):
                raise ValueError(f"its columns are {str(footer.schema.to_arrow_schema())[:200]!r}")
            return path, footer.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            raise RequestError(
                f"corpus {self.corpus.url}: {ref.name} is damaged ({first_line(error)}); remove the folder {FOLDER}, "
                "it is made again"
            ) from None

    def _local(self, ref: ObjectRef) -> str:
        """Return the file of a part; a copy is verified once, when it is made."""
        if Path(ref.name).is_absolute():
            return ref.name
        if self.corpus.store.root is not None:
            return str(self.corpus.store.root / ref.name)
        copy = self.spill / f"{ref.sha256}.parquet"
        if copy.is_file():
            return str(copy)
        if self._link(ref, copy):
            return str(copy)
        data = self.corpus.store.get_buffer(ref.name)
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise ValueError("it has another checksum")
        if self._cache is not None:
            self._cache.put(ref, data)
            if self._link(ref, copy):
                return str(copy)
        copy.write_bytes(data)
        return str(copy)

    def _link(self, ref: ObjectRef, copy: Path) -> bool:
        """Link what the cache has of a part, so that it stays while it is read; False if it has none, or cannot."""
        if self._cache is None or (file := self._cache.get(ref)) is None:
            return False
        file.close()
        with suppress(OSError):  # removed meanwhile, or another file system
            os.link(self._cache.folder / ref.sha256, copy)
            return True
        return False

    def batches(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """Read columns of the view in tables of at most `ROW_GROUP` rows, in the order of the rows."""
        wanted = {column.name: column for column in view_columns(self.declared) if column.name in names}
        groups = [ROWS, *(group for column in wanted.values() for group in column.groups)]
        groups = [group for group in dict.fromkeys(groups) if group in self.table.schemas]
        self.make(groups)
        files = {group: self.paths(group) for group in groups}
        fields = {group: [c.field for c in wanted.values() if c.groups == (group,)] for group in groups}
        if "id" in wanted:
            for group, name in zip(wanted["id"].groups, ("source", "key"), strict=True):
                fields[group].append(name)
        for number, rows in sorted(self._rows.items()):
            read = {
                group: pq.read_table(files[group][number], columns=list(dict.fromkeys(own)), partitioning=None)
                for group, own in fields.items()
                if own
            }
            arrays = {}
            for name in names:
                column = wanted[name]
                group = column.groups[-1]
                if name == "id":
                    arrays[name] = pc.binary_join_element_wise(read[ROWS]["source"], read[group]["key"], "/")
                elif group in read:
                    arrays[name] = read[group][column.field]
                else:
                    arrays[name] = pa.repeat(False, rows) if column.field == "ok" else pa.nulls(rows, column.type)
            run = pa.table(arrays)
            yield from (run.slice(start, ROW_GROUP) for start in range(0, rows, ROW_GROUP))


def read_batches(corpus: Corpus, table: SampleTable, names: Sequence[str]) -> Iterator[pa.Table]:
    """Read columns of the view `samples` in tables of at most `ROW_GROUP` rows, in the order of the rows."""
    with TemporaryDirectory(prefix="microdit-table-") as spill:
        yield from PartFiles(corpus, table, Path(spill)).batches(names)


def _cache() -> DiskCache | None:
    """Open the cache of copies; None if this machine has no room for one, or does not let it be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "microdit"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return DiskCache(folder, min(CACHE_BYTES, shutil.disk_usage(folder).free // 2))
    return None
