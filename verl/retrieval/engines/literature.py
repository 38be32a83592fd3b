"""Literature search as the agent's `search`: PubMed or ClinicalTrials.gov, cached, limited to a question's date.

What becomes of a query:

| query | outcome |
|---|---|
| any text, whatever its characters | one search; control characters are spaces, half characters are replaced |
| nothing but white space and control characters | no document; nobody is asked |
| one that the service cannot parse | no document; the reason is logged |
| one that finds nothing | no document |
| too long for the service | RetrieverError |
| service away, at its limit, or answering something else, for all attempts | RetrieverError |

Documents have the score `1 / rank`, because the services give none. Their ids are PMIDs or NCT ids; title and text are
empty unless `titles` asks for them, because recall needs the ids alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.engines import ctgov, pubmed
from verl.retrieval.engines.found import Found, Source
from verl.retrieval.engines.service import Service, ServiceConfig
from verl.retrieval.replay import ReplayCache, ReplayMode, ReplayRequest
from verl.retrieval.web_http import Secrets, check_base_url
from verl.types import Document, Question, SearchResult

logger = logging.getLogger(__name__)

PUB_DATE = "pub_date"
"""Key of a question's publication date in `Question.extra`."""

_DATE = re.compile(r"\d{4}(/(0[1-9]|1[0-2])(/(0[1-9]|[12]\d|3[01]))?)?")


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What a service admits; `dated` says whether a question's date limits what is searched."""

    max_topk: int
    page_size: int
    max_page_size: int
    dated: bool


_BOUNDS = {
    "pubmed": _Bounds(pubmed.MAX_TOPK, page_size=5_000, max_page_size=10_000, dated=True),
    "ctgov": _Bounds(ctgov.MAX_TOPK, page_size=1_000, max_page_size=1_000, dated=False),
}


@dataclass(frozen=True, slots=True)
class LiteratureConfig:
    """What is searched, and how.

    Attributes:
        base_url: another host that speaks the service's format; the service's own when None. It is not part of the
            cache's key.
        page_size: records per request; 5,000 for PubMed and 1,000 for ClinicalTrials.gov when None.
        titles: fill in titles (and, for trials, summaries); a further request per 200 records at PubMed.
        retmode: format in which PubMed's esearch answers.
        tool: name of this program, which NCBI asks for.
        email: address at which NCBI reaches you before it blocks you; not sent when empty.
        cache: file of kept answers, needed by every cache mode but `off`.
        cache_mode: see `verl.retrieval.replay.ReplayMode`; `replay` asks nobody and needs no key.
    """

    engine: Literal["pubmed", "ctgov"] = "pubmed"
    base_url: str | None = None
    page_size: int | None = None
    titles: bool = False
    retmode: pubmed.RetMode = "json"
    tool: str = "search-agents"
    email: str = ""
    cache: Path | None = None
    cache_mode: ReplayMode = "off"
    http: ServiceConfig = field(default_factory=ServiceConfig)

    def __post_init__(self) -> None:
        if self.engine not in _BOUNDS:
            raise ConfigError(f"literature engine={self.engine!r} is unknown; expected one of {', '.join(_BOUNDS)}")
        most = _BOUNDS[self.engine].max_page_size
        if self.page_size is not None and not 1 <= self.page_size <= most:
            raise ConfigError(f"literature page_size={self.page_size}; expected 1 to {most}")
        if self.base_url is not None:
            check_base_url(self.base_url)

    @property
    def max_topk(self) -> int:
        """Most documents of a query."""
        return _BOUNDS[self.engine].max_topk

    @property
    def dated(self) -> bool:
        """Whether a question's `extra["pub_date"]` limits what is searched."""
        return _BOUNDS[self.engine].dated


class LiteratureSearch:
    """Satisfies `verl.agent.protocols.Search` and `PerQuestion`; calls may be concurrent.

    All searches of a process that share a key should share one of these: the rate is kept by each. It belongs to one
    event loop.

    Attributes:
        refused: queries that the service took for none so far.
    """

    def __init__(self, source: Source | None, config: LiteratureConfig, cache: ReplayCache) -> None:
        """Use `open_literature`.

        Args:
            source: None when only the cache is asked.
        """
        self.refused = 0
        self._source = source
        self._name = config.engine
        self._bounds = _BOUNDS[config.engine]
        self._titles = config.titles
        self._cache = cache

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Search without a date limit.

        Raises:
            RetrieverError: `topk` is out of bounds, or a query got no whole answer within the attempts.
        """
        return await self._search(queries, topk, "")

    def bound(self, question: Question) -> DatedSearch:
        """Return the search for one question: at PubMed, of what was published up to its `extra["pub_date"]`."""
        return DatedSearch(self, question.extra.get(PUB_DATE, "") if self._bounds.dated else "")

    async def aclose(self) -> None:
        """Close connections and cache."""
        if self._source is not None:
            await self._source.aclose()
        self._cache.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _search(self, queries: Sequence[str], topk: int, until: str) -> list[SearchResult]:
        if isinstance(queries, str) or not queries:
            raise RetrieverError(f"{self._name}: queries={queries[:40]!r}; expected a list of at least one query")
        if not 1 <= topk <= self._bounds.max_topk:
            raise RetrieverError(f"{self._name}: topk={topk}; expected 1 to {self._bounds.max_topk}")
        if until and not _DATE.fullmatch(until):
            raise RetrieverError(f"{self._name}: {PUB_DATE}={until[:40]!a}; expected YYYY/MM/DD, YYYY/MM or YYYY")
        terms = [searched(query) for query in queries]
        distinct = list(dict.fromkeys(terms))
        answers = await asyncio.gather(*(self._found(term, topk, until) for term in distinct), return_exceptions=True)
        found: dict[str, Found] = {}
        for term, answer in zip(distinct, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            found[term] = answer
        return [_result(query, found[term]) for query, term in zip(queries, terms, strict=True)]

    async def _found(self, term: str, topk: int, until: str) -> Found:
        """Return what the cache or the service has; only a whole answer is kept."""
        if not term:
            return Found()
        parameters = {"until": until, "titles": int(self._titles)}
        request = ReplayRequest(self._name, term, topk, parameters)
        # Another process may hold the file for a while; the loop has other work to do.
        body = await asyncio.to_thread(self._cache.find, request)
        if body is None:
            found = await self._asked(term, topk, until)
            body = await asyncio.to_thread(self._cache.store, request, _packed(found))
        found = _unpacked(body)
        if found.refused:
            self.refused += 1
            logger.info("%s cannot parse a query, which finds nothing: %s", self._name, found.refused)
        return found

    async def _asked(self, term: str, topk: int, until: str) -> Found:
        if self._source is None:
            raise RetrieverError(f"{self._name}: the cache has no answer, and nobody else is asked")
        try:
            return await self._source.find(term, topk, until)
        except RetrieverError as error:
            raise RetrieverError(f"{self._name}: {error}") from None


@dataclass(frozen=True, slots=True)
class DatedSearch:
    """A search of what was published up to a date."""

    search: LiteratureSearch
    until: str

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Search; raises what `LiteratureSearch` raises, also for a date that is none."""
        return await self.search._search(queries, topk, self.until)


def open_literature(
    config: LiteratureConfig,
    environ: Mapping[str, str] = os.environ,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> LiteratureSearch:
    """Open a literature search; nothing is connected yet.

    Args:
        environ: where the optional key is.
        clock: seconds since some moment, never going back.
        sleep: waits for about as many seconds of `clock`.

    Raises:
        ConfigError: the key is none that could be sent.
        DataError: the cache file cannot be used.
    """
    source: Source | None = None
    if config.cache_mode != "replay":
        trials = config.engine == "ctgov"
        source = _open_trials(config, clock, sleep) if trials else open_pubmed(config, environ, clock, sleep)
    return LiteratureSearch(source, config, ReplayCache(config.cache, config.cache_mode))


def open_pubmed(
    config: LiteratureConfig,
    environ: Mapping[str, str] = os.environ,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> pubmed.PubMed:
    """Open PubMed itself, without a cache, for its summaries; arguments and errors as above."""
    keyed = bool(environ.get(pubmed.KEY.variable, "").strip())
    rate = pubmed.RATE_WITH_KEY if keyed else pubmed.RATE
    secrets = Secrets((pubmed.KEY,) if keyed else (), environ)
    service = Service(config.base_url or pubmed.BASE_URL, rate, secrets, config.http, clock, sleep)
    extra = {name: value for name, value in (("tool", config.tool), ("email", config.email)) if value}
    page_size = config.page_size or _BOUNDS["pubmed"].page_size
    return pubmed.PubMed(service, page_size, config.retmode, config.titles, extra)


def _open_trials(
    config: LiteratureConfig, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]
) -> ctgov.ClinicalTrials:
    service = Service(config.base_url or ctgov.BASE_URL, ctgov.RATE, Secrets((), {}), config.http, clock, sleep)
    return ctgov.ClinicalTrials(service, config.page_size or _BOUNDS["ctgov"].page_size, config.titles)


def searched(query: str) -> str:
    """Return the query as it is sent: control characters are spaces, half characters (lone surrogates) are replaced."""
    text = query.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(" " if unicodedata.category(character) == "Cc" else character for character in text).strip()


def _result(query: str, found: Found) -> SearchResult:
    return SearchResult(query, found.documents, tuple(1 / rank for rank in range(1, len(found.documents) + 1)))


def _packed(found: Found) -> bytes:
    documents = [[document.id, document.title, document.text] for document in found.documents]
    rows = documents if any(title or text for _, title, text in documents) else [id for id, _, _ in documents]
    return json.dumps({"documents": rows, "refused": found.refused}).encode()


def _unpacked(body: bytes) -> Found:
    try:
        kept = json.loads(body)
        rows = ([row, "", ""] if isinstance(row, str) else row for row in kept["documents"])
        return Found(tuple(Document(*row) for row in rows), kept["refused"])
    except (ValueError, KeyError, TypeError) as error:
        raise RetrieverError(f"the cache holds an answer that is none of a literature search ({error!r})") from None
