"""Run what concurrent callers want each on its own, where `verl.retrieval.batching` would merge it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Singly(Generic[T, R]):
    """Starts every item as it comes, so that none waits for another; equal items that meet run once.

    An item whose callers have all gone is cancelled, wherever it waits. Belongs to one event loop.
    """

    def __init__(self, run: Callable[[T], Coroutine[Any, Any, R | Exception]]) -> None:
        """Prepare.

        Args:
            run: answers an item, in the order in which they came; items must be hashable.
        """
        self._run = run
        self._runs: dict[T, _Run[R]] = {}
        self._callers: set[asyncio.Task[R | Exception]] = set()

    @property
    def waiting(self) -> int:
        """Items without an answer."""
        return len(self._callers)

    async def gather(self, items: Sequence[T]) -> list[R | Exception]:
        """Return the result or the exception of each item, in order."""
        callers = [asyncio.ensure_future(self._join(item)) for item in items]
        self._callers.update(callers)
        for caller in callers:
            caller.add_done_callback(self._callers.discard)
        return await asyncio.gather(*callers)

    async def drain(self) -> None:
        """Wait until everything has been answered."""
        while self._callers:
            await asyncio.wait(self._callers)

    async def _join(self, item: T) -> R | Exception:
        run = self._runs.get(item)
        if run is None:
            run = self._runs[item] = _Run(asyncio.ensure_future(self._run(item)))
        run.callers += 1
        try:
            return await asyncio.shield(run.task)
        finally:
            run.callers -= 1
            if not run.callers:
                del self._runs[item]
                run.task.cancel()


class _Run(Generic[R]):
    __slots__ = ("callers", "task")

    def __init__(self, task: asyncio.Task[R | Exception]) -> None:
        self.task = task
        self.callers = 0
