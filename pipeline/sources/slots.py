"""Bound how many requests run at once, and choose which one is the next."""

import asyncio
import heapq


class Slots:
    """A semaphore that serves the waiting in the order of their rank, and not of their coming."""

    def __init__(self, number: int):
        self._free = number
        self._waiters: list[tuple[tuple[int, int], int, asyncio.Future[None]]] = []
        self._came = 0

    async def acquire(self, rank: tuple[int, int]) -> None:
        """Wait for a slot; those of the lowest rank have theirs first."""
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._came += 1
        heapq.heappush(self._waiters, (rank, self._came, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just been given one
                self.release()
            raise

    def release(self) -> None:
        """Give a slot to the next one, or back."""
        while self._waiters:
            _, _, turn = heapq.heappop(self._waiters)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
