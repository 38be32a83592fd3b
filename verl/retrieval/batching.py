"""Merge what concurrent callers want into batches; the server does so before its engine, the client before HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

Run = Callable[[list[T]], Coroutine[Any, Any, Sequence[R | Exception]]]
Batch = list[tuple[Any, asyncio.Future[Any]]]


class MicroBatcher(Generic[T, R]):
    """Collects items from concurrent `submit` calls and runs them together.

    A batch starts when a running slot is free and it is full or its window has passed. While every slot is busy the
    items pile up, so the busier the service, the larger its batches. The window is only waited for when the batch
    before held the items of several callers: a lone caller would gain nothing by waiting.

    Belongs to the event loop in which it is first used.
    """

    def __init__(self, run: Run[T, R], *, max_items: int, window_s: float, max_running: int = 1) -> None:
        """Prepare a batcher.

        Args:
            run: answers a batch; one result per item, in order; an exception in place of a result is raised to the
                caller of that item alone, an exception that it raises goes to every caller of the batch.
            max_items: items in a batch.
            window_s: seconds that a batch waits for more items.
            max_running: batches that run at the same time.
        """
        self._run = run
        self._max_items = max_items
        self._window_s = window_s
        self._slots = asyncio.Semaphore(max_running)
        self._waiting: deque[tuple[T, asyncio.Future[R], object]] = deque()
        self._full = asyncio.Event()
        self._feeder: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Sequence[R | Exception]]] = set()
        self._crowded = False

    async def submit(self, items: Sequence[T]) -> list[R]:
        """Return the results of `items`, in order; they may be spread over several batches."""
        loop, call = asyncio.get_running_loop(), object()
        futures: list[asyncio.Future[R]] = [loop.create_future() for _ in items]
        self._waiting.extend((item, future, call) for item, future in zip(items, futures, strict=True))
        if len(self._waiting) >= self._max_items:
            self._full.set()
        if self._feeder is None:
            self._feeder = loop.create_task(self._feed())
        return list(await asyncio.gather(*futures))

    async def drain(self) -> None:
        """Wait until everything that was submitted has been answered."""
        while self._feeder or self._running:
            await asyncio.wait({*self._running, *([self._feeder] if self._feeder else [])})

    async def _feed(self) -> None:
        while self._waiting:
            await self._wait_for_company()
            await self._slots.acquire()
            batch = self._take()
            if not batch:
                self._slots.release()
                continue
            running = asyncio.get_running_loop().create_task(self._run([item for item, _ in batch]))
            self._running.add(running)
            running.add_done_callback(partial(self._deliver, batch))
        self._feeder = None

    async def _wait_for_company(self) -> None:
        if not self._crowded or len(self._waiting) >= self._max_items:
            return
        self._full.clear()
        try:
            await asyncio.wait_for(self._full.wait(), self._window_s)
        except TimeoutError:
            return

    def _take(self) -> Batch:
        """Remove the next batch from the queue, less the items whose callers have gone."""
        batch: Batch = []
        calls: set[object] = set()
        while self._waiting and len(batch) < self._max_items:
            item, future, call = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
                calls.add(call)
        self._crowded = len(calls) > 1
        return batch

    def _deliver(self, batch: Batch, running: asyncio.Task[Sequence[R | Exception]]) -> None:
        self._running.discard(running)
        self._slots.release()
        if running.cancelled():
            for _, future in batch:
                future.cancel()
            return
        error = running.exception()
        results = [error] * len(batch) if error else running.result()
        if len(results) != len(batch):
            wrong = RuntimeError(f"a batch of {len(batch)} items got {len(results)} results; expected one each")
            results = [wrong] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
