"""Show that a build is working on a corpus, so that no cleaner takes what it holds.

The contract: docs/reference/corpus.md, section 9.
"""

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

from obstore.exceptions import BaseError

from microdit.pipeline.base.machine import has_died, this_process
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import PROBES
from microdit.pipeline.storage.object_info import ObjectInfo

RENEW_SECONDS = 300.0
LIVING = timedelta(hours=1)
"""A probe that was not renewed for so long is that of a killed build."""
LARGEST = 4096  # bytes of a probe


@contextmanager
def presence(corpus: Corpus) -> Iterator[str]:
    """Keep a probe in the corpus while the block runs, renewed every few minutes; yield its name."""
    name = f"{PROBES}/{uuid.uuid4().hex}"
    data = json.dumps(this_process()).encode()
    corpus.store.create(name, data)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with suppress(OSError, BaseError):  # the next time may be better
                corpus.store.renew(name, data)

    thread = threading.Thread(target=renew, daemon=True, name="presence")
    thread.start()
    try:
        yield name
    finally:
        ended.set()
        thread.join()
        corpus.store.delete([name])


def is_living(corpus: Corpus, probe: ObjectInfo) -> bool:
    """Return True unless the build of a probe has not renewed it for an hour, or has died on this machine."""
    if datetime.now(UTC) - probe.modified > LIVING:
        return False
    try:
        return not has_died(json.loads(corpus.store.get(probe.name)) if probe.size <= LARGEST else {})
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, RecursionError):  # of another writer
        return True
