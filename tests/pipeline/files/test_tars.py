"""Tars: whole ones are read in any compression, damaged ones up to the damage, bombs are refused."""

import gzip
import io
import os
import random
import tarfile
import zlib
from pathlib import Path

import pytest

from microdit.pipeline.files import tars
from microdit.pipeline.files.tars import Member
from tests.pipeline.helpers.archives import FILES, PACKED, bounded, good, made_tar, read


@pytest.mark.parametrize("packed", PACKED)
def test_a_tar_is_read_whole_whatever_it_is_packed_with_and_named(tmp_path: Path, packed: str):
    assert read(tmp_path / "wrong.zip", PACKED[packed](made_tar(FILES))) == [Member(n, d) for n, d in FILES.items()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_no_paths(tmp_path: Path, format: int):
    names = ["../../etc/passwd", "/etc/x.jpg", "./a.jpg", "d/" * 40 + "e" * 90 + ".jpg", "dé/ü.jpg", "a\nb.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names.append("f" * 5000 + ".jpg")
    files = {name: name.encode() for name in names}
    assert good(read(tmp_path / "x", made_tar(files, format))) == files
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize("packed", ["tar", "gz", "bz2", "xz", "zst"])
def test_a_tar_that_is_cut_anywhere_keeps_what_came_before(tmp_path: Path, packed: str):
    tar = made_tar(FILES)
    data, names = PACKED[packed](tar), list(FILES)
    ends = [512, *(tar.index(FILES[name]) + len(FILES[name]) for name in names[1:])]
    marked = -(-ends[-1] // 512) * 512 + 512
    for cut in [*range(0, 1030, 103), *random.Random(1).sample(range(len(data)), 60)]:
        found = read(tmp_path / "x", data[:cut])
        whole = sum(end <= cut for end in ends) if packed == "tar" else len(good(found))
        assert good(found) == {name: FILES[name] for name in names[:whole]}
        damage = [] if packed == "tar" and cut >= marked else ["damaged_archive"]
        assert [m.reason for m in found] == [None] * whole + damage


def test_a_cut_between_two_members_is_seen(tmp_path: Path):
    tar = made_tar({"a.jpg": b"x" * 512, "b.jpg": b"y" * 512})
    [first, last] = read(tmp_path / "x", tar[:1024])
    assert (first.data, last.reason) == (b"x" * 512, "damaged_archive")
    assert "without the mark of its end" in last.detail and "'a.jpg'" in last.detail


def test_a_hole_of_zeros_is_seen(tmp_path: Path):
    tar = bytearray(made_tar({f"{i}.jpg": bytes([i + 65]) * 3000 for i in range(6)}))
    tar[7000:9000] = bytes(2000)
    found = read(tmp_path / "x", bytes(tar))
    assert found[-1].reason == "damaged_archive" and len(good(found)) == 2


def test_two_tars_one_behind_the_other(tmp_path: Path):
    assert list(good(read(tmp_path / "x", made_tar({"a": b"1"}) + made_tar({"b": b"2"})))) == ["a", "b"]


def test_links_devices_and_folders(tmp_path: Path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, kind in enumerate((tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, b"3", b"6")):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last.jpg"))
    found = read(tmp_path / "x", buffer.getvalue())
    assert [(m.name, m.reason) for m in found] == [
        *((f"{n}.jpg", "not_a_file") for n in range(1, 6)),
        ("last.jpg", None),
    ]


def test_a_sparse_file_of_a_tar_is_passed_over(tmp_path: Path):
    header = tarfile.TarInfo("sparse.jpg")
    header.size, header.type = 600, b"S"
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    more = bytes(504) + b"\1" + bytes(7) + bytes(512)
    found = read(tmp_path / "x", bytes(block) + more + bytes(1024) + made_tar({"b": b"1"}))
    assert [(m.name, m.reason) for m in found] == [("sparse.jpg", "not_a_file"), ("b", None)]


def test_a_gzip_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tars, "FREE_BYTES", 8 << 20)
    info = tarfile.TarInfo("zeros.jpg")
    info.size = 2 << 30
    packer = zlib.compressobj(wbits=31)
    with (tmp_path / "x").open("wb") as file:
        file.write(packer.compress(made_tar({"a": b"1"})[:1024] + info.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(60):
            file.write(packer.compress(bytes(1 << 20)))
        file.write(packer.flush())
    found = bounded(tmp_path / "x")
    assert [m.reason for m in found] == [None, "damaged_archive"] and "bomb" in found[-1].detail


def test_a_tar_of_nothing_but_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tars, "MAX_PADDING", 4 << 20)
    (tmp_path / "x").write_bytes(made_tar({"a": b"1"}))
    os.truncate(tmp_path / "x", 1 << 32)
    found = bounded(tmp_path / "x")
    assert [m.reason for m in found] == [None, "damaged_archive"] and "zeros" in found[-1].detail


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_bomb_of_headers(tmp_path: Path, kind: bytes):
    info = tarfile.TarInfo("@LongLink")
    info.type, info.size = kind, 1 << 30
    [one] = read(tmp_path / "x", info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 21))
    info.size = 400
    many = (info.tobuf(tarfile.GNU_FORMAT) + b"11 path=ab\n".ljust(512, b"\0")) * 3000
    [other] = read(tmp_path / "x", many + made_tar({"a": b"1"}))
    assert (one.reason, other.reason) == ("damaged_archive", "damaged_archive")
    assert "names and records" in one.detail and "names and records" in other.detail


def test_gzip_streams_with_nothing_in_them(tmp_path: Path):
    [member] = read(tmp_path / "x", gzip.compress(b"") * 20_000)
    assert member.reason == "damaged_archive"


def test_a_size_that_nobody_can_have(tmp_path: Path):
    for size in (1 << 62, 1 << 87):
        info = tarfile.TarInfo("a")
        info.size = size
        found = read(tmp_path / "x", info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        assert [m.reason for m in found] == ["damaged_archive"]
