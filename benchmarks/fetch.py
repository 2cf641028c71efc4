"""Fetch lists of URLs with microdit and with img2dataset: images/s, processor time, silent hosts, passing faults.

    python benchmarks/fetch.py [--urls 10000] [--parts fetch,keep,resize,resize_fast,...] [--json]

img2dataset runs in an environment of its own, which is made with pip for the first run. Both have two processes, the
same list, and nginx on this machine; start-up is not counted, and each has the best number of requests at once of those
tried with a part of the list. In turns; medians.

`fetch` writes the bytes that come into tars and decodes nothing, as img2dataset does where it keeps them; `keep` is
ingest, which decodes and checks each picture (img2dataset: as in `fetch`); `resize` reduces the short side to 256
pixels, `resize_fast` with `images.reduce: fast`; each by HTTP and HTTPS, `close` is `fetch` with a connection for each
URL. `ratio_fetch`, `ratio_keep` and `ratio_resize` are microdit's images/s by img2dataset's, of the slower of the two
protocols (goals: 2 where the bytes are kept, 1.5 for `resize`). `ratio_cpu_*` is img2dataset's processor time an image
by microdit's (goal: 1.5). `psnr` compares what both made of the pictures in `resize` with a Lanczos filter in floating
point.

`silent`: 1% and 5% of the URLs on servers that never answer, as `fetch`. `faults`: a tenth of the URLs fails at first
(reset, stall, 429, 503, cut); img2dataset with `retries=2`; goal: 0.999 of what can be had.

`units` is the fetcher alone, in units of 4,096 URLs one after the other as a worker does: `ratio_silent_1` and
`ratio_silent_5` are its rates with so many URLs on silent servers by the rate without (goals: 0.8 and 0.5).
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.fetch_others import Img2dataset, Microdit, Run
from benchmarks.fetch_quality import psnr
from benchmarks.fetch_servers import FAULTS, faulty_server, nginx, silent_servers
from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.url_fetcher import fetch_all
from tests.servers.sloppy import SloppyServer

PARTS = ("fetch", "keep", "resize", "resize_fast", "close", "silent", "faults", "units")
CONCURRENCIES = (16, 64)
UNIT = 4096
OPTIONS = FetchOptions(allow_networks=["127.0.0.0/8"])


class Comparison:
    """Lists that both programs fetch, in turns."""

    def __init__(self, folder: Path, urls: int, rounds: int):
        self._folder, self.urls, self._rounds = folder, urls, rounds
        certificate = folder / "cert.pem"
        self.ours, self.theirs = Microdit(certificate, folder), Img2dataset(certificate, folder)
        self._best: dict[str, int] = {}

    def listed(self, urls: Sequence[str]) -> Path:
        path = self._folder / "list.tsv"
        path.write_text("caption\turl\n" + "".join(f"picture {i}\t{url}\n" for i, url in enumerate(urls)))
        return path

    def tune(self, url: str) -> dict[str, int]:
        """Find the best concurrency of each with a part of the list."""
        part = self.listed([f"{url}/{i}.jpg" for i in range(max(64, self.urls // 10))])
        for program in (self.ours, self.theirs):
            rates = {}
            for concurrency in CONCURRENCIES:
                rates[concurrency] = program.run(part, "fetch", concurrency, max(32, self.urls // 20)).rate
                program.clear()
            self._best[program.name] = max(rates, key=lambda one: rates[one])
        return dict(self._best)

    def run(self, urls: Sequence[str], mode: str, rounds: int = 0, **options: int) -> dict[str, Any]:
        """Fetch the URLs with both; return images/s, images and processor time of each, and how they compare."""
        path, shard = self.listed(urls), max(32, -(-len(urls) // 4))
        runs: dict[str, list[Run]] = {"microdit": [], "img2dataset": []}
        for _ in range(rounds or self._rounds):
            for program in (self.ours, self.theirs):
                program.clear()
                more = options if program is self.theirs else {}
                runs[program.name].append(program.run(path, mode, self._best[program.name], shard, **more))
        found: dict[str, Any] = {}
        for name, of in runs.items():
            found[name] = {
                "images": of[-1].images,
                "images_per_second": round(statistics.median(one.rate for one in of), 1),
                "cpu_ms_per_image": round(statistics.median(1000 * one.cpu / one.images for one in of), 3),
            }
        ours, theirs = found["microdit"], found["img2dataset"]
        found["ratio"] = round(ours["images_per_second"] / theirs["images_per_second"], 3)
        found["ratio_cpu"] = round(theirs["cpu_ms_per_image"] / ours["cpu_ms_per_image"], 3)
        return found


def compare(parts: set[str], urls: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Measure the parts that are asked for."""
    figures: dict[str, Any] = {}
    with nginx(folder, urls) as servers:
        both = Comparison(folder, urls, rounds)
        both.theirs.measure_start(servers["http"])
        both.theirs.clear()
        figures["concurrency"] = both.tune(servers["http"])
        for mode in ("fetch", "keep", "resize", "resize_fast"):
            if mode in parts:
                for protocol in ("http", "https"):
                    listed = [f"{servers[protocol]}/{i}.jpg" for i in range(urls)]
                    figures[f"{mode}_{protocol}"] = both.run(listed, mode)
                    if mode.startswith("resize") and protocol == "http":
                        figures[mode.replace("resize", "psnr")] = psnr(folder)
                found = [figures[f"{mode}_{protocol}"] for protocol in ("http", "https")]
                figures[f"ratio_{mode}"] = min(one["ratio"] for one in found)
                for protocol, one in zip(("http", "https"), found, strict=True):
                    figures[f"ratio_cpu_{mode}_{protocol}"] = one["ratio_cpu"]
        if "close" in parts:
            for protocol in ("http_close", "https_close"):
                found_one = both.run([f"{servers[protocol]}/{i}.jpg" for i in range(urls)], "fetch")
                figures[f"fetch_{protocol}"] = found_one
                figures[f"ratio_cpu_fetch_{protocol}"] = found_one["ratio_cpu"]
        if "silent" in parts:
            figures |= silent(both, servers["http"])
        if "faults" in parts:
            figures |= faults(both, (folder / "www" / "0.jpg").read_bytes())
        both.ours.clear()
        both.theirs.clear()
    return figures


def silent(both: Comparison, base: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for percent in (1, 5):
        with silent_servers(40) as silents:
            step = 100 // percent
            listed = [f"{silents[i // step % 40] if i % step == 7 else base}/{i}.jpg" for i in range(both.urls)]
            figures[f"silent_{percent}"] = found = both.run(listed, "fetch", rounds=1)
            figures[f"ratio_img2dataset_silent_{percent}"] = found["ratio"]
    return figures


def faults(both: Comparison, picture: bytes) -> dict[str, Any]:
    """Measure the share of what can be had, where one URL of ten fails at first."""
    number = both.urls // 5
    names = ["ok" if i % 10 else FAULTS[i // 10 % len(FAULTS)] for i in range(number)]
    shares = {}
    for program in (both.ours, both.theirs):
        with faulty_server(picture) as base:  # each has one that has not failed yet
            listed = both.listed([f"{base}/{name}/{i}.jpg" for i, name in enumerate(names)])
            program.clear()
            more = {"retries": 2} if program is both.theirs else {}
            run = program.run(listed, "keep", both._best[program.name], max(32, number // 4), **more)
        shares[program.name] = round(run.images / number, 5)
    return {"success_under_faults": shares}


def unit_rate(urls: int, hosts: int, percent: int) -> float:
    """Measure the fetcher's images/s on a list in which so many URLs of a hundred are on silent servers."""
    with ExitStack() as stack:
        server, silents = stack.enter_context(SloppyServer()), stack.enter_context(silent_servers(hosts))
        listed = [
            f"{silents[i // (100 // percent) % hosts] if percent and i % (100 // percent) == 7 else server.url}/ok/{i}"
            for i in range(urls)
        ]
        began, came = time.monotonic(), 0
        for first in range(0, urls, UNIT):
            for _, found in fetch_all(((url, url) for url in listed[first : first + UNIT]), OPTIONS):
                came += found is not None and found.data is not None
        return came / (time.monotonic() - began)


def units(urls: int, hosts: int, rounds: int) -> dict[str, float]:
    rates = {percent: [0.0] * rounds for percent in (0, 1, 5)}
    for number in range(rounds):
        for percent in rates:
            rates[percent][number] = unit_rate(urls, hosts, percent)
    figures = {f"fetched_per_second_{p}": round(statistics.median(of), 1) for p, of in rates.items()}
    for percent in (1, 5):
        pairs = zip(rates[percent], rates[0], strict=True)
        figures[f"ratio_silent_{percent}"] = round(statistics.median(one / without for one, without in pairs), 3)
    return figures


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--urls", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--unit-urls", type=int, default=131_072, help="URLs of the part `units`")
    parser.add_argument("--hosts", type=int, default=40, help="silent servers of the part `units`")
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    parts = set(options.parts.split(","))
    if not parts <= {*PARTS}:
        sys.exit(f"--parts: expected some of {', '.join(PARTS)}, found {options.parts}")
    figures: dict[str, Any] = {"urls": options.urls}
    if parts - {"units"}:
        with tempfile.TemporaryDirectory() as folder:
            figures |= compare(parts, options.urls, options.rounds, Path(folder))
    if "units" in parts:
        figures |= units(options.unit_urls, options.hosts, options.rounds)
    print_figures(figures, options.json)


if __name__ == "__main__":
    main()
