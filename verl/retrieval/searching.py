"""What happens to a batch of queries in the engine's thread: file cache, engine, rendering; and to a live query."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from verl.errors import RetrieverError
from verl.retrieval.engine import Engine, LiveEngine
from verl.retrieval.metrics import ServiceMetrics
from verl.retrieval.result_cache import DiskCache
from verl.retrieval.wire import Rendered, render
from verl.types import SearchResult

logger = logging.getLogger(__name__)

_SMALL_TOPK = 16
_HOPELESS_AFTER = 3


class Job(NamedTuple):
    """One query of a request."""

    query: str
    topk: int


class Found(NamedTuple):
    """A query's result, searched for with `topk`."""

    query: str
    topk: int
    hits: Rendered


class Searched(NamedTuple):
    """What became of a batch: an answer for each job, in order, and each result once, to be kept."""

    answers: list[Rendered | Exception]
    found: list[Found]


class Searcher:
    """Searches batches with an engine, equal queries once; blocking, and for one thread.

    A query that fails, fails alone: when the engine raises for several queries they are searched one by one.
    """

    def __init__(self, engine: Engine, disk: DiskCache | None, metrics: ServiceMetrics, max_documents: int) -> None:
        """Prepare.

        Args:
            max_documents: documents that one engine call may return, which bounds the memory it takes.
        """
        self._engine = engine
        self._disk = disk
        self._metrics = metrics
        self._max_documents = max_documents

    def __call__(self, jobs: Sequence[Job]) -> Searched:
        """Answer every job. The engine is asked for the largest `topk`; a smaller one gets the head of the result."""
        groups: dict[int, dict[str, int]] = {}
        for query, topk in jobs:
            wanted = groups.setdefault(_size_class(topk), {})
            wanted[query] = max(topk, wanted.get(query, 0))
        found: list[Found] = []
        by_query: dict[tuple[int, str], Rendered | Exception] = {}
        for size, wanted in groups.items():
            for query, topk, result in self._search(wanted):
                by_query[size, query] = result
                if isinstance(result, Rendered):
                    found.append(Found(query, topk, result))
        repeated = len(jobs) - len(by_query)
        if repeated:
            self._metrics.cache_hits.labels("batch").inc(repeated)
        return Searched([_head(by_query[_size_class(topk), query], topk) for query, topk in jobs], found)

    def _search(self, wanted: dict[str, int]) -> Iterator[tuple[str, int, Rendered | Exception]]:
        """Yield query, the `topk` it was searched for, and what came of it."""
        known = self._disk.get_many(wanted) if self._disk is not None else {}
        if known:
            self._metrics.cache_hits.labels("disk").inc(len(known))
            yield from ((query, wanted[query], hits) for query, hits in known.items())
        missing = [query for query in wanted if query not in known]
        if not missing:
            return
        topk = max(wanted[query] for query in missing)
        step = max(1, self._max_documents // topk)
        for start in range(0, len(missing), step):
            queries = missing[start : start + step]
            results = [_rendered(result) for result in self._ask(queries, topk)]
            if self._disk is not None:
                pairs = zip(queries, results, strict=True)
                self._disk.put_many(((query, hits) for query, hits in pairs if isinstance(hits, Rendered)), topk)
            yield from ((query, topk, result) for query, result in zip(queries, results, strict=True))

    def _ask(self, queries: list[str], topk: int) -> Sequence[SearchResult | Exception]:
        start = time.perf_counter()
        try:
            return self._ask_engine(queries, topk)
        except Exception as error:  # whatever an engine raises concerns these queries, not the service
            logger.error("%s: a search failed", self._engine.info.name, exc_info=error)
            return [error] if len(queries) == 1 else list(self._ask_each(queries, topk))
        finally:
            self._metrics.engine_seconds.observe(time.perf_counter() - start)
            self._metrics.searched.inc(len(queries))

    def _ask_each(self, queries: Iterable[str], topk: int) -> Iterator[SearchResult | Exception]:
        """Search one by one after a failure, until it is clear that the fault is no single query's."""
        in_a_row: list[Exception] = []
        for query in queries:
            if len(in_a_row) >= _HOPELESS_AFTER:
                yield in_a_row[-1]
                continue
            try:
                (result,) = self._ask_engine([query], topk)
            except Exception as error:  # as above
                in_a_row.append(error)
                yield error
            else:
                in_a_row.clear()
                yield result

    def _ask_engine(self, queries: list[str], topk: int) -> Sequence[SearchResult | RetrieverError]:
        results = self._engine.search(queries, topk)
        if len(results) != len(queries):
            raise RuntimeError(f"the engine gave {len(results)} results for {len(queries)} queries")
        return results


class LiveSearcher:
    """Asks a live engine for single queries; belongs to one event loop."""

    def __init__(self, engine: LiveEngine, metrics: ServiceMetrics) -> None:
        self._engine = engine
        self._metrics = metrics

    async def __call__(self, job: Job) -> Rendered | Exception:
        """Answer a job, if with what went wrong."""
        start = time.perf_counter()
        try:
            result: SearchResult | Exception = await self._engine.answer(job.query, job.topk)
        except Exception as error:  # whatever an engine raises concerns this query, not the service
            logger.error("%s: a search failed", self._engine.info.name, exc_info=error)
            result = error
        self._metrics.engine_seconds.observe(time.perf_counter() - start)
        self._metrics.searched.inc()
        return _rendered(result)


def _size_class(topk: int) -> int:
    """Jobs of one class share an engine call: a call with one large `topk` should not fetch as much for all others."""
    return max(_SMALL_TOPK, 1 << (topk - 1).bit_length())


def _rendered(result: SearchResult | Exception) -> Rendered | Exception:
    if isinstance(result, Exception):
        return result
    try:
        return render(result)
    except RetrieverError as error:
        return error


def _head(result: Rendered | Exception, topk: int) -> Rendered | Exception:
    return result.head(topk) if isinstance(result, Rendered) else result
