"""A server process over an engine that does as it is told: `python -m tests.retrieval.toy_server PORT BEHAVIOUR`.

A behaviour is JSON: `load_s` and `search_s` say how long loading and a search take, `fail` makes loading fail, and
`config` holds fields of the server's configuration.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from verl.errors import DataError, SearchAgentError
from verl.retrieval.engine import EngineInfo
from verl.retrieval.opening import Opened
from verl.retrieval.server import bind, serve
from verl.retrieval.server_config import ServerConfig
from verl.types import Document, SearchResult


class ToyEngine:
    """Finds one document for every query, in its time."""

    info = EngineInfo("toy", 10, 10, "corpus", "fingerprint")

    def __init__(self, search_s: float) -> None:
        self._search_s = search_s

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        time.sleep(self._search_s)
        return [SearchResult(query, (Document(query, "T", "x"),), (1.0,)) for query in queries]

    def close(self) -> None:
        logging.getLogger("toy").info("engine closed")


def main(port: str, behaviour: str) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO)
    told: dict[str, Any] = json.loads(behaviour)

    def open_() -> Opened:
        time.sleep(told.get("load_s", 0.0))
        if told.get("fail"):
            raise DataError(told["fail"])
        return Opened(ToyEngine(told.get("search_s", 0.0)))

    config = ServerConfig(**told.get("config", {}))
    try:
        serve(open_, config, bind("127.0.0.1", int(port)))
    except SearchAgentError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
