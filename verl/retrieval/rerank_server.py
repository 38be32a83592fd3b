"""`POST /rerank`, beside `/retrieve` or alone: `python -m verl.retrieval.rerank_server --rerank_model M --port 6980`.

The published contract: `{"queries": [str], "documents": [[document]], "rerank_topk"?: int, "return_scores"?: bool}`
with one list of documents for each query, which is answered like `/retrieve`: `{"result": [[{"document": {...},
"score": float}]]}`, or bare documents when `return_scores` is false. A document is what `/retrieve` answers with, bare
or as `{"document": {...}, "score": ...}`; the score that it brings is not read.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.types import Receive

from verl.errors import RetrieverError, SearchAgentError
from verl.retrieval import wire
from verl.retrieval.batching import MicroBatcher
from verl.retrieval.engine import EngineInfo
from verl.retrieval.engine_thread import EngineThread
from verl.retrieval.openapi import ERROR, NOT_BLANK
from verl.retrieval.rerank import DEFAULT_MODEL, CrossEncoderReranker, Pair, Reranker, ordered
from verl.retrieval.server_config import ServerConfig
from verl.retrieval.watching import while_connected
from verl.retrieval.wire import RefusedRequest, Rendered, RequestLimits, render, response_body
from verl.types import Document

logger = logging.getLogger(__name__)

PORT = 6980

_BATCH_PAIRS = 256
_MOST_RETRY_S = 30
_CLOSE_TIMEOUT_S = 10.0
_DOCUMENT_SCHEMA = {
    "type": "object",
    "required": ["id", "contents"],
    "properties": {"id": {"type": "string"}, "contents": {"type": "string"}},
}


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """A valid request; `documents[i]` belongs to `queries[i]`."""

    queries: tuple[str, ...]
    documents: tuple[tuple[Document, ...], ...]
    rerank_topk: int
    return_scores: bool = False


_KEYS = tuple(item.name for item in fields(RerankRequest))


def parse_rerank_request(body: bytes, limits: RequestLimits, default_topk: int) -> RerankRequest:
    """Read the body of `POST /rerank`.

    Args:
        limits: `max_documents` bounds the documents of all queries together.
        default_topk: used when the request names none.

    Raises:
        RefusedRequest: with status 400 when the body is no JSON object, else 422.
    """
    received = wire._json_object(body)
    unknown = next((key for key in received if key not in _KEYS), None)
    if unknown is not None:
        raise _invalid("unknown_key", f"unknown key {_shown(unknown)}; expected {', '.join(_KEYS)}")
    queries = wire._queries(received.get("queries"), "queries" in received, limits)
    documents = _documents(received.get("documents"), "documents" in received, len(queries), limits)
    topk = received.get("rerank_topk")
    topk = default_topk if topk is None else topk
    if isinstance(topk, float) and topk.is_integer():  # JSON does not tell 2.0 from 2
        topk = int(topk)
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise _invalid("rerank_topk", f"rerank_topk is {_shown(topk)}; expected an integer of at least 1")
    return_scores = received.get("return_scores", False)
    if not isinstance(return_scores, bool):
        raise _invalid("return_scores", f"return_scores is {_shown(return_scores)}; expected true or false")
    return RerankRequest(queries, documents, min(topk, limits.max_documents), return_scores)


class RerankService:
    """Reranks for many requests: their pairs of query and document share batches. Belongs to one event loop."""

    def __init__(self, reranker: Reranker, config: ServerConfig) -> None:
        """Prepare a service.

        Args:
            config: its `topk`, `limits` and `batch_window_ms` count. At most as many pairs wait as one request may
                have (`limits.max_documents`); a request that would exceed that gets 503 with `Retry-After`.
        """
        self._reranker = reranker
        self._config = config
        self._thread = EngineThread("reranker")
        self._batcher: MicroBatcher[Pair, float] = MicroBatcher(
            self._score, max_items=_BATCH_PAIRS, window_s=config.batch_window_ms / 1000
        )
        self._pairs_per_s = 0.0

    async def answer(self, body: bytes, receive: Receive) -> bytes:
        """Return the body that answers a request's.

        Args:
            receive: of the request; when its client leaves, its pairs are no longer scored.

        Raises:
            RefusedRequest: the request is wrong (400, 422), the client left, there is too much to do (503), or
                the reranker gave no score for one of the queries (502).
        """
        asked = parse_rerank_request(body, self._config.limits, self._config.topk)
        return response_body(await while_connected(self._rerank(asked), receive), asked.return_scores)

    async def close(self) -> None:
        """Answer what waits, then end the thread."""
        await self._batcher.drain()
        self._thread.stop(_CLOSE_TIMEOUT_S)

    async def _rerank(self, asked: RerankRequest) -> list[Rendered]:
        pairs = [(query, each) for query, own in zip(asked.queries, asked.documents, strict=True) for each in own]
        self._admit(len(pairs))
        scores = iter(await self._batcher.submit(pairs))
        results: list[Rendered] = []
        for at, (query, own) in enumerate(zip(asked.queries, asked.documents, strict=True)):
            result = ordered(query, own, [next(scores) for _ in own], asked.rerank_topk)
            if isinstance(result, RetrieverError):
                raise RefusedRequest(502, "query_failed", str(result), at)
            results.append(render(result))
        return results

    def _admit(self, pairs: int) -> None:
        waiting, most = self._batcher.waiting, self._config.limits.max_documents
        if waiting + pairs <= most:
            return
        seconds = math.ceil(waiting / self._pairs_per_s) if self._pairs_per_s else 1
        raise RefusedRequest(
            503,
            "overloaded",
            f"{waiting} documents wait to be reranked; at most {most} may, so ask again later",
            retry_after_s=min(max(seconds, 1), _MOST_RETRY_S),
        )

    async def _score(self, pairs: list[Pair]) -> Sequence[float]:
        start = time.perf_counter()
        scores = await self._thread.call(self._reranker.score, pairs)
        self._pairs_per_s = len(pairs) / max(time.perf_counter() - start, 1e-6)
        return scores


def _request_schema(limits: RequestLimits) -> dict[str, Any]:
    """Return the schema of a body; that there are as many lists of documents as queries, no schema can say."""
    query = {"type": "string", "minLength": 1, "maxLength": limits.max_query_chars, "pattern": NOT_BLANK}
    listed = {"type": "array", "minItems": 1, "maxItems": limits.max_queries}
    documents = {"type": "array", "items": _DOCUMENT_SCHEMA}
    return {
        "type": "object",
        "required": ["queries", "documents"],
        "additionalProperties": False,
        "properties": {
            "queries": {**listed, "items": query},
            "documents": {**listed, "items": documents},
            "rerank_topk": {"type": ["integer", "null"], "minimum": 1},
            "return_scores": {"type": "boolean", "default": False},
        },
    }


def add_rerank_route(app: FastAPI, reranker: Reranker, config: ServerConfig) -> RerankService:
    """Let an app answer `POST /rerank`; also while it runs.

    The app has to bound the size of bodies and to answer `RefusedRequest`. Close what is returned when it shuts down.
    """
    service = RerankService(reranker, config)
    schema = _request_schema(config.limits)
    body_docs = {"required": True, "content": {"application/json": {"schema": schema}}}
    faults: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 408, 413, 422, 500, 502, 503), ERROR)

    @app.post("/rerank", openapi_extra={"requestBody": body_docs}, responses=faults)
    async def rerank(request: Request) -> Response:
        """Order each query's documents anew."""
        answer = await service.answer(await request.body(), request.receive)
        return Response(answer, media_type="application/json")

    app.openapi_schema = None  # it may have been asked for before
    return service


class RerankOnly:
    """Stands where a service has its engine, and says that there is none."""

    def __init__(self, reranker: Reranker, limits: RequestLimits) -> None:
        details = {"rerank_model": reranker.model}
        self.info = EngineInfo("rerank", 0, limits.max_topk, "", reranker.fingerprint, details)

    def search(self, queries: Sequence[str], topk: int) -> list[RetrieverError]:
        """Return an error for each query."""
        return [RetrieverError("this service has no index; it answers POST /rerank") for _ in queries]

    def close(self) -> None:
        """Do nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a reranker from the command line."""
    # Imported here: the server imports this module to serve `/rerank` beside `/retrieve`.
    from verl.retrieval.opening import Opened
    from verl.retrieval.server import bind, serve, set_up_logging

    parser = _parser()
    args = parser.parse_args(arguments)
    set_up_logging()

    def open_() -> Opened:
        reranker = CrossEncoderReranker(args.rerank_model, args.device, args.batch_tokens, args.max_length)
        return Opened(RerankOnly(reranker, config.limits), cacheable=False, reranker=reranker)

    try:
        config = ServerConfig(host=args.host, port=args.port, topk=args.rerank_topk, token_env=args.token_env)
        listener = bind(config.host, config.port)
        logger.info("listening at http://%s:%d/rerank", config.host, listener.getsockname()[1])
        serve(open_, config, listener)
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m verl.retrieval.rerank_server",
        description="Serve a cross-encoder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rerank_model", default=DEFAULT_MODEL, help="cross-encoder: local folder or Hub name")
    parser.add_argument("--device", help="a torch device (the first GPU if there is one)")
    parser.add_argument("--batch_tokens", type=int, help="tokens in one forward pass (what suits the device)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a pair that are read")
    parser.add_argument("--rerank_topk", type=int, default=3, help="documents per query when a request does not say")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=PORT, help="0 for any free port")
    parser.add_argument("--token_env", default="", help="environment variable with the bearer token to ask for")
    return parser


def _documents(value: Any, given: bool, queries: int, limits: RequestLimits) -> tuple[tuple[Document, ...], ...]:
    if not isinstance(value, list):
        found = f"is {_shown(value)}" if given else "is missing"
        raise _invalid("documents", f"documents {found}; expected a list of lists of documents")
    if len(value) != queries:
        raise _invalid("documents", f"{len(value)} lists of documents for {queries} queries; expected one for each")
    for index, own in enumerate(value):
        if not isinstance(own, list):
            raise _invalid("documents", f"documents[{index}] is {_shown(own)}; expected a list of documents", index)
    count = sum(map(len, value))
    if count > limits.max_documents:
        most = f"expected at most {limits.max_documents}, so send several requests"
        raise _invalid("documents", f"{count} documents came; {most}")
    return tuple(tuple(_document(each, index, at) for at, each in enumerate(own)) for index, own in enumerate(value))


def _document(received: Any, index: int, at: int) -> Document:
    where = f"documents[{index}][{at}]"
    inner = received.get("document", received) if isinstance(received, dict) else received
    if not isinstance(inner, dict):
        raise _invalid("document", f"{where} is {_shown(inner)}; expected an object with id and contents", index)
    try:
        document = wire._document(inner)
        f"{document.id}{document.title}{document.text}".encode()
    except RetrieverError as error:
        raise _invalid("document", f"{where}: {error}", index) from error
    except UnicodeEncodeError as error:
        message = f"{where} holds an unpaired surrogate (\\ud800 to \\udfff), which is no character; remove it"
        raise _invalid("document", message, index) from error
    return document


def _invalid(code: str, message: str, query_index: int | None = None) -> RefusedRequest:
    return RefusedRequest(422, code, message, query_index)


def _shown(value: Any) -> str:
    return wire._shown(value)


if __name__ == "__main__":
    main()
