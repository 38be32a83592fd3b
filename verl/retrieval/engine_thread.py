"""One thread that opens an engine and makes every call to it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

R = TypeVar("R")


class EngineThread:
    """Runs blocking functions one after another for an event loop.

    It is one thread for good, because thread counts of OpenMP belong to the thread that set them. It is a daemon, so
    that an index which takes an hour to open does not hold up the end of the process. It starts with the first call
    and ends with `stop`, or when nobody refers to this object any more.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._last: _Job | None = None
        weakref.finalize(self, self._jobs.put, None)

    @property
    def busy(self) -> bool:
        """Whether something is still to be done."""
        return self._last is not None and not self._last.finished

    async def call(self, function: Callable[..., R], *arguments: Any) -> R:
        """Return what the function returns, or raise what it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._last = _Job(function, arguments, loop, future)
        self._jobs.put(self._last)
        if self._thread.ident is None:
            self._thread.start()
        return await future

    def stop(self, timeout_s: float) -> None:
        """Let the thread end after what it was given so far; give up waiting after `timeout_s`."""
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)


class _Job:
    __slots__ = ("_arguments", "_function", "_future", "_loop", "finished")

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[Any],
    ) -> None:
        self._function = function
        self._arguments = arguments
        self._loop = loop
        self._future = future
        self.finished = False

    def run(self) -> None:
        """Call the function and hand over what comes of it, an exception included."""
        result, error = None, None
        try:
            result = self._function(*self._arguments)
        except BaseException as raised:  # it belongs to the caller, whatever it is
            error = raised
        self.finished = True
        with suppress(RuntimeError):  # the loop was closed meanwhile, and nobody waits
            self._loop.call_soon_threadsafe(self._deliver, result, error)

    def _deliver(self, result: Any, error: BaseException | None) -> None:
        if self._future.done():
            return
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(result)


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # it refers to the caller, who may be waiting to be collected
