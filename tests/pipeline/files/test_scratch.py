"""The scratch folder: where it is, and that none is used which another user may have made."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.files.scratch import make_scratch, scratch_folder


def test_the_default_is_made_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert scratch_folder(None) == tmp_path / f"microdit-{os.getuid()}"
    assert scratch_folder("/data/scratch") == Path("/data/scratch")
    for _ in range(2):
        make_scratch(scratch_folder(None))
    assert stat.S_IMODE(scratch_folder(None).stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("link", "it is a link"),
        ("dangling link", "it is no folder"),
        ("file", "it is no folder"),
        ("another user", r"it belongs to another user \(number 12345"),
        ("open to all", r"others may write to it \(mode 0777, expected 0700\)"),
        ("open to the group", r"others may write to it \(mode 0770"),
    ],
)
def test_a_default_that_somebody_made_beforehand_is_refused(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = scratch_folder(None)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if "link" in kind:
        scratch.symlink_to(tmp_path / ("nowhere" if kind == "dangling link" else "elsewhere"))
    elif kind == "file":
        scratch.write_bytes(b"")
    else:
        scratch.mkdir(mode=0o700)
        scratch.chmod({"open to all": 0o777, "open to the group": 0o770}.get(kind, 0o700))
    if kind == "another user":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(scratch, 12345, 12345)
    with (
        pytest.raises(RequestError, match=rf"scratch folder {scratch}: {words}.*set resources\.scratch to a folder"),
        local_copy(RemoteFile("x.tar", "http://127.0.0.1:9/x.tar"), scratch),
    ):
        raise AssertionError
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_given_folder_may_be_shared_or_a_link(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    make_scratch(tmp_path / "link")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RequestError, match=r"scratch folder .*/file/x: .*cannot be made .*set resources\.scratch"):
        make_scratch(tmp_path / "file" / "x")
