"""Reciprocal-rank fusion: several engines answer one query, and their rankings become one.

A document's score is the sum of `weight / (k + rank)` over the engines that found it, with ranks from 1 (Cormack,
Clarke and Büttcher 2009, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods").
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from typing import Self

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.batching import MicroBatcher
from verl.retrieval.engine import Engine, EngineInfo, as_live, check_topk, digest
from verl.types import Document, SearchResult

logger = logging.getLogger(__name__)

RRF_K = 60
FUSION_DEPTH = 100
_BATCH_QUERIES = 64

Answer = SearchResult | RetrieverError


class HybridEngine:
    """Searches several engines at the same time and fuses their rankings; an `Engine` itself.

    Every engine is always asked for the same number of documents, `depth` or its own largest `topk`, so the result for
    a smaller `topk` is the head of the result for a larger one.

    Two documents are one if their ids are equal, where all engines search one corpus (by its fingerprint). Otherwise
    ids of different corpora may coincide, and id, title and text must all be equal: documents that share nothing but
    their id stay apart, and a result can then hold an id twice.

    Equal scores come in the order of id, then title and text. It is live where one of its engines is.

    Attributes:
        partial: results that lack an engine's ranking so far; always 0 with `require_all`.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        weights: Sequence[float] | None = None,
        k: int = RRF_K,
        depth: int = FUSION_DEPTH,
        require_all: bool = True,
        *,
        threads: Sequence[ThreadPoolExecutor] | None = None,
    ) -> None:
        """Fuse engines, which then belong to this one: `close` closes them.

        Args:
            engines: at least two.
            weights: one for each engine, above 0; all 1 when None.
            k: the larger, the less the first ranks stand out.
            depth: documents asked of each engine, and the largest `topk`.
            require_all: a query for which one engine fails gets that engine's error. When false it gets the fusion of
                the others, which is counted and logged, and an error only if all engines fail; results then depend
                on which engine was well, so do not cache them.
            threads: one of a single thread for each engine, in which it was opened; new ones when None. See `open`.

        Raises:
            ConfigError: one of the arguments is not as said above.
        """
        weights = tuple(map(float, weights)) if weights is not None else (1.0,) * len(engines)
        _check(engines, weights, k, depth)
        self._engines = tuple(engines)
        self._weights = weights
        self._k = k
        self._require_all = require_all
        self._info = _describe(self._engines, weights, k, depth, require_all)
        self._one_corpus = _one_corpus(self._engines)
        self._depths = [min(depth, engine.info.max_topk) for engine in engines]
        self._threads = tuple(threads) if threads is not None else _threads(len(engines))
        self._batchers: list[MicroBatcher[str, SearchResult]] = [
            MicroBatcher(partial(self._search_batch, number), max_items=_BATCH_QUERIES, window_s=0.0)
            for number in range(len(engines))
        ]
        self.partial = 0
        if not self._one_corpus:
            logger.info("hybrid: the engines search different corpora; documents are one where id, title and text are")

    @classmethod
    def open(
        cls,
        openers: Sequence[Callable[[], Engine]],
        weights: Sequence[float] | None = None,
        k: int = RRF_K,
        depth: int = FUSION_DEPTH,
        require_all: bool = True,
    ) -> Self:
        """Open the engines at the same time and fuse them.

        Each is opened, searched and closed in one thread of its own, because OpenMP's number of threads, which an
        engine sets when it is opened, belongs to the thread that set it.

        Raises:
            What an opener raises, or `ConfigError` for the arguments of the fusion; the other engines are closed then.
        """
        threads = _threads(len(openers))
        calls = [thread.submit(opener) for thread, opener in zip(threads, openers, strict=True)]
        wait(calls)
        with ExitStack() as stack:
            for call, thread in zip(calls, threads, strict=True):
                stack.callback(thread.shutdown)
                if call.exception() is None:
                    stack.callback(_close, thread, call.result())
            hybrid = cls([call.result() for call in calls], weights, k, depth, require_all, threads=threads)
            stack.pop_all()
        return hybrid

    @property
    def info(self) -> EngineInfo:
        """What this is; its fingerprint covers every engine's."""
        return self._info

    def search(self, queries: Sequence[str], topk: int) -> list[Answer]:
        """Return one result per query, in order; see `Engine.search`."""
        check_topk(topk, self._info)
        answers = self._ask_all(queries)
        return [self._fused(query, [answer[row] for answer in answers], topk) for row, query in enumerate(queries)]

    @property
    def live(self) -> bool:
        """Whether one of the engines is; see `verl.retrieval.engine.LiveEngine`."""
        return any(as_live(engine) for engine in self._engines)

    async def answer(self, query: str, topk: int) -> Answer:
        """Return the result of one query. Live engines are asked for it at once, an index in batches of its own."""
        check_topk(topk, self._info)
        answers = await asyncio.gather(*(self._ask(number, query) for number in range(len(self._engines))))
        return self._fused(query, answers, topk)

    def close(self) -> None:
        """Close every engine, also when one of them cannot be closed."""
        with ExitStack() as stack:
            for engine, thread in zip(self._engines, self._threads, strict=True):
                stack.callback(thread.shutdown)
                stack.callback(_close, thread, engine)

    async def _ask(self, number: int, query: str) -> Answer:
        """Return one engine's answer to one query."""
        live = as_live(self._engines[number])
        try:
            if live is not None:
                return await live.answer(query, self._depths[number])
            (result,) = await self._batchers[number].submit([query])
        except RetrieverError as error:
            return error
        return result

    async def _search_batch(self, number: int, queries: list[str]) -> Sequence[Answer]:
        """Search one engine in its thread."""
        search, loop = self._engines[number].search, asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads[number], search, queries, self._depths[number])

    def _ask_all(self, queries: Sequence[str]) -> list[Sequence[Answer]]:
        """Return each engine's answers; an error that concerned its whole call stands for every query."""
        calls = [
            thread.submit(engine.search, queries, depth)
            for engine, thread, depth in zip(self._engines, self._threads, self._depths, strict=True)
        ]
        wait(calls)
        answers: list[Sequence[Answer]] = []
        for engine, call in zip(self._engines, calls, strict=True):
            error = call.exception()
            if error is None and len(call.result()) != len(queries):
                raise RetrieverError(f"{engine.info.name} gave {len(call.result())} results for {len(queries)} queries")
            answers.append([error] * len(queries) if isinstance(error, RetrieverError) else call.result())
        return answers

    def _fused(self, query: str, answers: Sequence[Answer], topk: int) -> Answer:
        failed = [
            f"{engine.info.name}: {answer}"
            for engine, answer in zip(self._engines, answers, strict=True)
            if isinstance(answer, RetrieverError)
        ]
        if failed and (self._require_all or len(failed) == len(answers)):
            return RetrieverError(f"hybrid: {'; '.join(failed)}")
        if failed:
            self.partial += 1
            logger.warning("hybrid: fused without %s", "; ".join(failed))
        found: dict[Hashable, tuple[Document, list[float]]] = {}
        for weight, answer in zip(self._weights, answers, strict=True):
            if not isinstance(answer, RetrieverError):
                self._add(found, weight, answer.documents)
        # An exact sum does not depend on the order of the engines, so mirrored ranks are a tie and not a rounding.
        scored = ((math.fsum(terms), document) for document, terms in found.values())
        best = heapq.nsmallest(topk, scored, key=lambda hit: (-hit[0], hit[1].id, hit[1].title, hit[1].text))
        return SearchResult(query, tuple(document for _, document in best), tuple(score for score, _ in best))

    def _add(
        self, found: dict[Hashable, tuple[Document, list[float]]], weight: float, documents: Sequence[Document]
    ) -> None:
        """Enter one engine's ranking; a document that it names twice counts at its better rank."""
        seen: set[Hashable] = set()
        for rank, document in enumerate(documents, start=1):
            key = document.id if self._one_corpus else document
            if key not in seen:
                seen.add(key)
                found.setdefault(key, (document, []))[1].append(weight / (self._k + rank))


def _threads(count: int) -> tuple[ThreadPoolExecutor, ...]:
    return tuple(ThreadPoolExecutor(1, f"hybrid-{number}") for number in range(count))


def _close(thread: ThreadPoolExecutor, engine: Engine) -> None:
    thread.submit(engine.close).result()


def _check(engines: Sequence[Engine], weights: Sequence[float], k: int, depth: int) -> None:
    if len(engines) < 2:
        raise ConfigError(
            f"hybrid: {len(engines)} engines came; expected at least two, so pass several --index_path or --fuse_with"
        )
    if len(weights) != len(engines):
        raise ConfigError(f"hybrid: {len(weights)} weights for {len(engines)} engines; expected one for each")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"hybrid: weights={tuple(weights)}; expected numbers above 0 (leave an engine out instead)")
    if k < 0:
        raise ConfigError(f"hybrid: k={k}; expected at least 0")
    if depth < 1:
        raise ConfigError(f"hybrid: depth={depth}; expected at least 1")


def _one_corpus(engines: Sequence[Engine]) -> bool:
    corpora = {engine.info.corpus for engine in engines}
    return len(corpora) == 1 and "" not in corpora


def _describe(engines: Sequence[Engine], weights: Sequence[float], k: int, depth: int, require_all: bool) -> EngineInfo:
    infos = [engine.info for engine in engines]
    corpora = [info.corpus for info in infos]
    one_corpus = _one_corpus(engines)
    fingerprint = digest("hybrid", [info.fingerprint for info in infos], weights, k, depth, require_all)
    return EngineInfo(
        name="hybrid",
        # How many documents two corpora share is not known.
        documents=infos[0].documents if one_corpus else None,
        max_topk=min(depth, max(info.max_topk for info in infos)),
        corpus=infos[0].corpus if one_corpus or not any(corpora) else digest(corpora),
        fingerprint=fingerprint,
        details={
            "engines": " + ".join(info.name for info in infos),
            "weights": " ".join(f"{weight:g}" for weight in weights),
            "rrf_k": k,
            "fusion_depth": depth,
            "require_all": require_all,
        },
    )
