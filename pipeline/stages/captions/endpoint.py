"""`captions/<name>` of a server that the user already runs, or pays for: many requests in flight, a limit to the cost.

committed tar --a thread--> rows --threads--> JPEGs --event loop, at most `concurrency` at once--> captions
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import simplejpeg

from microdit.model.pretrained.prompts import default_prompt
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.corpus.attempt import Attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import latest
from microdit.pipeline.stages.captions.asking import AGAIN, SCALARS, add_caption, asked_of, check_language
from microdit.pipeline.stages.captions.chat import BadAnswer, Reply, Unanswered, ask, request
from microdit.pipeline.stages.captions.pictures import Loader, Ready
from microdit.pipeline.stages.rows import attempts, commit_all
from microdit.pipeline.stages.stage import ColumnSpec, Task, seed_of

QUALITY = 90  # of the JPEGs that are sent
UNANSWERED, LEAST = 0.05, 3  # of a shard's samples: with more the server is at fault, and the shard is tried again


@dataclass
class Bill:
    """What a shard has cost so far: `spent` in the user's currency, on top of what the column had cost `before`."""

    before: float
    spent: float = 0.0
    read: int = 0
    wrote: int = 0
    unanswered: int = 0
    again: int = 0


class Endpoint:
    """One column from an endpoint. A sample fails with what is wrong with the second of its answers."""

    device = None

    def __init__(self, name: str, options: CaptionsColumn, max_pixels: int, resources: Resources):
        self.name, self._options = name, options
        self._loader = Loader(options.image_side, max_pixels, resources.decode_threads)
        self._prompt = options.prompt or default_prompt(options.asked_kind)
        check_language(name, options)
        self._find_key()  # a build without it ends before it begins
        stage = {"stage": "captions", "version": 1, "from": "endpoint", "captioner": options.model}
        stage |= {"revision": options.revision, "quality": QUALITY}
        self.columns = {name: ColumnSpec({**stage, **asked_of(options, self._prompt)}, SCALARS, (IMAGES,))}
        self._key: str | None = None
        self._costs: dict[tuple[str, str, int], float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_key": None, "_costs": {}}

    def load(self) -> None:
        self._key = self._find_key()

    def _find_key(self) -> str | None:
        """The server's key as this machine has it.

        Raises:
            RequestError: the variable is not set, or empty.
        """
        variable = self._options.api_key_env
        key = os.environ.get(variable) if variable is not None else None
        if variable is not None and not key:
            raise RequestError(
                f"columns.{self.name}.api_key_env = {variable!r}: {socket.gethostname()} has no such variable; "
                "set it here and where the workers run"
            )
        return key

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        images = latest(corpus, IMAGES, task.ref)
        bill = Bill(self._spent(corpus))
        self._check(bill)
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [images])
            ahead = 2 * self._options.concurrency
            ready = self._loader.pictures(stack, corpus, images, task, made, _jpeg, ahead)
            allowed = max(LEAST, UNANSWERED * images.counts["out"])
            asyncio.run(self._ask_all(next(iter(made.values())), ready, task.ref.source, bill, allowed))
            costs = {"spend": bill.spent, "tokens_read": bill.read, "tokens_wrote": bill.wrote, "again": bill.again}
            return commit_all(made, task, **costs)

    async def _ask_all(
        self, attempt: Attempt, ready: Iterator[Ready[bytes]], source: str, bill: Bill, allowed: float
    ) -> None:
        loop, running = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        with ThreadPoolExecutor(1) as reader:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                try:
                    more = True
                    while more or running:
                        while more and len(running) < self._options.concurrency:
                            one = await loop.run_in_executor(reader, next, ready, None)
                            if more := one is not None:
                                running.add(asyncio.create_task(self._one(session, attempt, one, source, bill)))
                        if not running:
                            break
                        for ended in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
                            ended.result()
                            running.remove(ended)
                        if bill.unanswered > allowed:
                            raise OSError(f"endpoint {self._options.endpoint}: {bill.unanswered} images unanswered")
                finally:
                    for left in running:
                        left.cancel()
                    await asyncio.gather(*running, return_exceptions=True)

    async def _one(
        self, session: aiohttp.ClientSession, attempt: Attempt, ready: Ready[bytes], source: str, bill: Bill
    ) -> None:
        """A sample's caption, or its failure."""
        key, bad = ready.row.key, ("", "")
        for name, least in ((self.name, 0.0), (f"{self.name} again", AGAIN)):
            temperature = max(self._options.temperature, least)
            seed, most = seed_of(name, source, key), self._options.most_tokens
            self._check(bill)
            bill.again += name != self.name
            try:
                body = request(str(self._options.model), self._prompt, ready.image, most, temperature, seed)
                reply = await ask(session, str(self._options.endpoint), self._key, body)
                self._charge(bill, reply)
                found = add_caption(attempt, ready, reply.text, reply.finished, self._options)
                if found is None:
                    return
                bad = found
            except Unanswered as error:
                bill.unanswered += 1
                bad = error.reason, str(error)
                break  # it was asked often enough
            except BadAnswer as error:
                bad = error.reason, str(error)
        attempt.fail(ready.row.row, key, *bad)

    # -- what it costs ---------------------------------------------------------------------------------------------

    def _spent(self, corpus: Corpus) -> float:
        """What the committed shards of the column have cost; a commit is read once by a process."""
        if self._options.max_spend is None:
            return 0.0
        for (source, shard), generation in corpus.listed(self.name):
            if (which := (source, shard, generation)) not in self._costs:
                self._costs[which] = corpus.commit(self.name, *which).timings.get("spend", 0.0)
        return sum(self._costs.values())

    def _charge(self, bill: Bill, reply: Reply) -> None:
        options = self._options
        if options.max_spend is not None and (reply.read is None or reply.wrote is None):
            raise RequestError(
                f"columns.{self.name}.max_spend = {options.max_spend:g}: {options.endpoint} does not say how many "
                "tokens it read and wrote (`usage`), so nothing can be counted; leave max_spend out"
            )
        bill.read += reply.read or 0
        bill.wrote += reply.wrote or 0
        bill.spent = (bill.read * (options.price_in or 0) + bill.wrote * (options.price_out or 0)) / 1e6

    def _check(self, bill: Bill) -> None:
        """Raises RequestError if the limit is reached."""
        limit = self._options.max_spend
        if limit is not None and bill.before + bill.spent >= limit:
            lost = f", and the one that was stopped {bill.spent:.6g}, which is lost" if bill.spent else ""
            raise RequestError(
                f"columns.{self.name}.max_spend = {limit:g} is reached: the committed shards cost {bill.before:.6g}"
                f"{lost}. Raise it, and run the same command again"
            )


def _jpeg(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=QUALITY, colorsubsampling="444")
