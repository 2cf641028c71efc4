"""Measure what servers that never answer cost the fetching of a list: images/s with 1% and 5% of them, and without.

    python benchmarks/fetch.py [--urls 131072] [--hosts 40] [--json]

The list is fetched in units of 4,096 URLs one after the other, as a worker does, in turns with and without silent
servers. All servers are on this machine; the silent ones take connections and say nothing. Goals: at least 0.8 of the
rate without them at 1%, 0.5 at 5%.
"""

import socket
import time
from contextlib import ExitStack

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.url_fetcher import fetch_all
from tests.servers.sloppy import SloppyServer

UNIT = 4096
OPTIONS = FetchOptions(allow_networks=["127.0.0.0/8"])


def rate(urls: int, hosts: int, percent: int) -> float:
    """Measure the images a second of a list in which so many URLs of a hundred are on silent servers."""
    with ExitStack() as stack:
        server = stack.enter_context(SloppyServer())
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2000)) for _ in range(hosts)]
        bases = [f"http://127.0.0.1:{one.getsockname()[1]}" for one in silent]
        listed = [
            f"{bases[i // (100 // percent) % hosts] if percent and i % (100 // percent) == 7 else server.url}/ok/{i}"
            for i in range(urls)
        ]
        began, came = time.monotonic(), 0
        for first in range(0, urls, UNIT):
            for _, found in fetch_all(((url, url) for url in listed[first : first + UNIT]), OPTIONS):
                came += found is not None and found.data is not None
        return came / (time.monotonic() - began)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--urls", type=int, default=131072)
    parser.add_argument("--hosts", type=int, default=40, help="silent servers")
    options = parser.parse_args()
    rates = {percent: rate(options.urls, options.hosts, percent) for percent in (0, 1, 5)}
    figures = {f"images_per_second_{percent}": round(value, 1) for percent, value in rates.items()}
    ratios = {f"ratio_silent_{p}": round(rates[p] / rates[0], 3) for p in (1, 5)}
    print_figures({**figures, **ratios}, options.json)


if __name__ == "__main__":
    main()
