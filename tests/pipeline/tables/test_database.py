"""DuckDB writes nothing of its own to standard output, on which `--json` promises one object."""

import subprocess
import sys

ASK = """
from microdit.pipeline.tables.database import connect
settings = "SELECT current_setting('enable_progress_bar'), current_setting('threads')"
print(connect(threads=1).execute(settings).fetchone())
"""


def test_no_progress_bar_where_duckdb_takes_itself_for_interactive() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert done.stdout == "(False, 1)\n"
