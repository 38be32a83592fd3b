"""How a client reaches the retriever; plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from verl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RetrieverClientConfig:
    """How the client reaches the retriever.

    Attributes:
        url: the endpoint, `/retrieve` included.
        urls: several endpoints that serve the same index, in place of `url`; requests go to the one that is well and
            has the fewest on their way.
        timeout_s: for one attempt.
        retry_window_s: a call that meets dead, slow or overloaded services (no connection, no answer, status 503) is
            tried again until this long after its first attempt; 0 tries once. Nothing else is tried again.
        deadline_s: for a call as a whole, its time in the queue and all attempts included; None for no other bound
            than those.
        backoff_s: mean wait until an endpoint that failed is tried again; it doubles with every further failure.
        max_backoff_s: most of that wait; a service that asks for more (Retry-After) gets it.
        batch_queries: most queries in one request.
        batch_window_ms: how long a request waits for the queries of other callers.
        max_requests: requests on their way at the same time, to all endpoints together.
        max_query_chars: longer queries are cut at a word boundary, counted and logged; what the service accepts.
        ids_only: ask for the documents' ids alone, which is all that rewards by ids read and makes thousands of
            documents cheap; titles and texts are then empty.
        token_env: environment variable with the bearer token of the service; empty for none.
    """

    url: str = "http://127.0.0.1:3000/retrieve"
    urls: tuple[str, ...] = ()
    timeout_s: float = 30.0
    retry_window_s: float = 60.0
    deadline_s: float | None = None
    backoff_s: float = 0.2
    max_backoff_s: float = 5.0
    batch_queries: int = 64
    batch_window_ms: float = 2.0
    max_requests: int = 8
    max_query_chars: int = 4096
    ids_only: bool = False
    token_env: str = ""

    def __post_init__(self) -> None:
        for url in self.endpoints:
            _check_url(url)
        if len(set(self.endpoints)) < len(self.endpoints):
            raise ConfigError(f"retriever urls={self.urls}; expected each endpoint once")
        for name in ("timeout_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"retriever {name}={value}; expected a positive number of seconds")
        for name in ("retry_window_s", "backoff_s", "max_backoff_s", "batch_window_ms"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"retriever {name}={getattr(self, name)}; expected 0 or more")
        for name in ("batch_queries", "max_requests", "max_query_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"retriever {name}={getattr(self, name)}; expected at least 1")

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The addresses that are used."""
        return self.urls or (self.url,)


def _check_url(url: str) -> None:
    expected = "expected http://HOST:PORT/retrieve"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"retriever url={url!r}; {expected}")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"retriever url={url!r}: {error}; {expected}") from error
    if not parts.hostname or not parts.path.strip("/"):
        raise ConfigError(f"retriever url={url!r} has no {'path' if parts.hostname else 'host'}; {expected}")
