"""What a client did so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class GeneratorStats:
    """Counts of one client; tokens are those of requests that were sent, as the endpoint counted them.

    Attributes:
        requests: sent, repeated ones included.
        cached: replies from the cache.
        shared: replies that an equal request under way brought along.
        cache_failures: replies that could not be kept.
        spend: cost of the tokens at the configured prices; of a reply without counts, the most it can have cost.
    """

    requests: int = 0
    cached: int = 0
    shared: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    documents_dropped: int = 0
    truncated: int = 0
    cache_failures: int = 0
    spend: float = 0.0
