import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from microdit.pipeline.base.temporary_folder import UNLOCKED, temporary_folder

HOLD = """
import sys, tempfile, time
from microdit.pipeline.base.temporary_folder import temporary_folder
tempfile.tempdir = sys.argv[1]
with temporary_folder("spill-") as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    new, old, other = (tmp_path / name for name in ("spill-new", "spill-old", "other"))
    for folder in (new, old, other):  # without a lock: of an older program, or just begun
        folder.mkdir()
    os.utime(old, (0, new.stat().st_mtime - UNLOCKED - 1))
    (tmp_path / "spill-link").symlink_to(other)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        held = Path(holder.stdout.readline().strip())
        with temporary_folder("spill-") as folder:
            assert held.is_dir() and folder.is_dir() and new.is_dir() and not old.exists()
        assert not folder.exists()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with temporary_folder("spill-"):
        assert not held.exists()
    assert other.is_dir() and (tmp_path / "spill-link").is_symlink()
