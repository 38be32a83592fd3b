"""What stands between requests and the engine: queue, batches, caches, and the state of the service."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from verl.errors import ConfigError
from verl.retrieval.batching import MicroBatcher
from verl.retrieval.engine import Engine, EngineInfo, LiveEngine, as_live, extent
from verl.retrieval.engine_thread import EngineThread
from verl.retrieval.metrics import ServiceMetrics
from verl.retrieval.result_cache import DiskCache, MemoryCache
from verl.retrieval.searching import Job, LiveSearcher, Searcher
from verl.retrieval.server_config import MEGABYTE, ServerConfig
from verl.retrieval.singly import Singly
from verl.retrieval.wire import RefusedRequest, Rendered

logger = logging.getLogger(__name__)

R = TypeVar("R")

_LOADING_RETRY_S = 2
_MOST_RETRY_S = 30
_RATE_WEIGHT = 0.2
_SLOW_WAIT_S = 1.0
_CLOSE_TIMEOUT_S = 10.0


class State(str, Enum):
    """Where the service is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class SearchService:
    """Answers queries with one engine, which is called from one thread with the queries of many requests at once.

    A live engine (`verl.retrieval.engine.LiveEngine`) is asked for each query as it comes, without a thread.
    Belongs to one event loop. It answers from `start` on; `call` opens an engine in the thread that will search it.
    """

    def __init__(self, config: ServerConfig, metrics: ServiceMetrics | None = None) -> None:
        self.config = config
        self.metrics = metrics or ServiceMetrics()
        self.state = State.LOADING
        self._engine: Engine | None = None
        self._memory: MemoryCache | None = None
        self._disk: DiskCache | None = None
        self._thread = EngineThread("engine")
        self._queue: MicroBatcher[Job, Rendered] | Singly[Job, Rendered] | None = None
        self._queries_per_s = 0.0
        self._live = False
        self._left_behind = False

    @property
    def info(self) -> EngineInfo:
        """What is served.

        Raises:
            RefusedRequest: with status 503 while nothing is.
        """
        if self._engine is None:
            message = "the index is being loaded; ask again later, GET /ready tells when"
            raise RefusedRequest(503, "loading", message, retry_after_s=_LOADING_RETRY_S)
        return self._engine.info

    @property
    def busy(self) -> bool:
        """Whether the engine is being opened or called, which cannot be interrupted, or was left so by `close`."""
        return self._thread.busy or self._left_behind

    @property
    def waiting(self) -> int:
        """Queries that are in no batch yet; of a live engine, those without an answer."""
        return self._queue.waiting if self._queue is not None else 0

    def start(self, engine: Engine, cacheable: bool = True) -> None:
        """Serve an engine from now on.

        Args:
            cacheable: whether its results may be kept; those of a live engine never are.

        Raises:
            ConfigError: the default `topk` exceeds what the engine gives, or the cache file cannot be used.
        """
        info, cache = engine.info, self.config.cache
        if self.config.topk > info.max_topk:
            raise ConfigError(f"topk={self.config.topk} exceeds {extent(info)}; lower --topk")
        live = as_live(engine)
        cacheable = cacheable and live is None and bool(info.fingerprint)
        if cacheable and cache.memory_mb:
            self._memory = MemoryCache(int(cache.memory_mb * MEGABYTE))
        if cacheable and cache.path is not None:
            self._disk = DiskCache(cache.path, info.fingerprint, int(cache.disk_mb * MEGABYTE))
        self._queue = self._batches(engine) if live is None else self._singles(live)
        self._live = live is not None
        self._engine = engine
        self.state = State.READY
        self.metrics.ready.set(1)

    async def call(self, function: Callable[..., R], *arguments: Any) -> R:
        """Run a blocking function in the engine's thread, between its searches."""
        return await self._thread.call(function, *arguments)

    async def search(self, queries: Sequence[str], topk: int) -> list[Rendered | Exception]:
        """Return one result, or the error in its place, per query, in order.

        Raises:
            RefusedRequest: with status 503 when too many queries wait already.
        """
        assert self._queue is not None  # `info` was asked before
        results: list[Rendered | Exception | None] = [self._known(query, topk) for query in queries]
        unknown = [at for at, result in enumerate(results) if result is None]
        self._admit(len(unknown))
        self.metrics.queries.inc(len(queries))
        if len(unknown) < len(queries):
            self.metrics.cache_hits.labels("memory").inc(len(queries) - len(unknown))
        if unknown:
            answers = await self._queue.gather([Job(queries[at], topk) for at in unknown])
            for at, answer in zip(unknown, answers, strict=True):
                results[at] = answer
        return results  # type: ignore[return-value]  # none is missing

    def expects_to_wait(self) -> bool:
        """Whether a query that comes now may wait so long that its caller is gone before its turn."""
        return self._live or self.waiting > _SLOW_WAIT_S * self._queries_per_s > 0

    def drain(self) -> None:
        """Say from now on that requests should go elsewhere; those that come are still answered."""
        if self.state is State.READY:
            self.state = State.DRAINING
            self.metrics.ready.set(0)

    async def close(self) -> None:
        """Answer what waits, then close the engine and the caches; give a search up that takes too long for that."""
        self.drain()
        try:
            async with asyncio.timeout(self.config.shutdown_timeout_s):
                if self._queue is not None:
                    await self._queue.drain()
                for closing in (self._engine, self._disk):
                    if closing is not None:
                        await self.call(closing.close)
        except TimeoutError:
            self._left_behind = True
            logger.error("a search did not end within %g s; leaving without it", self.config.shutdown_timeout_s)
        if not self.busy:
            self._thread.stop(_CLOSE_TIMEOUT_S)

    def report(self) -> bytes:
        """Return the metrics of all workers in Prometheus' text format; reads files, so it may block."""
        self.metrics.queued.set(self.waiting)
        return self.metrics.render()

    def _known(self, query: str, topk: int) -> Rendered | None:
        return self._memory.get(query, topk) if self._memory is not None else None

    def _admit(self, queries: int) -> None:
        waiting, most = self.waiting, self.config.max_queued_queries
        if not queries or waiting + queries <= most:
            return
        seconds = math.ceil(waiting / self._queries_per_s) if self._queries_per_s else 1
        raise RefusedRequest(
            503,
            "overloaded",
            f"{waiting} queries wait already; at most {most} may, so ask again later, or start more workers",
            retry_after_s=min(max(seconds, 1), _MOST_RETRY_S),
        )

    def _batches(self, engine: Engine) -> MicroBatcher[Job, Rendered]:
        """Return a queue that runs many queries at once, in the engine's thread."""
        searcher = Searcher(engine, self._disk, self.metrics, self.config.limits.max_documents)
        window_s = self.config.batch_window_ms / 1000
        return MicroBatcher(partial(self._run, searcher), max_items=self.config.batch_queries, window_s=window_s)

    def _singles(self, engine: LiveEngine) -> Singly[Job, Rendered]:
        """Return a queue that runs every query at once, and alone."""
        searcher = LiveSearcher(engine, self.metrics)

        async def ask(job: Job) -> Rendered | Exception:
            start = time.perf_counter()
            answer = await searcher(job)
            # As many as wait are answered in the time that one takes (Little's law).
            self._note_rate(self.waiting, time.perf_counter() - start)
            return answer

        return Singly(ask)

    async def _run(self, searcher: Searcher, jobs: list[Job]) -> Sequence[Rendered | Exception]:
        self.metrics.batch_queries.observe(len(jobs))
        self.metrics.queued.set(self.waiting)
        start = time.perf_counter()
        searched = await self._thread.call(searcher, jobs)
        self._note_rate(len(jobs), time.perf_counter() - start)
        if self._memory is not None:
            for found in searched.found:
                self._memory.put(*found)
        return searched.answers

    def _note_rate(self, queries: int, seconds: float) -> None:
        rate = queries / max(seconds, 1e-6)
        weight = _RATE_WEIGHT if self._queries_per_s else 1.0
        self._queries_per_s += weight * (rate - self._queries_per_s)
