"""The store on a disk alone: durable names, and what a killed writer leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from microdit.pipeline.storage.store import open_store

DIE = """
import os, signal, sys
from microdit.pipeline.storage.store import Store, open_store
store = open_store(sys.argv[1])
with store.scratch("folder/object") as path:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_object(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DIE, str(tmp_path / "corpus")], check=False)
    assert died.returncode == -signal.SIGKILL
    store = open_store(tmp_path / "corpus")
    assert not list(store.list())
    assert [path.name.split("#")[0] for path in store.unfinished()] == ["object"]
    store.create("folder/object", b"whole")


def test_a_disk_file_is_synced_before_it_has_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, Path]] = []
    fsync, link = os.fsync, os.link

    def watched_fsync(descriptor: int) -> None:
        steps.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def watched_link(source: Path, target: Path) -> None:
        steps.append(("link", target))
        link(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "link", watched_link)
    root = tmp_path / "corpus"
    open_store(root).create("a/b/name", b"data")
    linked = steps.index(("link", root / "a/b/name"))
    before, after = steps[:linked], steps[linked + 1 :]
    assert {path for _, path in before[:-1]} >= {tmp_path, root, root / "a"}
    assert before[-1][1].name.startswith("name#")
    assert after == [("sync", root / "a/b")]
