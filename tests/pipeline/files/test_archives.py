"""Archives that nobody vouches for: all of a good one, what is before the broken place of a bad one, and a reason."""

import bz2
import gzip
import io
import lzma
import os
import random
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microdit.pipeline.files import tars
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.tars import Member, tar_members
from microdit.pipeline.files.zips import zip_members

MOST = 1 << 20

REASONS = {
    "too_large", "not_a_file", "encrypted", "unsupported", "damaged_member", "bomb", "damaged_archive", None,
}  # fmt: skip


def every(name: str) -> bool:
    return True


def made_tar(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def made_zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "tar": lambda data: data,
    "gz": gzip.compress,
    "gz in two": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]) + bytes(100),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}

FILES = {f"a/{i:03d}.jpg": random.Random(i).randbytes(700 * i) for i in range(12)}


def read(path: Path, data: bytes, wanted: Callable[[str], bool] = every, most: int = MOST) -> list[Member]:
    path.write_bytes(data)
    return list(members(path, wanted, most))


def good(found: list[Member]) -> dict[str, bytes]:
    return {member.name: member.data for member in found if member.data is not None}


@pytest.mark.parametrize("packed", PACKED)
def test_a_tar_is_read_whole_whatever_it_is_packed_with_and_named(tmp_path: Path, packed: str):
    assert read(tmp_path / "wrong.zip", PACKED[packed](made_tar(FILES))) == [Member(n, d) for n, d in FILES.items()]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_whole_whatever_it_is_named(tmp_path: Path, method: int):
    assert read(tmp_path / "wrong.tar", made_zip(FILES, method)) == [Member(n, d) for n, d in FILES.items()]


@pytest.mark.parametrize("make", [made_tar, made_zip])
def test_what_is_not_wanted_is_passed_over(tmp_path: Path, make: Callable[[dict[str, bytes]], bytes]):
    found = read(tmp_path / "x", make(FILES), lambda name: name.endswith("7.jpg"))
    assert found == [Member("a/007.jpg", FILES["a/007.jpg"])]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_no_paths(tmp_path: Path, format: int):
    names = ["../../etc/passwd", "/etc/x.jpg", "./a.jpg", "d/" * 40 + "e" * 90 + ".jpg", "dé/ü.jpg", "a\nb.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names.append("f" * 5000 + ".jpg")
    files = {name: name.encode() for name in names}
    assert good(read(tmp_path / "x", made_tar(files, format))) == files
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=120).filter(
            lambda name: name.strip(".")
        ),
        st.binary(max_size=2000),
        max_size=6,
    ),
    st.sampled_from(["tar", "gnu", "zip", "stored"]),
)
def test_what_python_writes_comes_back(tmp_path: Path, files: dict[str, bytes], kind: str):
    if kind in ("zip", "stored"):
        data = made_zip(files, zipfile.ZIP_DEFLATED if kind == "zip" else zipfile.ZIP_STORED)
    else:
        data = made_tar(files, tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT)
    assert [(m.name, m.data, m.reason) for m in read(tmp_path / "x", data)] == [(n, d, None) for n, d in files.items()]


# -- cut and damaged -------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_that_is_cut_anywhere_keeps_what_came_before(tmp_path: Path, method: int):
    data = made_zip(FILES, method)
    directory = data.index(b"PK\1\2")
    ends = [data.index(b"PK\3\4", 1 + data.index(name.encode())) for name in list(FILES)[:-1]] + [directory]
    for cut in [*range(0, 1000, 99), *random.Random(1).sample(range(len(data) - 1), 60)]:
        found = read(tmp_path / "x.zip", data[:cut])
        whole = sum(end <= cut for end in ends)
        assert good(found) == dict(list(FILES.items())[:whole])
        assert [m.reason for m in found] == [None] * whole + ["damaged_archive"]


def test_a_damaged_member_of_a_zip_fails_alone(tmp_path: Path):
    data = bytearray(made_zip(FILES, zipfile.ZIP_STORED))
    data[data.index(FILES["a/005.jpg"]) + 9] ^= 1
    data[data.index(b"PK\3\4", data.index(FILES["a/007.jpg"]))] ^= 1
    found = read(tmp_path / "x", bytes(data))
    assert {m.name: m.reason for m in found if m.reason} == {
        "a/005.jpg": "damaged_member",
        "a/008.jpg": "damaged_member",
    }
    assert len(good(found)) == len(FILES) - 2


KINDS = {
    **{packed: PACKED[packed](made_tar(FILES)) for packed in ("tar", "gz", "bz2", "xz", "zst")},
    "pax": made_tar({"ü" * 200 + str(i): data for i, data in enumerate(FILES.values())}),
    "zip": made_zip(FILES),
    "stored": made_zip(FILES, zipfile.ZIP_STORED),
}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(KINDS)), st.randoms(use_true_random=False))
def test_damage_of_any_kind_ends_with_a_reason(tmp_path: Path, kind: str, chance: random.Random):
    data = bytearray(KINDS[kind])
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.choice([chance.randrange(len(data)), chance.randrange(min(len(data), 2048)), len(data) - 1])
        match chance.randrange(4):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at : at + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
            case 2:
                del data[at : at + chance.randrange(1, 600)]
            case 3:
                data[at:at] = chance.randbytes(chance.randrange(1, 600))
        data = data or bytearray(1)
    found = read(tmp_path / "x", bytes(data))
    assert {member.reason for member in found} <= REASONS
    assert all((member.data is None) == (member.reason is not None) for member in found)
    assert all(member.reason != "damaged_archive" for member in found[:-1])
    if kind in ("zip", "stored"):  # these have checksums
        assert all(
            member.data in FILES.values() for member in found if member.data is not None and member.name in FILES
        )


@pytest.mark.parametrize(
    "data", [b"", b"\0", bytes(300), b"<html>404</html>" * 400, b"\xff\xd8\xff" + bytes(3000), b"PK"]
)
def test_what_is_no_archive_at_all(tmp_path: Path, data: bytes):
    [member] = read(tmp_path / "x.tar", data)
    assert (member.data, member.reason) == (None, "damaged_archive") and member.detail


def test_an_empty_archive_is_none(tmp_path: Path):
    assert read(tmp_path / "x", made_tar({})) == []
    assert read(tmp_path / "x", made_zip({})) == []


def test_two_tars_one_behind_the_other(tmp_path: Path):
    assert list(good(read(tmp_path / "x", made_tar({"a": b"1"}) + made_tar({"b": b"2"})))) == ["a", "b"]


# -- what is not taken -----------------------------------------------------------------------------------------------
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


def test_links_and_folders_of_a_zip(tmp_path: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.mkdir("folder")
        link = zipfile.ZipInfo("link.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        zipped.writestr(link, "/etc/passwd")
        zipped.writestr("odd.jpg", b"x" * 100, zipfile.ZIP_LZMA)
    found = read(tmp_path / "x", buffer.getvalue())
    assert [(m.name, m.reason) for m in found] == [("link.jpg", "not_a_file"), ("odd.jpg", "unsupported")]


def test_an_encrypted_zip(tmp_path: Path):
    data = bytearray(made_zip({"a.jpg": b"secret", "b.jpg": b"open"}))
    data[data.index(b"PK\1\2") + 8] |= 1
    found = read(tmp_path / "x", bytes(data))
    assert [(m.name, m.reason) for m in found] == [("a.jpg", "encrypted"), ("b.jpg", None)]


@pytest.mark.parametrize("make", [made_tar, made_zip])
def test_a_member_that_is_too_large_is_passed_over(tmp_path: Path, make: Callable[[dict[str, bytes]], bytes]):
    large = random.Random(0).randbytes(5000)
    found = read(tmp_path / "x", make({"a": large, "b": b"1"}), most=4999)
    assert [(m.name, m.reason) for m in found] == [("a", "too_large"), ("b", None)]
    assert len(good(read(tmp_path / "x", make({"a": large, "b": b"1"}), most=5000))) == 2


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


# -- bombs -----------------------------------------------------------------------------------------------------------
def bounded(path: Path, most: int = MOST) -> list[Member]:
    """The members, read within some seconds and without the memory growing much."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(members(path, every, most))
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    return found


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


def test_a_zip_bomb(tmp_path: Path):
    found = read(tmp_path / "x", made_zip({"a": bytes(60 << 20), "b": b"1"}), most=64 << 20)
    assert [m.reason for m in found] == ["bomb", None]


def test_a_zip_whose_members_say_less_than_they_are(tmp_path: Path):
    data = bytearray(made_zip({"a": bytes(15 << 20)}))
    struct.pack_into("<L", data, data.index(b"PK\1\2") + 24, 1000)
    (tmp_path / "x").write_bytes(data)
    [member] = bounded(tmp_path / "x")
    assert member.reason == "damaged_member" and "more" in member.detail


def test_a_zip_whose_members_overlap(tmp_path: Path):
    """A hundred entries of the directory for the same bytes, and one whose bytes hold another member."""
    data = made_zip({"a": b"1" * 600, "b": b"2"}, zipfile.ZIP_STORED)
    start = data.index(b"PK\1\2")
    entry, rest = data[start : start + 47], data[start + 47 : start + 94]
    directory = entry * 100 + rest
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 101, 101, len(directory), start, 0)
    found = read(tmp_path / "x", data[:start] + directory + end)
    assert [m.reason for m in found] == ["damaged_member"] * 100 + [None]
    longer = bytearray(data)
    struct.pack_into("<2L", longer, start + 20, 610, 610)
    found = read(tmp_path / "x", bytes(longer))
    assert [(m.reason, "overlaps" in m.detail) for m in found] == [("damaged_member", True), (None, False)]


def test_a_zip_with_large_numbers(tmp_path: Path):
    """As written for files above 4 GiB, whose numbers are in an extra field and in a record of their own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name in ("a", "b"):
            with zipped.open(name, "w", force_zip64=True) as file:
                file.write(name.encode())
    data = buffer.getvalue()
    start = data.index(b"PK\1\2")
    count, size = 2, data.index(b"PK\5\6") - start
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    whole = data[: start + size] + record + locator + end
    assert zipfile.ZipFile(io.BytesIO(whole)).namelist() == ["a", "b"]
    assert good(read(tmp_path / "x", whole)) == {"a": b"a", "b": b"b"}


# -- the rest --------------------------------------------------------------------------------------------------------
def test_stems():
    found = [stem(name) for name in ("a/b.c/0001.seg.PNG", "./sa_1.jpg", "x", ".hidden", "a.b/")]
    assert found == [("0001", "seg.png"), ("sa_1", "jpg"), ("x", ""), ("", "hidden"), ("", "")]


def test_errors_of_the_disk_are_not_the_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Failing(tars._Gunzip):
        def decompress(self, data: bytes, max_length: int) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(tars, "_Gunzip", Failing)
    (tmp_path / "x").write_bytes(gzip.compress(made_tar(FILES)))
    with pytest.raises(OSError, match="Input/output"):
        list(tar_members(tmp_path / "x", every, MOST))
    with pytest.raises(FileNotFoundError):
        list(zip_members(tmp_path / "none", every, MOST))
