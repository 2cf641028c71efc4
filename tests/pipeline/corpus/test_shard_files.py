"""Tars and sidecars there and back, with bytes that depend on the samples alone."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.shard_files import (
    SCALAR_TYPES,
    SIDECAR,
    TarWriter,
    read_table,
    read_tar,
    sidecar_schema,
    sidecar_table,
    write_table,
)

KEYS = st.from_regex(r"[A-Za-z0-9_-]{1,80}", fullmatch=True)

ROUND_TRIP = settings(max_examples=60, deadline=None, print_blob=True)


@ROUND_TRIP
@given(
    extensions=st.lists(st.sampled_from(["jpg", "json", "npy", "latent.npy", "txt"]), min_size=1, unique=True),
    keys=st.lists(KEYS, unique=True, max_size=8),
    data=st.data(),
)
def test_a_tar_gives_back_what_was_put_in(
    extensions: list[str], keys: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    members = st.binary(max_size=1100)
    samples = [(key, {extension: data.draw(members) for extension in extensions}) for key in keys]
    folder = tmp_path_factory.mktemp("tar")
    written = []
    for name in ("one", "two"):
        writer = TarWriter(folder / name)
        places = [writer.add(key, content) for key, content in samples]
        writer.close()
        written.append((folder / name).read_bytes())
    assert written[0] == written[1]
    assert list(read_tar(io.BytesIO(written[0]))) == samples
    for (_, content), (offset, size) in zip(samples, places, strict=True):
        assert written[0][offset : offset + size] == content[extensions[0]]
    with tarfile.open(folder / "one") as tar:
        assert [info.name for info in tar] == [f"{key}.{extension}" for key in keys for extension in extensions]
        assert {(info.mtime, info.uid, info.gid, info.mode) for info in tar} <= {(0, 0, 0, 0o644)}


def test_offsets_are_right_behind_a_member_without_bytes(tmp_path: Path) -> None:
    writer = TarWriter(tmp_path / "tar")
    empty = array_bytes(np.zeros((0, 384), np.float16))
    places = [writer.add("a", {"bin": b""}), writer.add("b", {"bin": empty}), writer.add("c", {"bin": b"x" * 512})]
    writer.close()
    data = (tmp_path / "tar").read_bytes()
    assert [data[offset : offset + size] for offset, size in places] == [b"", empty, b"x" * 512]


@pytest.mark.parametrize(
    ("members", "message"),
    [({}, "members are \\[\\]"), ({"png": b"x"}, "members are \\['png'\\], expected \\['jpg'\\]")],
)
def test_samples_of_a_tar_have_the_same_members(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    writer = TarWriter(tmp_path / "tar")
    writer.add("a", {"jpg": b"1"})
    with pytest.raises(ValueError, match=message):
        writer.add("b", members)
    writer.add("c", {"jpg": b"2"})
    writer.close()
    assert list(read_tar(io.BytesIO((tmp_path / "tar").read_bytes()))) == [("a", {"jpg": b"1"}), ("c", {"jpg": b"2"})]


@pytest.mark.parametrize("cut", [700, 1200])
def test_a_cut_tar_is_an_error(tmp_path: Path, cut: int) -> None:
    writer = TarWriter(tmp_path / "tar")
    writer.add("a", {"bin": b"x" * 900})
    writer.close()
    with pytest.raises(tarfile.TarError):
        list(read_tar(io.BytesIO((tmp_path / "tar").read_bytes()[:cut])))


def test_a_member_that_is_no_file_is_an_error() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    buffer.seek(0)
    with pytest.raises(ValueError, match=r"a\.jpg is no regular file"):
        list(read_tar(buffer))


VALUES = {
    "string": st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float32": st.floats(width=32, allow_nan=False),
    "float64": st.floats(allow_nan=False),
    "bool": st.booleans(),
}

assert VALUES.keys() == SCALAR_TYPES.keys()


@ROUND_TRIP
@given(
    scalars=st.dictionaries(
        st.from_regex(r"s_[a-z]{1,6}", fullmatch=True), st.sampled_from(sorted(VALUES)), max_size=4
    ),
    keys=st.lists(KEYS, unique=True, max_size=6),
    data=st.data(),
)
def test_a_sidecar_gives_back_its_rows(
    scalars: dict[str, str], keys: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = []
    for row, key in enumerate(keys):
        line = {name: data.draw(st.none() | VALUES[kind]) for name, kind in scalars.items()}
        if data.draw(st.booleans()):
            rows.append({"row": row, "key": key, "status": "ok", "offset": 512, "size": 3, **line})
        else:
            rows.append({"row": row, "key": key, "status": "failed", "reason": "r", "detail": "d", **line})
    table = sidecar_table(data.draw(st.permutations(rows)), scalars)
    paths = [tmp_path_factory.mktemp("sidecar") / "a.parquet" for _ in range(2)]
    for path in paths:
        write_table(path, table)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    back = read_table(paths[0].read_bytes())
    assert back.schema.equals(sidecar_schema(scalars))
    absent = dict.fromkeys([*SIDECAR.names, *scalars])
    assert back.to_pylist() == [absent | row for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, "a"), (2, "b")], "rows must be 0 to 1"),
        ([(0, "a"), (0, "b")], "rows must be 0 to 1"),
        ([(1, "a")], "rows must be 0 to 0"),
        ([(0, "a"), (1, "b"), (2, "b")], "key 'b' is there 2 times"),
    ],
)
def test_rows_and_keys_are_whole(rows: list[tuple[int, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sidecar_table([{"row": row, "key": key, "status": "ok"} for row, key in rows], {})


def test_an_undeclared_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['hight'\] are not declared.*\['height'\]"):
        sidecar_table([{"row": 0, "key": "a", "status": "ok", "hight": 1}], {"height": "int32"})


def test_a_scalar_of_another_type_is_refused() -> None:
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        sidecar_table([{"row": 0, "key": "a", "status": "ok", "height": "tall"}], {"height": "int32"})
