"""What engines that ask other services have in common."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence

from verl.errors import RetrieverError
from verl.retrieval.engine import EngineInfo, check_topk
from verl.retrieval.loop_thread import LoopThread
from verl.retrieval.replay import ReplayCache
from verl.retrieval.web_http import Fetcher
from verl.types import SearchResult


class RemoteEngine(ABC):
    """A `LiveEngine` that asks a service over HTTP; a query that cannot be answered gets an error of its own.

    Calls may be concurrent, from any thread and event loop: what they send leaves from a loop of the engine's own, at
    the fetcher's rate and in the order in which they came.
    """

    def __init__(self, info: EngineInfo, fetcher: Fetcher | None, cache: ReplayCache) -> None:
        """Prepare an engine; nothing is asked yet.

        Args:
            fetcher: None when only the file of kept answers is asked.
            cache: that file.
        """
        self._info = info
        self._fetcher = fetcher
        self._cache = cache
        self._loop = LoopThread(info.name)

    @property
    def info(self) -> EngineInfo:
        """What this is. A service changes: one fingerprint does not promise equal answers, except in mode `replay`."""
        return self._info

    @property
    def live(self) -> bool:
        """Whether the service is asked, and not its kept answers alone."""
        return self._fetcher is not None

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
        """Return one result or error per query, in order; see `Engine.search`."""
        check_topk(topk, self._info)
        return self._loop.run(self._find_all(queries, topk))

    async def answer(self, query: str, topk: int) -> SearchResult | RetrieverError:
        """Return the result or the error of one query; see `LiveEngine.answer`."""
        check_topk(topk, self._info)
        return await self._loop.call(self._found(query, topk))

    def close(self) -> None:
        """Close connections, thread and file."""
        if self._loop.closed:
            return
        if self._fetcher is not None:
            self._loop.run(self._fetcher.aclose())
        self._loop.close()
        self._cache.close()

    async def _find_all(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
        distinct = list(dict.fromkeys(queries))
        found = await asyncio.gather(*(self._found(query, topk) for query in distinct))
        results = dict(zip(distinct, found, strict=True))
        return [results[query] for query in queries]

    async def _found(self, query: str, topk: int) -> SearchResult | RetrieverError:
        try:
            return await self._find(query, topk)
        except RetrieverError as error:
            return RetrieverError(f"{self._info.name}: {error}")

    @abstractmethod
    async def _find(self, query: str, topk: int) -> SearchResult:
        """Return the result of one query.

        Raises:
            RetrieverError: why there is none.
        """
