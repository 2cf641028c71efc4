"""Build with the fake stages in a process of its own.

`python -m tests.pipeline.helpers.fake_driver URL LOGS SECONDS UNITS GPUS [GATE]`: the stages write a file into the
folder `LOGS` for every shard that they begin, a shard takes `SECONDS`, and the cluster may grow to `GPUS`. With `GATE`
the process joins the cluster, writes `ready-<process>` into `LOGS`, and begins once the file `GATE` exists. It prints
one JSON object.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from microdit.pipeline.base.signals import Stopped
from microdit.pipeline.engine.build import carry_out
from tests.pipeline.helpers.fake_stages import Pictures, Words, ingest, open_corpus, source_words, upper_words


def sources_and_stages(logs: Path | None, seconds: float, count: int) -> tuple[list[Pictures], list[Words]]:
    options = {"seconds": seconds, "runs": logs, "loads": logs}
    return [Pictures(count=count)], [source_words(**options), upper_words(**options)]


def main(url: str, logs: str, seconds: str, count: str, gpus: str, gate: str | None = None) -> None:
    sources, stages = sources_and_stages(Path(logs), float(seconds), int(count))
    with ExitStack() as stack:
        if gate is not None:
            from microdit.pipeline.engine.cluster import joined

            stack.enter_context(joined())
            (Path(logs) / f"ready-{os.getpid()}").touch()
            while not Path(gate).exists():
                time.sleep(0.02)
        try:
            corpus, resources = open_corpus(url, sources, stages), {"gpus": float(gpus)}
            summary = carry_out(corpus, sources, stages, ingest, resources=resources)
        except Stopped as stopped:
            print(stopped)
            sys.exit(128 + stopped.signum)
        print(json.dumps(summary.to_dict() | {"ray": "ray" in sys.modules}))
    sys.exit(summary.exit_status)


if __name__ == "__main__":
    main(*sys.argv[1:])
