"""Published tables that no program of ours wrote: held against their records before they are read."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.shard_files import ROW_BYTES, TABLE_BYTES
from microdit.pipeline.selection.selections import load_selection, select
from microdit.pipeline.selection.view import query
from microdit.pipeline.tables.published import Table, open_table
from microdit.pipeline.tables.sample_table import sample_table
from tests.pipeline.helpers.small_corpus import fill, make_corpus, replace


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    made = make_corpus(tmp_path / "corpus")
    fill(made, shards=1, columns=("captions/source",))
    return made


def parquet(table: pa.Table, repeats: int = 1) -> bytes:
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        for _ in range(repeats):
            writer.write_table(table)
    return buffer.getvalue()


def as_struct(table: pa.Table) -> pa.Table:
    number = table.schema.get_field_index("caption")
    return table.set_column(number, "caption", pa.array([{"a": 1}] * len(table)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: parquet(table, 50), "it has 300 rows, the part of the images says 6"),
        (lambda table: parquet(as_struct(table)), "its columns are"),
        (lambda table: parquet(table.rename_columns(["tokens"])), "its columns are"),
        (lambda table: b"PAR1", ""),
    ],
)
def test_a_sample_table_of_anything(corpus: Corpus, change, message: str) -> None:
    name = sample_table(corpus, reads=None).parts["captions/source", "caption"][0].name
    table = pq.read_table(io.BytesIO(corpus.store.get(name)))
    replace(corpus, name, change(table))
    with pytest.raises(
        RequestError, match=rf"{name} is damaged \(.*{message}.*\); remove the folder tables/samples, it is"
    ):
        query(corpus, "SELECT * FROM samples")


def test_rows_that_would_fill_the_memory_are_not_read(corpus: Corpus) -> None:
    one = pa.table({"x": pa.array([b"\0" * 1000]).take(pa.array([0] * 1000))})
    huge = pa.table({"x": pa.array([bytes(ROW_BYTES * 1000)] * 6)})
    assert huge.nbytes > TABLE_BYTES + 6 * ROW_BYTES
    for content, rows, message in (
        (one, 999, "1,000 rows, its record says 999"),
        (huge, 6, "uncompressed 6 of its rows have"),
    ):
        name = f"tables/{'0' * 64}.20260101T000000-{rows:08d}.parquet"
        buffer = io.BytesIO()
        pq.write_table(content, buffer, use_dictionary=False)
        corpus.store.create(name, buffer.getvalue())
        record = Table.parse(json.dumps({"object": {"name": name, "size": 1, "sha256": ""}, "rows": rows}).encode())
        with pytest.raises(RequestError, match=rf"is damaged \(.*{message}"):
            open_table(corpus, record)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x", "{base}./../../../x.parquet", "corpus.json"])
def test_a_record_names_tables_alone(name: str) -> None:
    base = f"tables/{'0' * 64}"
    about = {"object": {"name": name.format(base=base), "size": 1, "sha256": ""}, "rows": 1}
    with pytest.raises(ValueError, match="which is no table"):
        Table.parse(json.dumps(about).encode())


@pytest.mark.parametrize("name", ["x", "0.1.parquet", f"{'0' * 64}.{'0' * 64}.parquet"])
def test_other_files_among_the_parts_are_not_read(corpus: Corpus, name: str) -> None:
    path = Path(corpus.url, "tables/samples", name)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not ours")
    assert query(corpus, "SELECT count(*) AS n FROM samples")["n"].to_pylist() == [6]
    assert path.read_bytes() == b"not ours"


def test_a_selection_of_more_rows_than_it_says(corpus: Corpus) -> None:
    chosen = select(corpus, "all", "SELECT * FROM samples WHERE status = 'ok'")
    table = pq.read_table(io.BytesIO(corpus.store.get(chosen.path)))
    replace(corpus, chosen.path, parquet(table, 1000))
    with pytest.raises(RequestError, match="is damaged; restore it from a copy"):
        load_selection(corpus, "all")
