"""One writer for a prefix of a bucket at a time.

PREFIX/lock/00000001      who holds it, as JSON; written again every few seconds while it is held, removed at the end

The highest number counts. A holder that was killed leaves its object; whoever has watched it for two minutes without a
sign of life creates the next number, which one alone can.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.machine import has_died, this_process
from microdit.pipeline.storage.object_info import ObjectInfo
from microdit.pipeline.storage.store import Store

BEAT = 20.0  # seconds between two signs of life
EXPIRES = 120.0  # seconds without one after which a holder is dead
LOOK_EVERY = 2.0
LONG_DEAD = timedelta(hours=1)  # more than clocks differ
LOCK = re.compile(r"lock/\d{8}")


class BucketLock:
    """Hold the lock of a bucket's prefix for the duration of a `with` block.

    Args:
        what: who holds it, for the message to others, such as "run".
        say: called with a message while it waits.
    """

    def __init__(self, store: Store, what: str, say: Callable[[str], None] = print):
        self.store, self.what, self.say = store, what, say
        self._name = ""
        self._ended = threading.Event()

    def __enter__(self) -> None:
        """Take the lock; wait for a sign of life of who has it.

        Raises:
            RequestError: another one holds it, or the bucket cannot be used.
        """
        try:
            self._take()
        except (OSError, BaseError) as error:
            raise RequestError(f"{self.store.url} cannot be used: {first_line(error)}") from error
        self._thread = threading.Thread(target=self._beat, daemon=True, name="bucket-lock")
        self._thread.start()

    def _take(self) -> None:
        if (holder := self._newest()) is not None:
            self._wait_for_its_death(holder)
        self._name = f"lock/{1 if holder is None else _number(holder) + 1:08d}"
        self._data = json.dumps(this_process() | {"since": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}).encode()
        try:
            self.store.create(self._name, self._data)
        except FileExistsError:
            raise self._refused(self._name) from None
        for other in self._locks():  # one that is new since the look at the holder
            if other.name != self._name and (holder is None or other.modified > holder.modified):
                self.store.delete([self._name])
                raise self._refused(other.name)

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError, BaseError):  # it expires
            self.store.delete([name for name in self._names() if name <= self._name])

    def check(self) -> None:
        """Make sure that nobody took the lock, if it was taken, because this process gave no sign of life for too long.

        Raises:
            OSError: somebody did, or the bucket does not answer.
        """
        if not self._name:
            return
        newest = self._newest()
        if newest is None or newest.name != self._name:
            name = "" if newest is None else newest.name
            raise OSError(f"{self._refused(name)}; this one was held up meanwhile, and must not write any more")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError, BaseError):  # the next time may be better
                if self._name in self._names():
                    self.store.renew(self._name, self._data)

    def _names(self) -> list[str]:
        return [item.name for item in self._locks()]

    def _locks(self) -> list[ObjectInfo]:
        return [item for item in self.store.list("lock") if LOCK.fullmatch(item.name)]

    def _newest(self) -> ObjectInfo | None:
        return max(self._locks(), key=_number, default=None)

    def _wait_for_its_death(self, holder: ObjectInfo) -> None:
        """Return when the holder is dead, or has let go.

        Raises:
            RequestError: it lives.
        """
        until = time.monotonic() + EXPIRES
        told = False
        while datetime.now(UTC) - holder.modified < LONG_DEAD and not self._has_died(holder.name):
            if not told:
                self.say(f"{self._holder(holder.name)} has worked in {self.store.url}: looking if it lives")
            told = True
            time.sleep(LOOK_EVERY)
            now = self._newest()
            if now is None:
                return
            if (now.name, now.modified) != (holder.name, holder.modified):
                raise self._refused(now.name)
            if time.monotonic() > until:
                return

    def _has_died(self, name: str) -> bool:
        try:
            return has_died(json.loads(self.store.get(name)))
        except FileNotFoundError:
            return True
        except (ValueError, KeyError, TypeError):
            return False

    def _holder(self, name: str) -> str:
        try:
            about: Any = json.loads(self.store.get(name))
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        except (OSError, ValueError, KeyError, TypeError, BaseError):
            return "another process"

    def _refused(self, name: str) -> RequestError:
        return RequestError(
            f"another {self.what} works in {self.store.url} ({self._holder(name)}): wait for its end, stop it, or take "
            "another prefix"
        )


def _number(item: ObjectInfo) -> int:
    return int(item.name.removeprefix("lock/"))
