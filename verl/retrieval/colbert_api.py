"""`GET /api/search?query=&k=`: the published ColBERT server's shape, in front of whatever engine is served.

    {"query": "...", "topk": [{"text": "title | text", "pid": "...", "rank": 1, "score": 21.3, "prob": 0.7}, ...]}

`k` is 10 where none comes and 100 at most, also where more is asked for; `prob` is the softmax over the scores that are
returned. A `pid` is the document's id, as the number that it is where it is one (the published server's are rows).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import QueryParams

from verl.errors import RetrieverError
from verl.retrieval.openapi import ERROR, NOT_BLANK
from verl.retrieval.service import SearchService
from verl.retrieval.watching import while_connected
from verl.retrieval.wire import RefusedRequest, RequestLimits

logger = logging.getLogger(__name__)

PATH = "/api/search"
DEFAULT_K = 10
MOST_K = 100


def add_colbert_route(app: FastAPI, service: SearchService) -> None:
    """Answer `GET /api/search` with the service's engine."""

    described = {"parameters": _parameters(service.config.limits)}
    statuses = {400: ERROR, 422: ERROR, 502: ERROR, 503: ERROR}

    @app.get(PATH, responses=statuses, openapi_extra=described)
    async def search(request: Request) -> Response:
        """Return the best documents for `query`, `k` of them."""
        query, k = read_request(request.query_params, service.config.limits)
        # As many as there are: the published server, too, answers with fewer from a small index.
        searching = service.search([query], min(k, service.info.max_topk))
        await request.body()  # there is none, but it comes before the news that the client has gone
        (result,) = await while_connected(searching, request.receive)
        if isinstance(result, RetrieverError):
            raise RefusedRequest(502, "query_failed", str(result), 0)
        if isinstance(result, Exception):
            logger.error("a search failed", exc_info=result)
            raise RefusedRequest(500, "internal", f"the search failed: {type(result).__name__}: {result}", 0)
        documents, scores = (list(map(orjson.loads, parts)) for parts in result)
        return JSONResponse({"query": query, "topk": entries(documents, scores)})


def _parameters(limits: RequestLimits) -> list[dict[str, Any]]:
    """Return the schema of what `read_request` takes."""
    query = {"type": "string", "minLength": 1, "maxLength": limits.max_query_chars, "pattern": NOT_BLANK}
    k = {"type": "integer", "minimum": 1, "maximum": 999_999_999, "default": DEFAULT_K}
    return [
        {"name": "query", "in": "query", "required": True, "schema": query},
        {"name": "k", "in": "query", "required": False, "schema": k},
    ]


def read_request(parameters: QueryParams, limits: RequestLimits) -> tuple[str, int]:
    """Return query and number of documents.

    Raises:
        RefusedRequest: with status 422, what is wrong.
    """
    query = parameters.get("query", "")
    if not query.strip():
        raise RefusedRequest(422, "queries", "query is missing or blank; expected GET /api/search?query=TEXT&k=10")
    if len(query) > limits.max_query_chars:
        message = f"query has {len(query)} characters; at most {limits.max_query_chars} are allowed"
        raise RefusedRequest(422, "queries", message)
    asked = parameters.get("k", str(DEFAULT_K))
    if not (asked.isascii() and asked.isdigit() and len(asked) <= 9 and int(asked) >= 1):
        raise RefusedRequest(422, "topk", f"k is {asked[:40]!r}; expected an integer of at least 1")
    return query, min(int(asked), MOST_K, limits.max_topk, limits.max_documents)


def entries(documents: Sequence[dict[str, Any]], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return the documents in the published shape.

    Args:
        documents: `{id, title, text}` of each, best first.
    """
    shares = softmax(scores)
    return [
        {
            "text": f"{document['title']} | {document['text']}",
            "pid": int(document["id"]) if _is_row(document["id"]) else document["id"],
            "rank": rank,
            "score": score,
            "prob": prob,
        }
        for rank, (document, score, prob) in enumerate(zip(documents, scores, shares, strict=True), 1)
    ]


def softmax(scores: Sequence[float]) -> list[float]:
    """Return the shares of finite scores; they sum to 1."""
    if not scores:
        return []
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def _is_row(id: str) -> bool:
    """Whether an id is written as a number is, so that it can be told as one and still be the same id."""
    return id.isascii() and id.isdigit() and len(id) <= 15 and str(int(id)) == id
