"""Measure how quickly `microdit explore` answers on a large corpus.

    python -m benchmarks.explore CORPUS [--rounds 5] [--json]

CORPUS is one of `benchmarks.full_size_corpus`, in a folder or a bucket. All figures are seconds but for `memory`, the
most bytes that the server and its workers held at the end. `start`: from the beginning of the process until the page
can be opened (`start_first`: when this machine has not seen the corpus before); `first_page`: until 100 rows are there,
too; `filter`: from a new condition to its count and the histograms of a page; `next_page`: 100 rows and their small
pictures; `heavy`: the filters again while the endless query of another reader runs.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from benchmarks.harness import argument_parser, print_figures

HISTOGRAMS = 12  # columns, of those that a page opens with
AT_ONCE = 6  # requests of one browser
PICTURES = 100
ENDLESS = "(SELECT count(*) FROM range(1000000000) a, range(1000000) b) > 0"


class Page:
    """A reader of a server."""

    def __init__(self, url: str, name: str):
        self.url, self.name = url, name

    def get(self, path: str, **parameters: Any) -> Any:
        """Ask for JSON."""
        return json.loads(self.bytes(path, **parameters))

    def bytes(self, path: str, **parameters: Any) -> bytes:
        """Ask for bytes; those of an error, too."""
        address = f"{self.url}api/{path}?{urlencode(parameters)}"
        request = Request(address, headers={"Cookie": f"microdit-reader={self.name}"})
        try:
            with urlopen(request, timeout=600) as answer:
                data: bytes = answer.read()
                return data
        except HTTPError as error:
            return error.read()


@contextmanager
def served(corpus: str) -> Iterator[tuple[Page, float, int]]:
    """Start a server; gives a reader, the time when it was started, and its process."""
    began = time.monotonic()
    command = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", "explore", corpus]
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+/", process.stdout.readline())
        if found is None:
            raise SystemExit(f"the server has ended with status {process.wait()}")
        yield Page(found[0], "one"), began, process.pid
    finally:
        process.terminate()
        process.wait()


def memory(pid: int) -> int:
    """Bytes of a process and its children that are no file's."""
    total = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in [str(pid), *children]:
        with suppress(OSError):
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{one}/status").read_text())
            total += int(found[1]) << 10 if found else 0
    return total


def conditions(page: Page, rounds: int) -> list[str]:
    """Make conditions, no two alike, from the columns of the corpus."""
    names = [column["name"] for column in page.get("corpus")["columns"] if column["kind"] == "number"]
    made = []
    for number in range(rounds):
        column = names[number % len(names)]
        edges = page.get("histogram", column=column)["edges"]
        at = edges[(number + 1) * len(edges) // (rounds + 2)] if edges else 0
        made.append(f"{column} >= {at} AND status = 'ok' AND {number} = {number}")
    return made


def filter_seconds(page: Page, where: str, columns: Sequence[str]) -> float:
    """Time a count and histograms, as many at once as a browser asks."""
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(page.get, "count", where=where)]
        jobs += [pool.submit(page.get, "histogram", column=column, where=where) for column in columns]
        answers = [job.result() for job in jobs]
    if wrong := [answer["error"] for answer in answers if "error" in answer]:
        raise SystemExit(f"{where}: {wrong[0]}")
    return time.monotonic() - began


def page_seconds(page: Page, after: str) -> tuple[float, str]:
    """Time a page of rows and its small pictures; returns the cursor of the next one, too."""
    began = time.monotonic()
    found = page.get("rows", limit=PICTURES, after=after, where="status = 'ok'")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [{name: row[name] for name in ("source", "key", "shard", "row")} for row in found["rows"]]
        list(pool.map(lambda one: page.bytes("image", size=160, **one), asked))
    return time.monotonic() - began, str(found["next"])


def ask_without_end(page: Page) -> None:
    """Ask for what never ends, until the server does."""
    with suppress(OSError):
        page.bytes("count", where=ENDLESS)


def measure(corpus: str, rounds: int) -> dict[str, Any]:
    """Measure a corpus whose sample table is made."""
    figures: dict[str, Any] = {"corpus": corpus, "cpus": os.cpu_count()}
    with served(corpus) as (page, began, _):
        figures["start_first"] = round(time.monotonic() - began, 2)
    with served(corpus) as (page, began, pid):
        figures["start"] = round(time.monotonic() - began, 2)
        page.get("rows", limit=PICTURES)
        figures["first_page"] = round(time.monotonic() - began, 2)
        about = page.get("corpus")
        shown = [one["name"] for one in about["columns"] if one["kind"] != "text"]
        figures |= {"rows": about["rows"], "histograms": len(shown[:HISTOGRAMS])}
        filter_seconds(page, "", shown[:HISTOGRAMS])  # the bounds of the columns are known from then on
        filters = [filter_seconds(page, where, shown[:HISTOGRAMS]) for where in conditions(page, rounds)]
        figures["filter"] = {"median": round(statistics.median(filters), 2), "worst": round(max(filters), 2)}
        pages, after = [], ""
        for _ in range(rounds):
            seconds, after = page_seconds(page, after)
            pages.append(seconds)
        figures["next_page"] = {"median": round(statistics.median(pages), 2), "worst": round(max(pages), 2)}
        other = threading.Thread(target=ask_without_end, args=(Page(page.url, "other"),), daemon=True)
        other.start()
        again = [filter_seconds(page, f"{one} AND true", shown[:HISTOGRAMS]) for one in conditions(page, rounds)]
        figures["heavy"] = {"median": round(statistics.median(again), 2), "worst": round(max(again), 2)}
        figures["memory"] = memory(pid)
    return figures


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("corpus", help="a folder or a bucket")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print_figures(measure(options.corpus, options.rounds), options.json)


if __name__ == "__main__":
    main()
