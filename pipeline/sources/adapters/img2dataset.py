"""`img2dataset`: a folder that img2dataset has written, as tars, parquet tables or files in folders."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.config.sources import Img2datasetSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.files.archives import members
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile, digest, listing
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample, FileSource
from microdit.pipeline.sources.joined_fields import as_text, fields_of
from microdit.pipeline.sources.members import IMAGES, extension_of, failed, fault_fields, is_image, text_of
from microdit.pipeline.sources.neighbours import samples_with_text

ROWS = 16  # of a table with images, read at once
STATS = "_stats.json"  # img2dataset writes it when a shard is complete
SUCCESS = "success"


class Img2dataset(FileSource):
    """The adapter `img2dataset`. Fields: all columns of the tables, but for the key, the caption and the image.

    Images that img2dataset itself could not fetch are no inputs; one that its table has and the shard lacks is
    `missing`. Shards without their `_stats.json` are not finished, and left out.
    """

    adapter = "img2dataset"
    text_options = frozenset({"caption"})
    has_names = True

    def __init__(self, name: str, options: Img2datasetSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self._unfinished: list[str] = []
        self._tables: dict[str, RemoteFile] = {}

    def listing(self) -> Listing:
        what = f"sources.{self.name}.folder"
        whole = list_files(f"{self._options.folder.rstrip('/')}/*", what)
        by_name = {file.name: file for file in whole.files}
        tables = [file for file in whole.files if file.name.endswith(".parquet")]
        shards = [file for file in whole.files if file.name.endswith(".tar")] or tables
        finished = [file for file in shards if f"{_number(file.name)}{STATS}" in by_name]
        if finished:
            self._unfinished = [file.name for file in shards if file not in finished]
        shards = finished or shards
        if not shards:
            raise RequestError(
                f"{what} = {self._options.folder!r}: it has neither tars nor parquet tables; expected a folder that "
                "img2dataset wrote, with 00000.tar or 00000.parquet in it"
            )
        self._tables = {_number(file.name): file for file in tables}
        rows = ((file.name, file.size, file.etag if "://" in file.url else "") for file in shards)
        return listing(shards, {**whole.identity, "files": digest(rows)})

    def details(self) -> dict[str, Any]:
        return {"caption": self._options.caption}

    @contextmanager
    def running(self, corpus: Corpus, report: Callable[[str], None]) -> Iterator[None]:
        if self._unfinished:
            report(
                f"source {self.name}: {len(self._unfinished):,} shards, such as {self._unfinished[0]}, have no "
                f"{STATS} and are left out: img2dataset has not finished them"
            )
        with super().running(corpus, report):
            yield

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        """Read the samples as the base class says."""
        if file.name.endswith(".tar"):
            yield from self._of_tar(path, file)
            return
        try:
            with pq.ParquetFile(path, pre_buffer=False) as table:
                names = table.schema_arrow.names
                image = next((name for name in IMAGES if name in names), None)
                row = 0
                for batch in table.iter_batches(ROWS):
                    alive()
                    for about in batch.to_pylist():
                        if about.get("status", SUCCESS) == SUCCESS:
                            data = about.pop(image) if image else _beside(path, about)
                            yield self._sample(about, data, f"row-{row}")
                        row += 1
        except pa.ArrowException as error:
            yield FileSample("", None, reason="damaged_archive", detail=" ".join(str(error).split())[:300])

    def _of_tar(self, path: Path, file: RemoteFile) -> Iterator[FileSample]:
        rows = self._rows(file)
        read = members(path, lambda name: is_image(name) or extension_of(name) == "txt", MAX_BYTES)
        for key, image, member in samples_with_text(read):
            about = rows.pop(key, None) or {"key": key}
            if image.data is None:
                yield failed(image, key)
                if image.reason == "damaged_archive":
                    return
                continue
            faults: dict[str, str] = {}
            text = text_of(member, "caption", faults)
            yield self._sample({"caption": text, **about}, image.data, image.name, faults)
        for key in rows:
            yield FileSample(key, None, origin=key, reason="missing", detail="the table has it, and the tar lacks it")

    def _rows(self, file: RemoteFile) -> dict[str, dict[str, Any]]:
        """Read the table beside a tar, by key: the images that were fetched. Empty if there is none."""
        table = self._tables.get(_number(file.name))
        if table is None:
            return {}
        with local_copy(table, self._scratch) as path:
            rows = pq.read_table(path).to_pylist()
        return {row["key"]: row for row in rows if row.get("status", SUCCESS) == SUCCESS and "key" in row}

    def _sample(
        self, about: Mapping[str, Any], data: bytes | None, origin: str, faults: dict[str, str] | None = None
    ) -> FileSample:
        faults = {} if faults is None else faults
        caption = as_text(about.get(self._options.caption), faults)
        others = (
            (name, value) for name, value in about.items() if name not in ("key", "status", self._options.caption)
        )
        fields = fields_of(others, faults) | fault_fields(faults)
        key = str(about.get("key") or "")
        if data is None:
            return FileSample(key, None, caption, origin, fields, "missing", "the table says that it was fetched")
        if len(data) > MAX_BYTES:
            detail = f"{len(data)} bytes, at most {MAX_BYTES} are read"
            return FileSample(key, None, caption, origin, fields, "too_large", detail)
        return FileSample(key, data, caption, origin, fields)


def _number(name: str) -> str:
    """Return the name of a shard, which its tar, its table and its statistics begin with."""
    return name.rpartition(".")[0]


def _beside(table: Path, about: Mapping[str, Any]) -> bytes | None:
    """Read the image of a row from the folder beside its table; None if it is not there."""
    key = str(about.get("key") or "")
    if not key or "/" in key or key.startswith("."):
        return None
    for extension in IMAGES:
        path = table.with_suffix("") / f"{key}.{extension}"
        if path.is_file():
            with path.open("rb") as file:
                return file.read(MAX_BYTES + 1)
    return None
