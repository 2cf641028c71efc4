"""Fetch a unit with img2dataset, in a process of its own, and again by ourselves what it gave up too early."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.secrets import without_secrets
from microdit.pipeline.base.temporary_folder import temporary_folder
from microdit.pipeline.config.sources import FetchOptions, Img2datasetOptions
from microdit.pipeline.corpus.reasons import may_pass
from microdit.pipeline.files.scratch import make_scratch
from microdit.pipeline.sources.public_addresses import PrivateAddress, check_host
from microdit.pipeline.sources.url_fetcher import Fetched, fetch_all
from microdit.pipeline.sources.web_url import as_written

T = TypeVar("T")
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from img2dataset import download
    download(**json.loads(sys.argv[1]))
"""
POLL = 0.2
START = 300.0  # seconds that it may take beside the requests
DETAIL = 300

ERRORS = (
    (re.compile(r"Use of image disallowed by X-Robots-Tag"), "noai", ""),
    (re.compile(r"hash mismatch"), "wrong_checksum", ""),
    (re.compile(r"timed out"), "timeout", ""),
    (re.compile(r"Errno -3\b|Temporary failure in name resolution"), "dns", "the name server did not answer: "),
    (re.compile(r"Errno -[25]\b|Name or service not known|No address"), "dns", "there is no such host: "),
    (re.compile(r"CERTIFICATE_VERIFY_FAILED"), "certificate", ""),
    (re.compile(r"IncompleteRead"), "truncated", "the transfer broke off: "),
    (re.compile(r"infinite loop"), "redirects", ""),
    (re.compile(r"unknown url type|no host given|nonnumeric port|can't contain control characters"), "bad_url", ""),
)


def reason_of(message: str) -> tuple[str, str]:
    """Translate img2dataset's error message into a reason and its detail."""
    shown = without_secrets(" ".join(message.split()))[:DETAIL]
    if match := re.match(r"HTTP Error (\d{3})\b", message):
        return f"http_{match[1]}", shown
    for pattern, reason, before in ERRORS:
        if pattern.search(message):
            return reason, before + shown
    return "connection", shown


def check_img2dataset(what: str, options: Img2datasetOptions) -> None:
    """Check that there is an img2dataset to run.

    Raises:
        RequestError: there is none.
    """
    python = options.python or sys.executable
    try:
        done = subprocess.run([python, "-c", "import img2dataset"], capture_output=True, timeout=START, text=True)
        found = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        found = str(error)
    if found is not None:
        raise RequestError(
            f"{what} = 'img2dataset': {python} cannot import it ({found[:200]}); install it there (for microdit's own "
            'environment `pip install "microdit[img2dataset]"`), or set img2dataset.python to one that has it'
        )


def fetch_by_img2dataset(
    requests: Iterable[tuple[T, str | None]], fetch: FetchOptions, options: Img2datasetOptions, scratch: Path
) -> Generator[tuple[T, Fetched | None]]:
    """Fetch as `fetch_all`, but by img2dataset; what failed in passing there is fetched by `fetch_all` once more.

    Hosts that are addresses are checked before; names, redirects, robots.txt and sizes are not in our hands.
    """
    pairs = list(requests)
    refused = {number: why for number, (_, url) in enumerate(pairs) if url and (why := _refusal(url, fetch))}
    asked = [number for number, (_, url) in enumerate(pairs) if url is not None and number not in refused]
    make_scratch(scratch)
    with temporary_folder("microdit-img2dataset-", scratch) as folder:
        _run(folder, [pairs[number][1] or "" for number in asked], fetch, options)
        files = {asked[n]: path for n, path in _pictures(folder).items()}
        missing = [n for n, number in enumerate(asked) if number not in files]
        failed = refused | {asked[n]: why for n, why in _failures(folder, missing).items()}
        again = [number for number in sorted(failed) if may_pass(*failed[number])]
        with closing(fetch_all(((number, pairs[number][1]) for number in again), fetch)) as by_us:
            for number, (what, url) in enumerate(pairs):
                alive()
                if number in failed and may_pass(*failed[number]):
                    yield what, next(by_us)[1]
                elif number in failed:
                    yield what, Fetched(None, *failed[number])
                else:
                    yield what, None if url is None else _picture(files[number], fetch)


def _refusal(url: str, fetch: FetchOptions) -> tuple[str, str] | None:
    try:
        check_host(as_written(url).raw_host or "", [ip_network(network) for network in fetch.allow_networks])
    except PrivateAddress as error:
        return "private_address", str(error)
    except ValueError as error:
        return "bad_url", str(error)
    return None


def _run(folder: Path, urls: Sequence[str], fetch: FetchOptions, options: Img2datasetOptions) -> None:
    """Run it on the URLs, as one shard of files; it is stopped when it takes longer than its timeouts allow."""
    if not urls:
        return
    pq.write_table(pa.table({"url": urls}), folder / "list.parquet")
    (folder / "run.py").write_text(SCRIPT)
    given: dict[str, Any] = {
        "thread_count": fetch.concurrency,
        "timeout": max(1, round(fetch.idle_timeout)),
        **options.options,
        "url_list": str(folder / "list.parquet"),
        "output_folder": str(folder / "made"),
        "input_format": "parquet",
        "url_col": "url",
        "output_format": "files",
        "number_sample_per_shard": len(urls),
        "processes_count": 1,
        "disable_all_reencoding": True,
        "resize_mode": "no",
        "extract_exif": False,
        "compute_hash": None,
    }
    tries = int(given.get("retries", 0)) + 1
    rounds = -(-len(urls) // int(given["thread_count"]))
    until = time.monotonic() + START + 2 * rounds * tries * float(given["timeout"])
    command = [options.python or sys.executable, str(folder / "run.py"), json.dumps(given)]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < until:
                alive()
                time.sleep(POLL)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode > 0 and not (folder / "made").exists():
        last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
        raise OSError(f"img2dataset ended with exit status {process.returncode}: {' '.join(last)[:DETAIL]}")


def _failures(folder: Path, numbers: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Say of the URLs of these numbers why they failed."""
    said: dict[int, str] = {}
    table = folder / "made" / "00000.parquet"
    if table.exists():
        rows = pq.read_table(table, columns=["key", "error_message"]).to_pylist()
        said = {int(row["key"]): row["error_message"] or "" for row in rows}
    unsaid = "timed out: img2dataset was stopped before it said anything of this URL"
    return {number: reason_of(said.get(number, unsaid)) for number in numbers}


def _pictures(folder: Path) -> dict[int, Path]:
    """Find the files by the number of their URL, which is their key."""
    return {int(path.stem): path for path in (folder / "made" / "00000").glob("*.jpg")}


def _picture(path: Path, fetch: FetchOptions) -> Fetched:
    with path.open("rb") as file:
        data = file.read(fetch.max_bytes + 1)
    if len(data) > fetch.max_bytes:
        return Fetched(None, "too_large", f"more than {fetch.max_bytes} bytes")
    return Fetched(data)
