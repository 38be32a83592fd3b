"""Replies that are had without asking twice: from the cache, or from an equal request that is already under way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

from generator_llms.cache import ReplyCache
from generator_llms.config import CacheMode
from generator_llms.replies import Completion, ServedModel
from generator_llms.usage import GeneratorStats
from verl.errors import GeneratorError

logger = logging.getLogger(__name__)

Fetch = Callable[[], Awaitable[Completion]]


class ReplyStore:
    """Returns a stored reply or fetches it, by the rules of a cache mode.

    Args:
        cache: None keeps nothing.
    """

    def __init__(self, cache: ReplyCache | None, mode: CacheMode, stats: GeneratorStats) -> None:
        self._cache = cache
        self._mode = mode
        self._stats = stats
        self._shared = _Shared()

    async def reply(self, key: str, model: str, share: bool, fetch: Fetch) -> Completion:
        """Return the reply of a request.

        Args:
            key: of the request, see `cache_key`.
            share: let equal requests that are asked at the same time have one reply; they have it from a cache anyway.

        Raises:
            GeneratorError: it could not be fetched, or is not there to be replayed.
        """
        stored = self._stored(key)
        if stored is not None:
            self._stats.cached += 1
            return stored
        if self._mode == "replay":
            raise GeneratorError(
                f"cache_mode=replay: no reply of {model!r} to this request in {self._cache and self._cache.path} "
                f"(key {key[:16]}); the run that filled it asked something else, or with other parameters. Use "
                "cache_mode=use to ask for what is missing"
            )
        if not share and self._cache is None:
            return await fetch()
        if key in self._shared:
            self._stats.shared += 1
        return await self._shared.run(key, lambda: self._fetch(key, model, fetch))

    async def note_served(self, endpoint: str, model: ServedModel) -> None:
        """Remember which model an endpoint serves, for replays."""
        cache = self._cache
        if cache is not None and cache.served(endpoint) != model:
            await self._keep(lambda: cache.put_served(endpoint, model))

    async def aclose(self) -> None:
        """End the requests under way and close the cache."""
        await self._shared.aclose()
        if self._cache is not None:
            await asyncio.to_thread(self._cache.close)

    def _stored(self, key: str) -> Completion | None:
        if self._cache is None or self._mode == "refresh":
            return None
        text = self._cache.get(key)
        if text is None:
            return None
        try:
            return Completion.from_json(text)
        except ValueError as cause:
            raise GeneratorError(
                f"cache_path={self._cache.path} holds something else than a reply under {key}: {cause}; use "
                "cache_mode=refresh once, or delete the file"
            ) from cause

    async def _fetch(self, key: str, model: str, fetch: Fetch) -> Completion:
        completion = await fetch()
        cache, overwrite = self._cache, self._mode == "refresh"
        if cache is not None:
            await self._keep(lambda: cache.put(key, model, completion.to_json(), overwrite))
        return completion

    async def _keep(self, write: Callable[[], None]) -> None:
        """Write to the cache in a thread; a failure is told, but what was to be kept is as good as ever."""
        try:
            await asyncio.to_thread(write)
        except GeneratorError as error:
            if not self._stats.cache_failures:
                logger.warning("a reply was not kept (further ones are only counted): %s", error)
            self._stats.cache_failures += 1


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[Completion]
    waiting: int = 0


class _Shared:
    """One running task for each key, whose result all who ask meanwhile get; it ends when nobody waits any more."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._running

    async def run(self, key: str, fetch: Callable[[], Coroutine[None, None, Completion]]) -> Completion:
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = _Running(asyncio.create_task(fetch()))
            running.task.add_done_callback(lambda _: self._forget(key, running))
        running.waiting += 1
        try:
            # Shielded: one of several callers giving up must not end it for the others.
            return await asyncio.shield(running.task)
        finally:
            running.waiting -= 1
            if not running.waiting and not running.task.done():
                running.task.cancel()
                self._forget(key, running)

    async def aclose(self) -> None:
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, key: str, running: _Running) -> None:
        if self._running.get(key) is running:
            del self._running[key]
