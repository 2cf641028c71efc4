"""Decode in a separate process, for a unit that killed the process that read it."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, Self, TypeVar, cast

from microdit.pipeline.base.liveness import alive, end_with_parent
from microdit.pipeline.content.images import BadImage

T = TypeVar("T")


class IsolatedDecoder(Generic[T]):
    """Run `decode` in another process, so that an image that kills it, or makes it hang, fails alone.

    Their reasons are `crash`, and `stall` after `timeout` seconds. To be used as a context, by one thread.
    """

    def __init__(self, decode: Callable[[bytes], T], timeout: float):
        self._decode, self._timeout = decode, timeout
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def __call__(self, data: bytes) -> T:
        """Return or raise what `decode` does.

        Raises:
            BadImage: also with the reasons `crash` and `stall`.
        """
        alive()
        if self._process is None:
            self._start()
        try:
            self._pipe.send_bytes(data)
            waited = 0.0
            while not self._pipe.poll(0.5):
                waited += 0.5
                if waited >= self._timeout:
                    self._end()
                    raise BadImage("stall", f"decoding it alone took more than {self._timeout:g} seconds")
                alive()
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._end()
            raise BadImage("crash", "the process that decoded it alone died") from None
        if isinstance(result, tuple):
            raise BadImage(*result)
        if isinstance(result, Exception):
            raise result
        return cast(T, result)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._decode, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # the process has started: from now on the time is the image's

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(decode: Callable[[bytes], object], pipe: Connection) -> None:
    end_with_parent()
    pipe.send("ready")
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        try:
            answer: Any = decode(data)
        except BadImage as error:  # its pickled form lacks the detail
            answer = (error.reason, str(error))
        except Exception as error:
            answer = ValueError(f"{type(error).__name__}: {error}")
        pipe.send(answer)
