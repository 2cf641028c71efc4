"""MDS shards: round trips, files that the real library wrote, and damaged ones."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.mds.format import (
    INDEX,
    DamagedSample,
    DamagedShard,
    MdsWriter,
    ShardInfo,
    hasher,
    is_mds,
    merged_index,
    open_shard,
    read_index,
)
from tests.data.mds import make

ROOT = Path(__file__).parents[3]
DATA = ROOT / "tests/data/mds"
ROUND_TRIP = settings(max_examples=40, deadline=None, print_blob=True)
Sample = dict[str, bytes]


def read_all(folder: Path, columns: list[str]) -> list[Sample]:
    found = []
    for info in read_index(folder):
        with open_shard(folder, info) as shard:
            found += [dict(zip(columns, shard.read(i, columns), strict=True)) for i in range(info.samples)]
    return found


def write_all(folder: Path, samples: list[Sample], encodings: dict[str, str], **options: Any) -> list[ShardInfo]:
    folder.mkdir(parents=True, exist_ok=True)
    writer = MdsWriter(folder, encodings, **options)
    for sample in samples:
        writer.write(sample)
    writer.close()
    return read_index(folder)


@ROUND_TRIP
@given(
    encodings=st.dictionaries(
        st.text(min_size=1, max_size=8), st.sampled_from(["str", "bytes", "jpeg"]), min_size=1, max_size=5
    ),
    compression=st.sampled_from([None, "zstd"]),
    hashes=st.sampled_from([(), ("sha1",), ("md5", "sha256")]),
    size_limit=st.integers(300, 3000),
    data=st.data(),
)
def test_samples_come_back(
    encodings: dict[str, str],
    compression: Any,
    hashes: tuple[str, ...],
    size_limit: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("mds")
    values = st.fixed_dictionaries(dict.fromkeys(encodings, st.binary(max_size=900)))
    samples = data.draw(st.lists(values, max_size=8))
    infos = write_all(folder, samples, encodings, compression=compression, hashes=hashes, size_limit=size_limit)
    assert read_all(folder, list(encodings)) == samples
    assert [info.columns for info in infos] == [dict(sorted(encodings.items()))] * len(infos)
    for info in infos:
        assert info.samples == 1 or info.raw_data.bytes <= size_limit
        assert set(info.raw_data.hashes) == set(hashes)
        with open_shard(folder, info) as shard:  # in any order, and single columns
            name = info.column_names[-1]
            for i in reversed(range(info.samples)):
                assert shard.sizes(i)[name] == len(shard.read(i, [name])[0])


@pytest.mark.parametrize("kind", ["official", "workers"])
def test_what_the_library_wrote_is_read(kind: str) -> None:
    wanted = [make.encoded(s) for worker in range(len(make.COUNTS[kind])) for s in make.samples(kind, worker)]
    assert read_all(DATA / kind, list(wanted[0])) == wanted
    assert is_mds(DATA / kind)


def test_columns_of_fixed_size_have_no_size_in_the_sample(tmp_path: Path) -> None:
    """As the library lays out the encoding int: 8 bytes at their place in the order of the names."""
    head, body = (5).to_bytes(4, "little") + (3).to_bytes(4, "little"), b"early" + bytes(8) + b"zzz"
    start = 4 * 3
    raw = (1).to_bytes(4, "little") + start.to_bytes(4, "little") + (start + 24).to_bytes(4, "little") + head + body
    (tmp_path / "a.mds").write_bytes(raw)
    columns = {"column_names": ["a", "m", "z"], "column_encodings": ["str", "int", "bytes"]}
    entry = {"version": 2, "format": "mds", "samples": 1, **columns, "column_sizes": [None, 8, None]}
    index = {"version": 2, "shards": [{**entry, "raw_data": {"basename": "a.mds", "bytes": len(raw), "hashes": {}}}]}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert read_all(tmp_path, ["z", "a", "m"]) == [{"z": b"zzz", "a": b"early", "m": bytes(8)}]


def test_the_writer_writes_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    encodings = {"caption": "str", **dict.fromkeys(make.SIZES["workers"], "bytes")}
    for worker in range(2):
        samples = [make.encoded(sample) for sample in make.samples("workers", worker)]
        write_all(tmp_path / str(worker), samples, encodings, size_limit=10_000)
    (tmp_path / INDEX).write_bytes(merged_index(tmp_path, ["0", "1"]))
    files = sorted(path.relative_to(DATA / "workers") for path in (DATA / "workers").rglob("*.*"))
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")) == files
    for file in files:
        ours, theirs = (tmp_path / file).read_bytes(), (DATA / "workers" / file).read_bytes()
        assert ours == theirs or (file == Path(INDEX) and json.loads(ours) == json.loads(theirs))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_library_reads_what_is_written(tmp_path: Path, compression: Any) -> None:
    """Where it is: in this environment, or behind the Python that MICRODIT_STREAMING_PYTHON names."""
    python = os.environ.get("MICRODIT_STREAMING_PYTHON") or (sys.executable if find_spec("streaming") else "")
    if not python:
        pytest.skip("MosaicML Streaming is not here")
    samples = [make.encoded(s) for worker in range(2) for s in make.samples("workers", worker)]
    encodings = {"caption": "str", **dict.fromkeys(make.SIZES["workers"], "bytes")}
    for part, some in (("a", samples[:5]), ("b", []), ("c", samples[5:])):
        write_all(tmp_path / part, some, encodings, compression=compression, hashes=["sha256"], size_limit=10_000)
    (tmp_path / INDEX).write_bytes(merged_index(tmp_path, ["a", "b", "c"]))
    found = subprocess.run(
        [python, str(DATA / "make.py"), str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True, timeout=250
    )
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    wanted = [{name: hashlib.sha256(value).hexdigest() for name, value in sample.items()} for sample in samples]
    assert lines == wanted


def test_folders_of_workers_without_an_index_above_them(tmp_path: Path) -> None:
    shutil.copytree(DATA / "workers", tmp_path / "mds")
    merged = read_index(tmp_path / "mds")
    (tmp_path / "mds" / INDEX).unlink()
    assert read_index(tmp_path / "mds") == merged
    assert len(merged) == 5


def test_a_folder_that_the_index_does_not_name_is_not_passed_over(tmp_path: Path) -> None:
    shutil.copytree(DATA / "workers", tmp_path / "mds")
    shutil.copytree(DATA / "workers/1", tmp_path / "mds/2")
    with pytest.raises(RequestError, match=r"names no shard of 2, which has an index of its own"):
        read_index(tmp_path / "mds")


# -- damage ----------------------------------------------------------------------------------------------------------
def small(folder: Path, **options: Any) -> ShardInfo:
    (info,) = write_all(
        folder, [{"a": b"one", "b": b"x" * 50}, {"a": b"", "b": b"two"}], {"a": "str", "b": "bytes"}, **options
    )
    return info


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Path.unlink, "there is no such file"),
        (cut, "the index says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "the index says"),
        (flipped, "its sha1 is"),
        (lambda path: (path.unlink(), path.mkdir()), "there is no such file"),
    ],
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_damaged_file_is_told(tmp_path: Path, fault: Any, message: str, compression: Any) -> None:
    info = small(tmp_path, compression=compression, hashes=["sha1"])
    path = tmp_path / (info.zip_data or info.raw_data).basename
    fault(path)
    with pytest.raises(DamagedShard, match=message) as error, open_shard(tmp_path, info):
        pass
    assert str(error.value).startswith(path.name)


def test_a_shard_that_holds_another_number_of_samples(tmp_path: Path) -> None:
    info = small(tmp_path)
    for samples, message in ((3, "begins with 2"), (2**31, "cannot hold")):
        with (
            pytest.raises(DamagedShard, match=message),
            open_shard(tmp_path, info.model_copy(update={"samples": samples})),
        ):
            pass


def test_a_packed_shard_gives_no_more_than_the_index_says(tmp_path: Path) -> None:
    """A bomb is not unpacked; nor is one taken that has less, or that is no zstd at all."""
    info = small(tmp_path, compression="zstd")
    assert info.zip_data is not None
    path = tmp_path / info.zip_data.basename
    for data, message in (
        (pa.Codec("zstd").compress(bytes(100 << 20), asbytes=True), "unpacked it has more than"),
        (pa.Codec("zstd").compress(b"little", asbytes=True), "bytes less than"),
        (b"no zstd at all", "cannot be read"),
    ):
        path.write_bytes(data)
        bytes_told = info.zip_data.model_copy(update={"bytes": len(data)})
        told = info.model_copy(update={"zip_data": bytes_told})
        with pytest.raises(DamagedShard, match=message), open_shard(tmp_path, told):
            pass
    told = told.model_copy(update={"compression": "br"})
    with pytest.raises(DamagedShard, match="packed with 'br'; only zstd is read"), open_shard(tmp_path, told):
        pass


def test_an_unpacked_file_beside_the_packed_one_is_taken(tmp_path: Path) -> None:
    info = small(tmp_path, compression="zstd")
    raw = tmp_path / "raw"
    plain = small(raw, compression=None)
    assert info.zip_data is not None
    moved = info.model_copy(update={"raw_data": plain.raw_data})
    shutil.copy(raw / plain.raw_data.basename, tmp_path / plain.raw_data.basename)
    (tmp_path / info.zip_data.basename).unlink()
    with open_shard(tmp_path, moved) as shard:
        assert shard.read(0, ["a", "b"]) == [b"one", b"x" * 50]


@settings(max_examples=100, deadline=None, print_blob=True)
@given(at=st.integers(0, 400), value=st.binary(min_size=1, max_size=8))
def test_bytes_in_the_wrong_place_fail_a_sample_or_the_shard(
    at: int, value: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mds")
    info = small(folder)
    path = folder / info.raw_data.basename
    data = bytearray(path.read_bytes())
    at = at % len(data)
    data[at : at + len(value)] = value
    path.write_bytes(data[: info.raw_data.bytes])
    try:
        with open_shard(folder, info) as shard:
            for i in range(info.samples):
                try:
                    assert sum(map(len, shard.read(i, ["a", "b"]))) <= info.raw_data.bytes
                except DamagedSample as error:
                    assert str(error).startswith(f"sample {i} ")
    except DamagedShard as error:
        assert str(error).startswith(path.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basename": "../secret"}, "no path below the folder"),
        ({"basename": "/etc/passwd"}, "no path below the folder"),
        ({"basename": "a/../../b"}, "no path below the folder"),
        ({"bytes": -1}, "greater than or equal to 0"),
        ({"bytes": 2**32}, "less than 4294967296"),
        ({"samples": -1}, "greater than or equal to 0"),
        ({"column_sizes": [-8, None]}, "column sizes"),
        ({"column_sizes": [None]}, "with encodings"),
        ({"column_names": ["a", "a"]}, "with encodings"),
        ({"version": 1}, "Input should be 2"),
        ({"format": "json"}, "Input should be 'mds'"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    small(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    shard = index["shards"][0]
    (shard["raw_data"] if change.keys() & {"basename", "bytes"} else shard).update(change)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(RequestError, match=message) as error:
        read_index(tmp_path)
    assert str(tmp_path / INDEX) in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1, "shards": []}', '{"version": 2, "shards": {}}', "[" * 100_000, "\udcff"]
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RequestError, match="is no index of MDS shards"):
        read_index(tmp_path)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    assert not is_mds(tmp_path)
    with pytest.raises(RequestError, match=r"there is no index\.json in it"):
        read_index(tmp_path)


def test_a_sample_with_other_columns_is_not_written(tmp_path: Path) -> None:
    writer = MdsWriter(tmp_path, {"a": "str"})
    with pytest.raises(ValueError, match="expected \\['a'\\]"):
        writer.write({"b": b""})


def test_hashes_that_can_be_made() -> None:
    assert hasher("sha1") is not None
    assert hasher("shake_128") is None  # it has no length of its own
    assert hasher("no_such") is None
    if find_spec("xxhash"):
        assert hasher("xxh64") is not None
