"""Archives of any kind: intact ones are read whole, damaged ones up to the damage, with a reason."""

import gzip
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microdit.pipeline.files import tars
from microdit.pipeline.files.archives import stem
from microdit.pipeline.files.tars import Member, tar_members
from microdit.pipeline.files.zips import zip_members
from tests.pipeline.helpers.archives import FILES, MOST, PACKED, every, good, made_tar, made_zip, read

REASONS = {
    "too_large", "not_a_file", "encrypted", "unsupported", "damaged_member", "bomb", "damaged_archive", None,
}  # fmt: skip


@pytest.mark.parametrize("make", [made_tar, made_zip])
def test_what_is_not_wanted_is_passed_over(tmp_path: Path, make: Callable[[dict[str, bytes]], bytes]):
    found = read(tmp_path / "x", make(FILES), lambda name: name.endswith("7.jpg"))
    assert found == [Member("a/007.jpg", FILES["a/007.jpg"])]


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


@pytest.mark.parametrize("make", [made_tar, made_zip])
def test_a_member_that_is_too_large_is_passed_over(tmp_path: Path, make: Callable[[dict[str, bytes]], bytes]):
    large = random.Random(0).randbytes(5000)
    found = read(tmp_path / "x", make({"a": large, "b": b"1"}), most=4999)
    assert [(m.name, m.reason) for m in found] == [("a", "too_large"), ("b", None)]
    assert len(good(read(tmp_path / "x", make({"a": large, "b": b"1"}), most=5000))) == 2


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
