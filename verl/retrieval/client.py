"""The retriever as a callable: merged into batches, spread over endpoints, retried while they are away, checked."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx

from verl.errors import RetrieverError
from verl.retrieval.batching import MicroBatcher
from verl.retrieval.client_config import RetrieverClientConfig
from verl.retrieval.client_endpoints import Endpoint, EndpointPool, Unavailable
from verl.retrieval.client_http import Failed, HttpRetriever
from verl.retrieval.loop_thread import LoopThread
from verl.retrieval.wire import RequestLimits, query_fault
from verl.types import SearchResult

__all__ = ["RetrieverClient", "RetrieverClientConfig", "search_sync"]

logger = logging.getLogger(__name__)

_MOST_DOCUMENTS = RequestLimits().max_documents


class RetrieverClient:
    """Searches through one or several retriever services; satisfies `verl.agent.protocols.Search`.

    Concurrent calls share requests. Await it from one event loop, and close it with `aclose` or use it as an async
    context manager; or call `search` from any thread, and close it with `close` or use it as a context manager. One
    client is used in one of the two ways.

    Attributes:
        truncated: how many queries were cut at `max_query_chars` so far.
    """

    def __init__(self, config: RetrieverClientConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Prepare a client; nothing is connected yet.

        Args:
            transport: how requests travel, in place of a network connection.

        Raises:
            ConfigError: the variable with the token is not set.
        """
        self.config = config
        self.truncated = 0
        self._http = HttpRetriever(config, transport)
        self._pool = EndpointPool(config.endpoints, config.backoff_s, config.max_backoff_s, self._http.identify)
        # A batch has one topk, because the service refuses one above the corpus size for all queries of a request.
        self._batchers: dict[int, MicroBatcher[str, SearchResult]] = {}
        self._slots = asyncio.Semaphore(config.max_requests)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._own_loop: LoopThread | None = None
        self._starting = threading.Lock()

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Return one result per query, in order, each with at most `topk` documents, best first.

        A query longer than `max_query_chars` is searched for in its cut form, which is then the result's `query`.

        Raises:
            RetrieverError: no or a blank query, a request that the service refuses or fails at, a query that it cannot
                answer, an answer that breaks the contract, endpoints that serve different indexes, or no answer within
                the retry window or the deadline.
        """
        self._check_loop()
        if isinstance(queries, str) or not queries:
            raise RetrieverError(f"queries={queries!r}; expected a list of at least one query")
        sent = [self._checked(query, index) for index, query in enumerate(queries)]
        if topk not in self._batchers:
            self._batchers[topk] = self._batcher(topk)
        try:
            async with asyncio.timeout(self.config.deadline_s):
                return await self._batchers[topk].submit(sent)
        except TimeoutError as error:
            raise RetrieverError(
                f"retriever {self._pool} gave no answer within deadline_s={self.config.deadline_s}; raise it, or add "
                "workers to the service"
            ) from error

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Do the same for code that has no event loop; callers in several threads share requests.

        Raises:
            RetrieverError: as above, or there is an event loop in this thread, which this would block.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise RetrieverError("search() would block the running event loop; await the client itself")
        with self._starting:
            if self._own_loop is None:
                self._own_loop = LoopThread("retriever-client")
        return self._own_loop.run(self(queries, topk))

    async def aclose(self) -> None:
        """Wait for the requests on their way, then close the connections."""
        for batcher in self._batchers.values():
            await batcher.drain()
        await self._http.aclose()

    def close(self) -> None:
        """Do the same after `search`."""
        with self._starting:
            loop, self._own_loop = self._own_loop, None
        if loop is None:
            return
        try:
            loop.run(self.aclose())
        finally:
            loop.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batcher(self, topk: int) -> MicroBatcher[str, SearchResult]:
        async def run(queries: list[str]) -> Sequence[SearchResult | Exception]:
            async with self._slots:
                return await self._search(queries, topk)

        config = self.config
        return MicroBatcher(
            run,
            max_items=min(config.batch_queries, max(1, _MOST_DOCUMENTS // max(topk, 1))),
            window_s=config.batch_window_ms / 1000,
            max_running=config.max_requests,
        )

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise RetrieverError("the client was used in another event loop before; make one client for each loop")
        self._loop = loop

    def _checked(self, query: str, index: int) -> str:
        """Return the query as it is sent."""
        if isinstance(query, str) and len(query) > self.config.max_query_chars:
            query = self._shortened(query)
        fault = query_fault(query, self.config.max_query_chars)
        if fault:
            raise RetrieverError(f"queries[{index}] {fault[1]}")
        return query

    def _shortened(self, query: str) -> str:
        limit = self.config.max_query_chars
        if not self.truncated:
            logger.warning("a query of %d characters is cut to %d; later ones are only counted", len(query), limit)
        self.truncated += 1
        head = query.strip()[: limit + 1]
        at_word = head[:limit] if head[limit:].isspace() else head.rpartition(" ")[0]
        return at_word.strip() or head[:limit]

    async def _search(self, queries: list[str], topk: int) -> list[SearchResult | Exception]:
        """Search for queries of several callers; a query that the service cannot answer fails for its caller alone."""
        results: dict[int, SearchResult | Exception] = {}
        left = list(range(len(queries)))
        while left:
            try:
                answers = await self._until_answered([queries[at] for at in left], topk)
                results.update(zip(left, answers, strict=True))
                break
            except Failed as failed:
                if not failed.queries:
                    raise
                for at, reason in failed.queries.items():
                    results[left[at]] = RetrieverError(f"{failed.what}: {reason}")
                left = [number for at, number in enumerate(left) if at not in failed.queries]
        return [results[at] for at in range(len(queries))]

    async def _until_answered(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        start, attempts = time.monotonic(), 0
        while True:
            endpoint, wait = self._pool.choose()
            if wait and (attempts or wait <= self.config.retry_window_s):  # every call gets one attempt
                await asyncio.sleep(wait)
            attempts += 1
            try:
                return await self._attempt(endpoint, queries, topk)
            except Unavailable as cause:
                self._check_window(cause, endpoint, start, attempts)

    async def _attempt(self, endpoint: Endpoint, queries: Sequence[str], topk: int) -> list[SearchResult]:
        with self._pool.request(endpoint) as sent_at:
            try:
                await self._pool.check(endpoint)
                results = await self._http.search(endpoint.url, queries, topk)
            except Unavailable as cause:
                self._pool.failed(endpoint, sent_at, cause.retry_after_s)
                raise
        endpoint.answered()
        return results

    def _check_window(self, cause: Unavailable, endpoint: Endpoint, start: float, attempts: int) -> None:
        """Give up if the next attempt would come after the retry window."""
        elapsed = time.monotonic() - start
        _, wait = self._pool.choose()
        if elapsed + wait > self.config.retry_window_s:
            which = f"{endpoint.url}: " if len(self.config.endpoints) > 1 else ""
            raise RetrieverError(
                f"retriever {self._pool} gave no answer: {which}{cause} ({attempts} attempts in {elapsed:.1f} s); "
                "check that the service runs, or raise retry_window_s"
            ) from cause
        logger.warning("retriever %s: %s; attempt %d in %.1f s", endpoint.url, cause, attempts + 1, wait)


def search_sync(config: RetrieverClientConfig, queries: Sequence[str], topk: int) -> list[SearchResult]:
    """Search once from code that has no event loop; raises what `RetrieverClient` raises."""
    with RetrieverClient(config) as client:
        return client.search(queries, topk)
