"""Which search questions are played against: our retriever service, or a literature service of others.

Both are opened inside the process that uses them, where the event loop runs. `literature: {engine: pubmed}` in a
configuration chooses the second; without it the first is asked.
"""

from __future__ import annotations

from dataclasses import replace

from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.retrieval.engines.literature import LiteratureConfig, LiteratureSearch, open_literature


def open_search(
    retriever: RetrieverClientConfig, literature: LiteratureConfig | None, processes: int = 1
) -> RetrieverClient | LiteratureSearch:
    """Open the search; nothing is connected yet.

    Args:
        literature: asked in place of the retriever unless None.
        processes: so many processes do the same with the same key, and have to keep one rate together.

    Raises:
        ConfigError: a key is none that could be sent, or a named variable is not set.
        DataError: the cache file of the literature cannot be used.
    """
    if literature is None:
        return RetrieverClient(retriever)
    return open_literature(shared(literature, processes))


def shared(literature: LiteratureConfig, processes: int) -> LiteratureConfig:
    """Return the configuration of one of so many processes, each of which keeps its part of the rate."""
    http = replace(literature.http, sharers=literature.http.sharers * processes)
    return replace(literature, http=http)
