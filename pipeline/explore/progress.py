"""Report the progress of the build that writes a corpus, for the page."""

import time
from collections.abc import Mapping
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.upkeep.status import status


def progress(corpus: Corpus, before: Mapping[str, Any]) -> dict[str, Any]:
    """Count what is committed, and how fast it comes since the answer before."""
    now, stages = time.time(), []
    for column, sources in status(corpus).columns.items():
        done = sum(one.done for one in sources.values())
        left = [one.left for one in sources.values()]
        total = None if None in left else done + sum(one or 0 for one in left)
        failed = sum(one.failed for one in sources.values())
        rows = sum(one.inputs for one in sources.values())
        stages.append({"name": column, "done": done, "total": total, "failed": failed, "rows": rows})
    images = next((one for one in stages if one["name"] == IMAGES), {"rows": 0, "failed": 0})
    more, seconds = images["rows"] - before.get("rows", images["rows"]), now - before.get("time", now)
    rate = round(more / seconds, 1) if seconds > 0 else 0.0
    return {"rows": images["rows"], "failed": images["failed"], "rate": rate, "stages": stages, "time": now}
