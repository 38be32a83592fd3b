"""The retriever as an async callable: merged into batches, retried while the service is away, checked on arrival."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.batching import MicroBatcher
from verl.retrieval.wire import RetrieveRequest, parse_response, query_fault, request_body
from verl.types import SearchResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetrieverClientConfig:
    """How the client reaches the retriever.

    Attributes:
        url: the endpoint, `/retrieve` included.
        timeout_s: for one attempt.
        retry_window_s: a call that meets a dead, slow or overloaded service is tried again until this long after its
            first attempt; 0 tries once.
        backoff_s: mean wait before the second attempt; it doubles with every further one.
        max_backoff_s: most that is waited between two attempts.
        batch_queries: most queries in one request.
        batch_window_ms: how long a request waits for the queries of other callers.
        max_requests: requests on their way at the same time.
        max_query_chars: longer queries are cut at a word boundary, counted and logged; what the service accepts.
    """

    url: str = "http://127.0.0.1:3000/retrieve"
    timeout_s: float = 30.0
    retry_window_s: float = 60.0
    backoff_s: float = 0.2
    max_backoff_s: float = 5.0
    batch_queries: int = 64
    batch_window_ms: float = 2.0
    max_requests: int = 8
    max_query_chars: int = 4096

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"retriever url={self.url!r}; expected http://HOST:PORT/retrieve")
        try:
            _ = urlsplit(self.url).port
        except ValueError as error:
            raise ConfigError(f"retriever url={self.url!r}: {error}; expected http://HOST:PORT/retrieve") from error
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ConfigError(f"retriever timeout_s={self.timeout_s}; expected a positive number of seconds")
        for name in ("retry_window_s", "backoff_s", "max_backoff_s", "batch_window_ms"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"retriever {name}={getattr(self, name)}; expected 0 or more")
        for name in ("batch_queries", "max_requests", "max_query_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"retriever {name}={getattr(self, name)}; expected at least 1")


class RetrieverClient:
    """Searches through a retriever service; satisfies `verl.agent.protocols.Search`.

    Concurrent calls share requests. Belongs to the event loop in which it is first called; close it with `aclose` or
    use it as an async context manager.

    Attributes:
        truncated: how many queries were cut at `max_query_chars` so far.
    """

    def __init__(self, config: RetrieverClientConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Prepare a client; nothing is connected yet.

        Args:
            transport: how requests travel, in place of a network connection.
        """
        self.config = config
        self.truncated = 0
        self._http = httpx.AsyncClient(
            transport=transport,
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.max_requests),
            # A proxy from the environment would be asked for a service that usually runs on this very machine.
            trust_env=False,
        )
        # A batch has one topk, because the service refuses one above the corpus size for all queries of a request.
        self._batchers: dict[int, MicroBatcher[str, SearchResult]] = {}
        self._slots = asyncio.Semaphore(config.max_requests)
        self._jitter = random.Random()  # only spreads retries in time; no result depends on it
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Return one result per query, in order, each with at most `topk` documents, best first.

        A query longer than `max_query_chars` is searched for in its cut form, which is then the result's `query`.

        Raises:
            RetrieverError: no or a blank query, a request that the service refuses, an answer that breaks the
                contract, or no answer within the retry window.
        """
        self._check_loop()
        if isinstance(queries, str) or not queries:
            raise RetrieverError(f"queries={queries!r}; expected a list of at least one query")
        sent = [self._checked(query, index) for index, query in enumerate(queries)]
        if topk not in self._batchers:
            self._batchers[topk] = self._batcher(topk)
        return await self._batchers[topk].submit(sent)

    async def aclose(self) -> None:
        """Wait for the requests on their way, then close the connections."""
        for batcher in self._batchers.values():
            await batcher.drain()
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _batcher(self, topk: int) -> MicroBatcher[str, SearchResult]:
        async def run(queries: list[str]) -> Sequence[SearchResult | Exception]:
            async with self._slots:
                return await self._search(queries, topk)

        config = self.config
        return MicroBatcher(
            run,
            max_items=config.batch_queries,
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
        """Search for queries of several callers; a query that the service refuses fails for its caller alone."""
        try:
            return list(await self._post_until_answered(queries, topk))
        except _Refused as refused:
            at = refused.query_index
            if at is None or len(queries) == 1 or not 0 <= at < len(queries):
                raise
            others = await self._search(queries[:at] + queries[at + 1 :], topk)
            return [*others[:at], refused, *others[at:]]

    async def _post_until_answered(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        loop = asyncio.get_running_loop()
        start, attempt = loop.time(), 0
        while True:
            try:
                return await self._post(queries, topk)
            except _Unavailable as cause:
                attempt += 1
                wait = self._wait_s(attempt, cause.retry_after_s)
                elapsed = loop.time() - start
                if elapsed + wait > self.config.retry_window_s:
                    raise RetrieverError(
                        f"retriever {self.config.url} gave no answer: {cause} ({attempt} attempts in {elapsed:.1f} s); "
                        "check that the service runs, or raise retry_window_s"
                    ) from cause
                logger.warning("retriever %s: %s; attempt %d in %.1f s", self.config.url, cause, attempt + 1, wait)
                await asyncio.sleep(wait)

    def _wait_s(self, attempt: int, retry_after_s: float) -> float:
        """Exponential backoff with jitter between half and one and a half of its mean, at least what was asked for."""
        mean = min(self.config.backoff_s * 2 ** min(attempt - 1, 30), self.config.max_backoff_s)
        return min(max(mean * self._jitter.uniform(0.5, 1.5), retry_after_s), self.config.max_backoff_s)

    async def _post(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        body = request_body(RetrieveRequest(tuple(queries), topk, return_scores=True))
        seconds = self.config.timeout_s
        try:
            # httpx bounds each read; an answer that drips would come through that for ever.
            async with asyncio.timeout(seconds):
                response = await self._http.post(
                    self.config.url, content=body, headers={"Content-Type": "application/json"}
                )
        except TimeoutError as error:
            raise _Unavailable(f"no answer within timeout_s={seconds:g}") from error
        except httpx.TransportError as error:
            raise _Unavailable(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if response.status_code >= 500:
            raise _Unavailable(f"status {response.status_code}: {_reason(response)[0]}", _retry_after_s(response))
        if response.status_code != 200:
            message, query_index = _reason(response)
            refusal = f"retriever {self.config.url} refused the request with {response.status_code}: {message}"
            raise _Refused(refusal, query_index)
        try:
            return parse_response(response.content, queries, topk)
        except RetrieverError as error:
            raise RetrieverError(
                f"retriever {self.config.url}: {error}; check that the URL is a retriever's"
            ) from error


def search_sync(config: RetrieverClientConfig, queries: Sequence[str], topk: int) -> list[SearchResult]:
    """Search once from code that has no event loop; raises what `RetrieverClient` raises."""

    async def search() -> list[SearchResult]:
        async with RetrieverClient(config) as client:
            return await client(queries, topk)

    return asyncio.run(search())


class _Unavailable(Exception):
    """The service could not be reached or could not answer; asking again may help."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _Refused(RetrieverError):
    """The service says that the request is wrong; asking again cannot help."""

    def __init__(self, message: str, query_index: int | None = None) -> None:
        super().__init__(message)
        self.query_index = query_index


def _reason(response: httpx.Response) -> tuple[str, int | None]:
    """Return the message of an error answer, ours or another server's, and which query is at fault, if it says so."""
    try:
        error = json.loads(response.content)["error"]
        at = error.get("query_index")
        return str(error["message"]), at if isinstance(at, int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return response.text.strip()[:300] or response.reason_phrase, None


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0
