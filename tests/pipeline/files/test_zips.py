"""Zips: whole ones are read, damaged ones as far as possible, bombs and overlapping members are refused."""

import io
import random
import struct
import zipfile
from pathlib import Path

import pytest

from microdit.pipeline.files.tars import Member
from tests.pipeline.helpers.archives import FILES, bounded, good, made_zip, read


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_whole_whatever_it_is_named(tmp_path: Path, method: int):
    assert read(tmp_path / "wrong.tar", made_zip(FILES, method)) == [Member(n, d) for n, d in FILES.items()]


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
