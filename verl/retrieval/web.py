"""Web search behind the retriever's contract: SerpAPI-, Serper- and Google-Custom-Search-shaped services.

Keys come from the environment (`SERPAPI_API_KEY`; `SERPER_API_KEY`; `GOOGLE_API_KEY` and `GOOGLE_CSE_ID`) and show in
no log, message or file. Every answer can be kept in a file and replayed (see `verl.retrieval.replay`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.engine import EngineInfo, digest
from verl.retrieval.remote import RemoteEngine
from verl.retrieval.replay import ReplayCache, ReplayMode, ReplayRequest
from verl.retrieval.web_formats import APIS, PAGE_RESULTS, Api, Page, shortened
from verl.retrieval.web_http import FetchConfig, Fetcher, Secrets, check_base_url
from verl.types import Document, SearchResult

_CODE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z]{2,4})?")


@dataclass(frozen=True, slots=True)
class WebConfig:
    """Which service is searched, and how.

    Attributes:
        provider: `serpapi`, `serper` or `google_cse`.
        base_url: another host that speaks the provider's format; the provider's own when None. It is not part of the
            cache's key.
        pages: most pages of ten organic results that one query asks for; `10 * pages` is the largest `topk`. Further
            pages are only fetched, and paid for, where the first ones hold fewer than `topk` documents.
        language: code of the language of the results (`hl`), the service's default when empty.
        country: code of the country that is searched from (`gl`), the service's default when empty.
        cache: file of kept answers, needed by every cache mode but `off`.
        cache_mode: see `verl.retrieval.replay.ReplayMode`; `replay` needs no key.
        http: rate, timeouts and retries.
    """

    provider: str = "serper"
    base_url: str | None = None
    pages: int = 1
    language: str = ""
    country: str = ""
    cache: Path | None = None
    cache_mode: ReplayMode = "off"
    http: FetchConfig = field(default_factory=FetchConfig)

    def __post_init__(self) -> None:
        if self.provider not in APIS:
            raise ConfigError(f"web provider={self.provider!r} is unknown; expected one of {', '.join(APIS)}")
        most = APIS[self.provider].max_pages
        if not 1 <= self.pages <= most:
            raise ConfigError(f"web pages={self.pages}; expected 1 to {most}")
        for name in ("language", "country"):
            code = getattr(self, name)
            if code and not _CODE.fullmatch(code):
                raise ConfigError(f"web {name}={code!r}; expected a code such as 'en', or nothing")
        if self.base_url is not None:
            check_base_url(self.base_url)


class WebEngine(RemoteEngine):
    """An `Engine` that asks the web.

    Documents come in the service's order (see `verl.retrieval.web_formats`), each with the score `1 / rank`, because
    the services give none. An organic result's id is its link; the other documents have ids with a hash of their text.
    Unlike the published server, which adds answer box and questions to `topk` organic results, `topk` counts them all.
    """

    def __init__(self, config: WebConfig, fetcher: Fetcher | None, deciding: Secrets, cache: ReplayCache) -> None:
        """Use `open_engine`.

        Args:
            fetcher: None when only the cache is asked.
            deciding: the credentials on which answers depend.
        """
        self._config = config
        self._api: Api = APIS[config.provider]
        self._parameters = {name: code for name, code in (("hl", config.language), ("gl", config.country)) if code}
        self._identity = {name: digest(value)[:16] for name, value in deciding.placed("query").items()}
        super().__init__(self._describe(), fetcher, cache)

    async def _find(self, query: str, topk: int) -> SearchResult:
        documents = (await self._documents(query, topk))[:topk]
        return SearchResult(query, documents, tuple(1 / rank for rank in range(1, len(documents) + 1)))

    async def _documents(self, query: str, topk: int) -> tuple[Document, ...]:
        """Return the documents of as many pages as `topk` needs, each id once, at its first place."""
        documents: dict[str, Document] = {}
        for number in range(self._config.pages):
            page = await self._page(query, number)
            for document in page.documents:
                documents.setdefault(document.id, document)
            if len(documents) >= topk or not page.more:
                break
        return tuple(documents.values())

    async def _page(self, query: str, number: int) -> Page:
        """Return a page, from the cache or the service; only a page that could be read is kept."""
        request = ReplayRequest(
            self._config.provider, query, PAGE_RESULTS, {**self._parameters, **self._identity, "page": number}
        )
        body = self._cache.find(request)
        if body is not None:
            return self._read(body.decode())
        if self._fetcher is None:
            raise RetrieverError("there is no key to ask the service with")
        text = await self._fetcher.fetch(self._api.call(query, number, self._parameters))
        page = self._read(text)
        kept = self._cache.store(request, text.encode()).decode()
        return page if kept == text else self._read(kept)

    def _read(self, text: str) -> Page:
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            start = shortened(text[:60]) or "nothing"
            raise RetrieverError(f"the answer is not JSON ({type(error).__name__}); it starts with: {start}") from None
        if not isinstance(answer, dict):
            raise RetrieverError(f"the answer is a JSON {type(answer).__name__}; expected an object")
        return self._api.parse(answer)

    def _describe(self) -> EngineInfo:
        config = self._config
        details = {
            "base_url": config.base_url or self._api.base_url,
            "pages": config.pages,
            **self._parameters,
            "cache_mode": config.cache_mode,
        }
        identity = digest("web", config.provider, details, self._identity)
        return EngineInfo(config.provider, None, PAGE_RESULTS * config.pages, "", identity, details)


def open_engine(config: WebConfig, environ: Mapping[str, str] = os.environ) -> WebEngine:
    """Open a web search engine.

    Args:
        environ: where the keys are.

    Raises:
        ConfigError: a key is not set. Mode `replay` needs none but `GOOGLE_CSE_ID`, which says what is searched.
        DataError: the cache file cannot be used.
    """
    api = APIS[config.provider]
    deciding = Secrets([item for item in api.credentials if item.decides], environ)
    fetcher = None
    if config.cache_mode != "replay":
        fetcher = Fetcher(config.base_url or api.base_url, Secrets(api.credentials, environ), config.http)
    return WebEngine(config, fetcher, deciding, ReplayCache(config.cache, config.cache_mode))
