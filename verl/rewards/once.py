"""Work that many trajectories share, done once: what the frozen generator makes of a bare question."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import partial
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Once(Generic[K, V]):
    """Remembers what `work` returned for a key, for as long as it lives; callers at the same time share one run.

    A failure is raised to everyone who waits for it and then forgotten, so the next caller tries again.
    """

    def __init__(self) -> None:
        self._done: dict[K, V] = {}
        self._running: dict[K, asyncio.Task[V]] = {}

    async def __call__(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """Return the value of `key`, from `work` if it is not known yet; raises what `work` raises."""
        if key in self._done:
            return self._done[key]
        task = self._running.get(key)
        if task is None:
            task = asyncio.ensure_future(work())
            self._running[key] = task
            task.add_done_callback(partial(self._finish, key))
        # Shielded: one caller that gives up must not end the work for the others.
        return await asyncio.shield(task)

    def _finish(self, key: K, task: asyncio.Task[V]) -> None:
        del self._running[key]
        if not task.cancelled() and task.exception() is None:
            self._done[key] = task.result()


async def together(work: Sequence[Awaitable[V]]) -> list[V]:
    """Await everything at the same time; the first failure is raised as it is, and ends the rest."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
