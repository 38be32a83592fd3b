"""Servers of ColBERT's published shape (`verl.retrieval.colbert_api`) behind the retriever's contract.

The address is `base_url`, or the environment's `API_SEARCH` (which the published client promises to read). Queries are
URL-encoded; timeouts, bounded retries and the file of kept answers are those of the web engines. No key is sent.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.colbert_api import MOST_K
from verl.retrieval.engine import EngineInfo, digest
from verl.retrieval.remote import RemoteEngine
from verl.retrieval.replay import ReplayCache, ReplayMode, ReplayRequest
from verl.retrieval.web_formats import Call, shortened
from verl.retrieval.web_http import FetchConfig, Fetcher, Secrets, check_base_url
from verl.types import Document, SearchResult

VARIABLE = "API_SEARCH"
NAME = "colbert_api"


@dataclass(frozen=True, slots=True)
class ColbertApiConfig:
    """Which server is asked, and how.

    Attributes:
        base_url: the address of its search, for example `http://HOST:8893/api/search`; `API_SEARCH` when None.
        cache: file of kept answers, needed by every cache mode but `off`.
        cache_mode: see `verl.retrieval.replay.ReplayMode`.
        http: timeouts and retries. The published server answers one request after the other, so few are on their way.
    """

    base_url: str | None = None
    cache: Path | None = None
    cache_mode: ReplayMode = "off"
    http: FetchConfig = field(default_factory=lambda: FetchConfig(rate=1000.0, concurrency=16))

    def __post_init__(self) -> None:
        if self.base_url is not None:
            check_base_url(self.base_url, keyless=True)


class ColbertApiEngine(RemoteEngine):
    """An `Engine` that asks such a server.

    Scores are the server's. What a passage is called is its title: what stands before the first `|` of its text. The
    server's corpus may change behind its address, so a fingerprint promises equal answers in mode `replay` only.
    """

    def __init__(self, url: str, config: ColbertApiConfig, cache: ReplayCache) -> None:
        """Use `open_engine`."""
        fetcher = Fetcher(url, Secrets([], {}), config.http) if config.cache_mode != "replay" else None
        details = {"base_url": url, "cache_mode": config.cache_mode}
        super().__init__(EngineInfo(NAME, None, MOST_K, "", digest(NAME, details), details), fetcher, cache)

    async def _find(self, query: str, topk: int) -> SearchResult:
        return read_answer(await self._answer(query, topk), query, topk)

    async def _answer(self, query: str, topk: int) -> str:
        """Return an answer's text, from the cache or the server; only one that can be read is kept."""
        request = ReplayRequest(NAME, query, topk)
        body = self._cache.find(request)
        if body is not None:
            return body.decode()
        if self._fetcher is None:
            raise RetrieverError("the file of kept answers lacks this query, and mode replay asks no server")
        text = await self._fetcher.fetch(Call("", {"query": query, "k": topk}))
        read_answer(text, query, topk)
        return self._cache.store(request, text.encode()).decode()


def open_engine(config: ColbertApiConfig, environ: Mapping[str, str] = os.environ) -> ColbertApiEngine:
    """Open the engine; nothing is asked yet.

    Args:
        environ: where `API_SEARCH` is looked up.

    Raises:
        ConfigError: no address.
        DataError: the cache file cannot be used.
    """
    url = config.base_url or environ.get(VARIABLE, "").strip()
    if not url:
        raise ConfigError(
            f"retriever_name={NAME} needs the address of the search, for example http://HOST:8893/api/search; pass "
            f"--web_base_url, or set {VARIABLE}"
        )
    check_base_url(url, keyless=True)
    return ColbertApiEngine(url, config, ReplayCache(config.cache, config.cache_mode))


def read_answer(text: str, query: str, topk: int) -> SearchResult:
    """Read what a server answered; a longer list than `topk` is cut.

    Raises:
        RetrieverError: it is not of the published shape, or its scores are no numbers or not in order.
    """
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        start = shortened(text[:60]) or "nothing"
        raise RetrieverError(f"the answer is not JSON ({type(error).__name__}); it starts with: {start}") from None
    entries = answer.get("topk") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise RetrieverError(f"the answer is {_shown(answer)}; expected an object with a list topk")
    read = [_entry(entry) for entry in entries[:topk]]
    scores = tuple(score for _, score in read)
    if any(later > earlier for earlier, later in pairwise(scores)):
        raise RetrieverError(f"the scores of the answer do not fall: {_shown(scores)}")
    documents = tuple(document for document, _ in read)
    if len({document.id for document in documents}) < len(documents):
        raise RetrieverError("the answer holds a pid twice")
    return SearchResult(query, documents, scores)


def _entry(entry: Any) -> tuple[Document, float]:
    found = entry if isinstance(entry, dict) else {}
    text, pid, score = found.get("text"), found.get("pid"), found.get("score")
    numeric = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    if not isinstance(text, str) or not isinstance(pid, int | str) or isinstance(pid, bool) or not numeric:
        raise RetrieverError(f"an entry of topk is {_shown(entry)}; expected text, pid and a finite score")
    title, barred, rest = text.partition("|")
    title, rest = (title, rest) if barred else ("", text)
    return Document(str(pid), _unquoted(title), _unquoted(rest)), float(score)


def _unquoted(text: str) -> str:
    """Trim, and take off the quotation marks around what the published corpus quotes as a whole."""
    text = text.strip()
    return text[1:-1].replace('""', '"').strip() if len(text) >= 2 and text[0] == text[-1] == '"' else text


def _shown(value: object) -> str:
    return shortened(repr(value)[:120])
