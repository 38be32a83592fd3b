"""`POST /retrieve` on bare ASGI: this is where a query's time outside the engine goes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping

from starlette.types import Receive, Scope, Send

from verl.errors import RetrieverError
from verl.retrieval.bodies import BodyReader
from verl.retrieval.engine import extent
from verl.retrieval.metrics import ServiceMetrics
from verl.retrieval.service import SearchService
from verl.retrieval.watching import while_connected
from verl.retrieval.wire import RefusedRequest, error_body, parse_request, response_body

logger = logging.getLogger(__name__)

_PATH = "/retrieve"
_STOPPING_S = 2
_CONTENT_TYPE = (b"content-type", b"application/json")


class Retrieve:
    """An ASGI app that answers one path."""

    def __init__(self, service: SearchService, bodies: BodyReader) -> None:
        self._service = service
        self._bodies = bodies
        self._metrics = service.metrics
        self._answered = service.metrics.requests.labels(_PATH, "200")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        start = time.perf_counter()
        try:
            body = await self._answer(receive)
        except asyncio.CancelledError:  # the server stops and waits no longer; 503 sends the client elsewhere
            message = "the service is stopping; ask again later"
            going = RefusedRequest(503, "stopping", message, retry_after_s=_STOPPING_S)
            await refuse(going, _PATH, self._metrics, send)
            raise
        except RefusedRequest as refused:
            await refuse(refused, _PATH, self._metrics, send)
        except Exception as error:  # a fault of ours costs this request, which is still told so in JSON
            logger.exception("a request failed")
            await refuse(RefusedRequest(500, "internal", _fault(error)), _PATH, self._metrics, send)
        else:
            self._answered.inc()
            await _send(send, 200, body, [])
        self._metrics.request_seconds.observe(time.perf_counter() - start)

    async def _answer(self, receive: Receive) -> bytes:
        body = await self._bodies.read(receive)
        info, config = self._service.info, self._service.config
        asked = parse_request(body, config.limits, config.topk, info.max_topk, extent(info))
        search = self._service.search(asked.queries, asked.topk)
        results = await (while_connected(search, receive) if self._service.expects_to_wait() else search)
        failed = {at: result for at, result in enumerate(results) if isinstance(result, Exception)}
        if failed:
            raise _failure(failed)
        return response_body(results, asked.return_scores, asked.ids_only)  # type: ignore[arg-type]  # no exception among them


async def refuse(refused: RefusedRequest, path: str, metrics: ServiceMetrics, send: Send) -> None:
    """Answer with an error, and count it."""
    metrics.requests.labels(path, str(refused.status)).inc()
    metrics.errors.labels(refused.code).inc()
    headers = [(name.lower().encode(), value.encode()) for name, value in error_headers(refused).items()]
    body = json.dumps(error_body(refused)).encode()
    await _send(send, refused.status, body, headers)


def error_headers(refused: RefusedRequest) -> Mapping[str, str]:
    """Return the headers that go with an error."""
    headers: dict[str, str] = {}
    if refused.retry_after_s is not None:
        headers["Retry-After"] = str(refused.retry_after_s)
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.code in ("body_timeout", "body_too_large", "overloaded", "unauthorised"):
        # A client that is still sending would otherwise keep the connection busy with a body that nobody reads; one
        # that was turned away finds another worker with a new connection.
        headers["Connection"] = "close"
    return headers


def _failure(failed: Mapping[int, Exception]) -> RefusedRequest:
    """Say which queries failed: 502 when the engine says so, 500 when the engine itself is at fault."""
    reasons = {at: str(error) if isinstance(error, RetrieverError) else _fault(error) for at, error in failed.items()}
    first = min(failed)
    if all(isinstance(error, RetrieverError) for error in failed.values()):
        return RefusedRequest(502, "query_failed", reasons[first], first, query_errors=reasons)
    return RefusedRequest(500, "internal", reasons[first], first, query_errors=reasons)


def _fault(error: Exception) -> str:
    return f"the search failed: {type(error).__name__}: {error}"


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [_CONTENT_TYPE, length, *headers]})
    await send({"type": "http.response.body", "body": body})
