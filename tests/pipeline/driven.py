"""A build of the test parts in a process of its own: `python -m tests.pipeline.driven URL LOGS SECONDS UNITS GPUS`.

`LOGS` is a folder in which the stages say what they begin, `SECONDS` what a shard costs, `GPUS` what the cluster may
grow to. It prints one JSON object.
"""

import json
import sys
from pathlib import Path

from pipeline.engine import Stopped, carry_out
from tests.pipeline.parts import Pictures, Words, ingest, open_corpus, source_words, upper_words


def parts(logs: Path | None, seconds: float, count: int) -> tuple[list[Pictures], list[Words]]:
    options = {"seconds": seconds, "runs": logs, "loads": logs}
    return [Pictures(count=count)], [source_words(**options), upper_words(**options)]


if __name__ == "__main__":
    sources, stages = parts(Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
    try:
        corpus, resources = open_corpus(sys.argv[1], sources, stages), {"gpus": float(sys.argv[5])}
        summary = carry_out(corpus, sources, stages, ingest, resources=resources)
    except Stopped as stopped:
        print(stopped)
        sys.exit(128 + stopped.signum)
    print(json.dumps(summary.to_dict() | {"ray": "ray" in sys.modules}))
    sys.exit(summary.exit_status)
