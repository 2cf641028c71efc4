import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.folder_lock import folder_lock

HOLD = """
import sys, time
from pathlib import Path
from microdit.pipeline.base.folder_lock import folder_lock
with folder_lock(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_refused_while_the_first_lives_and_a_kill_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RequestError, match=rf"another run works in .* \(process {holder.pid} on .* since .* UTC\)"),
            folder_lock(tmp_path, "run"),
        ):
            pytest.fail("it is held")
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    for _ in range(2):
        with folder_lock(tmp_path, "run"):
            assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
