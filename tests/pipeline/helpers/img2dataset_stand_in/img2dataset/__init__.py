"""Write what img2dataset writes with `output_format="files"`, for tests where it is not installed.

`MICRODIT_IMG2DATASET_PYTHON=PYTHON` runs the same tests with the real one.
"""

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq


def download(url_list: str, output_folder: str, timeout: float, **_: Any) -> None:
    """Fetch the URLs of a table, one after the other."""
    made, rows = Path(output_folder), []
    (made / "00000").mkdir(parents=True)
    urls = pq.read_table(url_list)["url"].to_pylist()
    width = 5 + len(str(len(urls) - 1))
    for number, url in enumerate(urls):
        key, error = f"{number:0{width}d}", None
        try:
            with urlopen(Request(url, headers={"User-Agent": "img2dataset"}), timeout=timeout) as answer:
                if answer.headers.get("X-Robots-Tag"):
                    error = "Use of image disallowed by X-Robots-Tag directive"
                else:
                    (made / "00000" / f"{key}.jpg").write_bytes(answer.read())
        except Exception as failed:  # what went wrong is the row's error message
            error = str(failed)
        rows.append({"url": url, "key": key, "error_message": error, "status": "failed" if error else "success"})
    pq.write_table(pa.Table.from_pylist(rows), made / "00000.parquet")
    (made / "00000_stats.json").write_text(json.dumps({"count": len(rows)}))
