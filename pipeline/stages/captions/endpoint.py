"""`captions/<name>` of a server that the user already runs, or pays for: many requests in flight, a limit to the cost.

committed tar --a thread--> rows --threads--> JPEGs --event loop, at most `concurrency` in flight--> captions
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import simplejpeg

from microdit.model.pretrained.prompts import default_prompt
from microdit.pipeline.base.errors import RequestError, ServerRejects
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.content.images import decode_within
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest
from microdit.pipeline.stages.batch_line import BatchLine, PreparedImage, prepared_images
from microdit.pipeline.stages.captions.asking import AGAIN, SCALARS, asked_of, check_language, judge
from microdit.pipeline.stages.captions.chat import BadAnswer, Reply, Unanswered, ask, request
from microdit.pipeline.stages.rows import Outcome, RowFailure, ShardRun, image_bytes, open_shard
from microdit.pipeline.stages.stage import ColumnSpec, Task, seed_of

QUALITY = 90  # of the JPEGs that are sent
# a shard with more samples that got no answer, a share and a number of them, is tried again: the server is at fault
NO_ANSWER, LEAST = 0.05, 3

Image = PreparedImage[bytes]


@dataclass
class Bill:
    """The cost of a shard so far: `spent` in the user's currency, on top of the cost of the column `before` it."""

    before: float
    spent: float = 0.0
    read: int = 0
    wrote: int = 0
    unanswered: int = 0
    """Samples that the server was too busy, broken or slow for."""
    rejected: int = 0
    """Samples that the server rejected, or gave no answer to."""
    last: str = ""
    """Reply to the last request of both."""
    again: int = 0


class Endpoint:
    """One column from an endpoint.

    A rejected answer is asked for once more; the sample fails with what is wrong with the second one.
    """

    device = None

    def __init__(self, name: str, options: CaptionsColumn, max_pixels: int, resources: Resources):
        self.name, self._options = name, options
        self._max_pixels, self._threads = max_pixels, resources.decode_threads
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
        """Find the server's key as this machine has it.

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
        with open_shard(corpus, task, images) as shard, BatchLine(self._threads) as line:
            ahead = 2 * self._options.concurrency
            prepared = prepared_images(line, shard.rows(), self._prepare, shard.write, ahead)
            allowed = max(LEAST, NO_ANSWER * images.counts["out"])
            asyncio.run(self._ask_all(shard, prepared, bill, allowed))
            costs = {"spend": bill.spent, "tokens_read": bill.read, "tokens_wrote": bill.wrote, "again": bill.again}
            return shard.commit(lambda column: costs)

    def _prepare(self, row: Row) -> bytes:
        """Encode the image as a JPEG, which the server is sent."""
        pixels = decode_within(image_bytes(row.members), self._max_pixels, self._options.image_side)
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=QUALITY, colorsubsampling="444")

    async def _ask_all(self, shard: ShardRun, images: Iterator[Image], bill: Bill, allowed: float) -> None:
        """Caption all images, at most `concurrency` in flight.

        Raises:
            OSError: more than `allowed` images stay unanswered.
            ServerRejects: more than `allowed` are rejected.
        """
        loop, running = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        with ThreadPoolExecutor(1) as reader:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                try:
                    more = True
                    while more or running:
                        while more and len(running) < self._options.concurrency:
                            image = await loop.run_in_executor(reader, next, images, None)
                            if more := image is not None:
                                running.add(asyncio.create_task(self._one(session, shard, image, bill)))
                        if not running:
                            break
                        for ended in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
                            ended.result()
                            running.remove(ended)
                        if bill.unanswered > allowed:
                            what = f"{bill.unanswered} images unanswered, the last with {bill.last}"
                            raise OSError(f"endpoint {self._options.endpoint}: {what}")
                        if bill.rejected > allowed:
                            what = f"{bill.rejected} requests rejected, the last with {bill.last}"
                            raise ServerRejects(f"endpoint {self._options.endpoint}: {what}")
                finally:
                    for left in running:
                        left.cancel()
                    await asyncio.gather(*running, return_exceptions=True)

    async def _one(self, session: aiohttp.ClientSession, shard: ShardRun, image: Image, bill: Bill) -> None:
        shard.write(image.row, await self._caption(session, image, shard.task.ref.source, bill))

    async def _caption(self, session: aiohttp.ClientSession, image: Image, source: str, bill: Bill) -> Outcome:
        """Ask for a sample's caption; once more if the answer is rejected."""
        temperature, no_answer = self._options.temperature, False
        for again, salt, warmth in ((0, self.name, temperature), (1, f"{self.name} again", max(temperature, AGAIN))):
            bill.again += again
            try:
                seed = seed_of(salt, source, image.row.key)
                outcome, no_answer = await self._answer(session, image, warmth, seed, bill), False
            except Unanswered as error:  # the request itself was repeated often enough
                bill.unanswered, bill.last = bill.unanswered + 1, f"{error.reason}: {error}"
                return RowFailure(error.reason, str(error))
            except BadAnswer as error:
                outcome, no_answer, bill.last = RowFailure(error.reason, str(error)), True, f"{error.reason}: {error}"
            if not isinstance(outcome, RowFailure):
                break
        bill.rejected += no_answer
        return outcome

    async def _answer(
        self, session: aiohttp.ClientSession, image: Image, temperature: float, seed: int, bill: Bill
    ) -> Outcome:
        """Make one request.

        Raises:
            Unanswered: the server gives no answer.
            BadAnswer: it rejects the request, or what it answers is no answer.
        """
        self._check(bill)
        most = self._options.most_tokens
        body = request(str(self._options.model), self._prompt, image.image, most, temperature, seed)
        reply = await ask(session, str(self._options.endpoint), self._key, body)
        self._charge(bill, reply)
        if reply.ended == "content_filter":
            return RowFailure("cut_off", f"the server's filter stopped it: {reply.text[:200]}")
        if reply.ended not in ("stop", "length"):
            raise BadAnswer("cut_off", f"finish_reason is {reply.ended!r}, expected 'stop': {reply.text[:200]}")
        return judge(reply.text, reply.finished, self._options)

    # -- the cost ------------------------------------------------------------------------------------------------------

    def _spent(self, corpus: Corpus) -> float:
        """Sum up the cost of the column's committed shards. A process reads each commit once."""
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
        """Check that the limit is not reached.

        Raises:
            RequestError: it is.
        """
        limit = self._options.max_spend
        if limit is not None and bill.before + bill.spent >= limit:
            lost = f", and the one that was stopped {bill.spent:.6g}, which is lost" if bill.spent else ""
            raise RequestError(
                f"columns.{self.name}.max_spend = {limit:g} is reached: the committed shards cost {bill.before:.6g}"
                f"{lost}. Raise it, and run the same command again"
            )
