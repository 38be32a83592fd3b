"""The retriever service as an ASGI app.

`POST /retrieve`, `GET /api/search`, `/health`, `/ready`, `/info` and `/metrics`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from verl.retrieval.auth import OPEN_PATHS, is_authorised, token_from
from verl.retrieval.bodies import BodyReader, replay
from verl.retrieval.colbert_api import PATH as COLBERT_PATH
from verl.retrieval.colbert_api import add_colbert_route
from verl.retrieval.engine import Engine
from verl.retrieval.metrics import CONTENT_TYPE, ServiceMetrics
from verl.retrieval.openapi import ERROR, HEALTH, INFO, READY, with_retrieve
from verl.retrieval.rerank_server import RerankService, add_rerank_route
from verl.retrieval.retrieve import Retrieve, error_headers, refuse
from verl.retrieval.server_config import ServerConfig
from verl.retrieval.service import SearchService, State
from verl.retrieval.wire import RefusedRequest, error_body

if TYPE_CHECKING:
    from verl.retrieval.rerank import Reranker

logger = logging.getLogger(__name__)

_KNOWN_PATHS = frozenset(
    ("/retrieve", "/rerank", COLBERT_PATH, "/health", "/ready", "/info", "/metrics", "/openapi.json", "/docs")
)


class RetrieverApp(FastAPI):
    """The app around a `SearchService`.

    `POST /retrieve` goes past the framework's routing, validation and middleware, which take as long as the rest of
    the request; everything else is an ordinary route.
    """

    def __init__(self, service: SearchService) -> None:
        """Build the app.

        Raises:
            ConfigError: the variable with the token is not set.
        """
        super().__init__(title="Retriever", version=_package_version(), lifespan=_lifespan)
        self.service = service
        self._rerankers: list[RerankService] = []
        self._token = token_from(service.config.token_env)
        self._bodies = BodyReader(service.config)
        self._retrieve = Retrieve(service, self._bodies)
        self.router.routes.append(Route("/retrieve", self._retrieve, methods=["POST"]))
        for kind, handler in ((RefusedRequest, _on_refused), (HTTPException, _on_http_error), (Exception, _on_failure)):
            self.add_exception_handler(kind, handler)
        _add_routes(self, service)
        add_colbert_route(self, service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        path, metrics = scope["path"], self.service.metrics
        known = path if path in _KNOWN_PATHS else "other"
        try:
            self._check_token(scope, path)
            if path == "/retrieve" and scope["method"] == "POST":
                await self._retrieve(scope, receive, send)
                return
            body = await self._bodies.read(receive)
        except RefusedRequest as refused:
            await refuse(refused, known, metrics, send)
            return
        await super().__call__(scope, replay(body, receive), _counting(metrics, known, send))

    def openapi(self) -> dict[str, Any]:
        """Return the schema, with the limits of the engine once it is loaded."""
        return with_retrieve(super().openapi(), self.service, secured=bool(self._token))

    def serve_reranker(self, reranker: Reranker) -> None:
        """Answer `POST /rerank` from now on."""
        self._rerankers.append(add_rerank_route(self, reranker, self.service.config))

    async def aclose(self) -> None:
        """Answer what waits, then release everything."""
        await self.service.close()
        for reranker in self._rerankers:
            await reranker.close()

    def _check_token(self, scope: Scope, path: str) -> None:
        if not self._token or path in OPEN_PATHS:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not is_authorised(given, self._token):
            message = "no valid bearer token came; send the header 'Authorization: Bearer TOKEN'"
            raise RefusedRequest(401, "unauthorised", message)


def create_app(engine: Engine, config: ServerConfig, cacheable: bool = True) -> RetrieverApp:
    """Build the service around an engine that is open already.

    Args:
        cacheable: whether results may be kept; not if they change in time, as the web's do.

    Raises:
        ConfigError: the default `topk` exceeds what the engine gives, the cache file cannot be used, or the token is
            not set.
    """
    service = SearchService(config)
    service.start(engine, cacheable)
    return RetrieverApp(service)


def _add_routes(app: FastAPI, service: SearchService) -> None:
    @app.get("/health", responses={200: HEALTH, 503: ERROR})
    async def health() -> Response:
        """Say that the process lives and has loaded its index."""
        info = service.info
        status = "ok" if service.state is State.READY else service.state.value
        identity = {"retriever": info.name, "documents": info.documents, "fingerprint": info.corpus}
        return JSONResponse({"status": status, **identity})

    @app.get("/ready", responses={200: READY, 503: READY})
    async def ready() -> Response:
        """Say whether requests should be sent here: 503 until the index is loaded, and while shutting down."""
        return JSONResponse({"status": service.state.value}, 200 if service.state is State.READY else 503)

    @app.get("/info", responses={200: INFO, 503: ERROR})
    async def info() -> Response:
        """Say what is served."""
        known = asdict(service.info)
        known["engine"] = known.pop("name")
        limits = asdict(service.config.limits)
        return JSONResponse({**known, "topk": service.config.topk, "limits": limits, "version": app.version})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Return the counters of all workers in Prometheus' text format."""
        return Response(await asyncio.to_thread(service.report), media_type=CONTENT_TYPE)


@asynccontextmanager
async def _lifespan(app: RetrieverApp) -> AsyncIterator[None]:
    yield
    await app.aclose()


def _counting(metrics: ServiceMetrics, path: str, send: Send) -> Send:
    """Count the answer when its status is sent."""

    async def counted(message: Message) -> None:
        if message["type"] == "http.response.start":
            metrics.requests.labels(path, str(message["status"])).inc()
        await send(message)

    return counted


async def _on_refused(_: Request, error: Exception) -> Response:
    if not isinstance(error, RefusedRequest):
        raise error
    return JSONResponse(error_body(error), error.status, error_headers(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    expected = "expected POST /retrieve or GET /health, /ready, /info or /metrics"
    message = f"{request.method} {request.url.path}: {error.detail}; {expected}"
    return JSONResponse(
        error_body(RefusedRequest(error.status_code, "http", message)), error.status_code, error.headers
    )


async def _on_failure(_: Request, error: Exception) -> Response:
    """Answer for a fault of ours; the traceback goes to the log, the cause to the client."""
    message = f"the request failed: {type(error).__name__}: {error}"
    return JSONResponse(error_body(RefusedRequest(500, "internal", message)), 500)


def _package_version() -> str:
    try:
        return version("search-agents")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
