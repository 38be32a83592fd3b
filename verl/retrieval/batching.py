"""Merge what concurrent callers want into batches; the server does so before its engine, the client before HTTP."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CROWD = 8
"""So many callers at the end of a batch are worth waiting for."""
_FORGETTING = 1.05
"""How much an item alone may have become slower since the one before, for the least time not to stand for ever."""

Run = Callable[[list[T]], Coroutine[Any, Any, Sequence[R | Exception]]]


class MicroBatcher(Generic[T, R]):
    """Collects items from concurrent calls and runs them together.

    A batch starts when a running slot is free and it is full or its window has passed. While every slot is busy the
    items pile up, so the busier the service, the larger its batches. The window is only waited for when the batch
    before and those left waiting at its end were a crowd: a few callers would lose more by waiting than they gain, and
    below half load most batches are of a few. It ends as soon as there are as many items as were answered and waiting
    then: callers who wait for an answer before they ask anew are all back, and share one batch instead of falling
    apart into groups that take turns. Nor is it waited for where one batch in place of two saves less time than that,
    because an item takes hardly longer alone than its share of a crowd's batch.

    Belongs to the event loop in which it is first used.
    """

    def __init__(self, run: Run[T, R], *, max_items: int, window_s: float, max_running: int = 1) -> None:
        """Prepare a batcher.

        Args:
            run: answers a batch; one result per item, in order; an exception in place of a result concerns that item
                alone, an exception that it raises concerns every item of the batch.
            max_items: items in a batch.
            window_s: seconds that a batch waits for more items.
            max_running: batches that run at the same time.
        """
        self._run = run
        self._max_items = max_items
        self._window_s = window_s
        self._slots = asyncio.Semaphore(max_running)
        self._calls: deque[_Call[T, R]] = deque()
        self._enough = asyncio.Event()
        self._feeder: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Sequence[R | Exception]]] = set()
        self._expected = 0
        self._alone_s = math.inf
        self._each_s = 0.0
        self.waiting = 0
        """Items that are in no batch yet."""

    async def submit(self, items: Sequence[T]) -> list[R]:
        """Return the results of `items`, in order; raise the first of their exceptions if there is any."""
        results: list[R] = []
        for result in await self.gather(items):
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results

    async def gather(self, items: Sequence[T]) -> list[R | Exception]:
        """Return the result or the exception of each item, in order; they may be spread over several batches."""
        if not items:
            return []
        loop = asyncio.get_running_loop()
        call: _Call[T, R] = _Call(items, loop.create_future())
        self._calls.append(call)
        self.waiting += len(items)
        if self._feeder is None:
            self._feeder = loop.create_task(self._feed())
        elif self.waiting >= self._expected:
            self._enough.set()
        try:
            return await call.future
        except asyncio.CancelledError:
            self.waiting -= call.abandon()
            raise

    async def drain(self) -> None:
        """Wait until everything that was submitted has been answered."""
        while self._feeder or self._running:
            await asyncio.wait({*self._running, *([self._feeder] if self._feeder else [])})

    async def _feed(self) -> None:
        while self._calls:
            await self._slots.acquire()
            await self._wait_for_company()
            batch = self._take()
            if not batch:
                self._slots.release()
                continue
            items = [item for part in batch for item in part.items]
            running = asyncio.get_running_loop().create_task(self._run(items))
            self._running.add(running)
            running.add_done_callback(partial(self._deliver, batch, time.perf_counter()))
        self._feeder = None

    async def _wait_for_company(self) -> None:
        if self.waiting >= self._expected:
            return
        await asyncio.sleep(0)  # the answers of the batch before go out first; the window is for what they bring back
        if self._alone_s - self._each_s < self._window_s:
            return
        self._enough.clear()
        try:
            async with asyncio.timeout(self._window_s):
                await self._enough.wait()
        except TimeoutError:
            return

    def _take(self) -> list[_Part[T, R]]:
        """Remove the next batch from the queue, less the items whose callers have gone."""
        batch: list[_Part[T, R]] = []
        room = self._max_items
        while self._calls and room:
            call = self._calls[0]
            part = call.take(room)
            if part is not None:
                batch.append(part)
                room -= len(part.items)
            if not call.left:
                self._calls.popleft()
        self.waiting -= self._max_items - room
        return batch

    def _note_time(self, size: int, seconds: float) -> None:
        """Learn what an item takes alone, the least of what was seen lately, and in a crowd."""
        if size == 1:
            self._alone_s = min(seconds, _FORGETTING * self._alone_s)
        elif size >= _CROWD:
            self._each_s = seconds / size

    def _deliver(
        self, batch: Sequence[_Part[T, R]], start: float, running: asyncio.Task[Sequence[R | Exception]]
    ) -> None:
        self._running.discard(running)
        self._slots.release()
        size = sum(len(part.items) for part in batch)
        self._note_time(size, time.perf_counter() - start)
        there = min(size + self.waiting, self._max_items) if len(batch) > 1 or self.waiting else 0
        self._expected = there if there >= _CROWD else 0
        error = None if running.cancelled() else running.exception()
        if running.cancelled() or (error is not None and not isinstance(error, Exception)):
            for part in batch:  # we are being stopped, and so are the callers
                part.call.future.cancel()
            return
        results = [error] * size if error else running.result()
        if len(results) != size:
            wrong = RuntimeError(f"a batch of {size} items got {len(results)} results; expected one each")
            results = [wrong] * size
        at = 0
        for part in batch:
            part.call.put(part.start, results[at : at + len(part.items)])
            at += len(part.items)


class _Call(Generic[T, R]):
    """The items of one caller and their results so far; one future for all of them keeps a query cheap."""

    __slots__ = ("_items", "_missing", "_results", "_taken", "future")

    def __init__(self, items: Sequence[T], future: asyncio.Future[list[R | Exception]]) -> None:
        self._items = items
        self._results: list[R | Exception | None] = [None] * len(items)
        self._missing = len(items)
        self._taken = 0
        self.future = future

    @property
    def left(self) -> int:
        """Items that are in no batch yet."""
        return len(self._items) - self._taken

    def take(self, most: int) -> _Part[T, R] | None:
        """Return the next items, None when there is none left."""
        start, self._taken = self._taken, min(len(self._items), self._taken + most)
        return _Part(self, start, self._items[start : self._taken]) if start < self._taken else None

    def put(self, start: int, results: Sequence[R | Exception]) -> None:
        """Enter the results of the items from `start` on; with the last of them the caller gets its answer."""
        self._results[start : start + len(results)] = results
        self._missing -= len(results)
        if not self._missing and not self.future.done():
            self.future.set_result(self._results)  # type: ignore[arg-type]  # none is missing

    def abandon(self) -> int:
        """Give up the items that are in no batch yet; return how many those were."""
        left, self._taken = self.left, len(self._items)
        return left


class _Part(Generic[T, R]):
    """A run of one caller's items inside a batch."""

    __slots__ = ("call", "items", "start")

    def __init__(self, call: _Call[T, R], start: int, items: Sequence[T]) -> None:
        self.call = call
        self.start = start
        self.items = items
