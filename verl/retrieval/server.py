"""The retriever service: `python -m verl.retrieval.server --index_path I --corpus_path C --retriever_name N`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from verl.errors import ConfigError, RetrieverError, SearchAgentError
from verl.retrieval.batching import MicroBatcher
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import Engine, extent, open_index
from verl.retrieval.settings import RETRIEVERS, check_retriever
from verl.retrieval.wire import RefusedRequest, RequestLimits, error_body, parse_request, response_body
from verl.types import SearchResult

logger = logging.getLogger(__name__)

_REQUEST_SCHEMA = {
    "type": "object",
    "required": ["queries"],
    "additionalProperties": False,
    "properties": {
        "queries": {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        "topk": {"type": ["integer", "null"], "minimum": 1},
        "return_scores": {"type": "boolean", "default": False},
    },
}


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the service listens, batches and defends itself.

    Attributes:
        host: address to listen on; the default can only be reached from this machine.
        port: 0 lets the system choose a free one, which is logged.
        topk: documents per query when a request does not say.
        limits: what one request may ask for.
        batch_queries: most queries that go to the engine at once.
        batch_window_ms: how long a batch waits for the queries of other requests.
        body_timeout_s: how long a client may take to send its body.
        shutdown_timeout_s: how long requests in flight may take after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 3000
    topk: int = 3
    limits: RequestLimits = field(default_factory=RequestLimits)
    batch_queries: int = 256
    batch_window_ms: float = 2.0
    body_timeout_s: float = 30.0
    shutdown_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for item in ("topk", "batch_queries"):
            if getattr(self, item) < 1:
                raise ConfigError(f"server {item}={getattr(self, item)}; expected at least 1")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"server port={self.port}; expected 1 to 65535, or 0 for any free port")


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """Build the service around an engine.

    Requests are answered concurrently, but the engine is only called from one thread, with the queries of the
    requests that wait merged into batches.

    Raises:
        ConfigError: the default `topk` exceeds the corpus.
    """
    if config.topk > engine.info.max_topk:
        raise ConfigError(f"topk={config.topk} exceeds {extent(engine.info)}; lower --topk")
    searcher = _BatchedSearch(engine, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await searcher.close()

    app = FastAPI(title="Retriever", lifespan=lifespan)
    app.add_exception_handler(RefusedRequest, _on_refused)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)
    body_docs = {"required": True, "content": {"application/json": {"schema": _REQUEST_SCHEMA}}}

    @app.post("/retrieve", openapi_extra={"requestBody": body_docs})
    async def retrieve(request: Request) -> Response:
        body = await _read_body(request, config)
        asked = parse_request(body, config.limits, config.topk, engine.info.max_topk)
        results = await searcher(asked.queries, asked.topk)
        return Response(response_body(results, asked.return_scores), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "retriever": engine.info.name,
            "documents": engine.info.documents,
            "fingerprint": engine.info.corpus,
        }

    return app


class _BatchedSearch:
    """Runs an engine in one thread of its own, fed by a `MicroBatcher`."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._batcher: MicroBatcher[tuple[str, int], SearchResult] = MicroBatcher(
            self._run, max_items=config.batch_queries, window_s=config.batch_window_ms / 1000
        )

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        return await self._batcher.submit([(query, topk) for query in queries])

    async def close(self) -> None:
        await self._batcher.drain()
        self._thread.shutdown()

    async def _run(self, jobs: Sequence[tuple[str, int]]) -> list[SearchResult | Exception]:
        """Search once for the largest `topk`; the result for a smaller one is the head of it (see `Engine`)."""
        queries, largest = [query for query, _ in jobs], max(topk for _, topk in jobs)
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._thread, self._engine.search, queries, largest)
        return [
            result
            if isinstance(result, RetrieverError)
            else SearchResult(result.query, result.documents[:topk], result.scores[:topk])
            for result, (_, topk) in zip(results, jobs, strict=True)
        ]


async def _read_body(request: Request, config: ServerConfig) -> bytes:
    """Read the body, giving up as soon as it is too long or too slow, whatever its headers promise."""
    limit = config.limits.max_body_bytes
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    message = f"the body has more than {limit} bytes; send fewer queries in a request"
                    raise RefusedRequest(413, "body_too_large", message)
                chunks.append(chunk)
    except TimeoutError as error:
        message = f"the body did not arrive within {config.body_timeout_s:g} s; send it at once"
        raise RefusedRequest(408, "body_timeout", message) from error
    except ClientDisconnect as error:
        raise RefusedRequest(400, "disconnected", "the connection closed before the body was complete") from error
    return b"".join(chunks)


async def _on_refused(_: Request, error: Exception) -> Response:
    if not isinstance(error, RefusedRequest):
        raise error
    # A client that is still sending would otherwise keep the connection busy with a body that nobody reads.
    headers = {"Connection": "close"} if error.status in (408, 413) else None
    return JSONResponse(error_body(error.code, str(error), error.query_index), error.status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}; expected POST /retrieve or GET /health"
    return JSONResponse(error_body("http", message), error.status_code, error.headers)


async def _on_failure(_: Request, error: Exception) -> Response:
    """Answer for a fault of ours; the traceback goes to the log, the cause to the client."""
    return JSONResponse(error_body("internal", f"the search failed: {type(error).__name__}: {error}"), 500)


def bind(host: str, port: int) -> socket.socket:
    """Reserve the address before the index is loaded, so that a port in use is known at once.

    Raises:
        ConfigError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error}); stop what uses it or pass another --port"
        ) from error
    return listener


def serve(engine: Engine, config: ServerConfig, listener: socket.socket) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those in flight."""
    app = create_app(engine, config)
    host, port = listener.getsockname()[:2]
    logger.info("%s: %s documents at http://%s:%d/retrieve", engine.info.name, engine.info.documents, host, port)
    # uvicorn finishes its work on either signal and then raises it again: all was done as asked, so the process ends
    # with 0.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(0))
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(config.shutdown_timeout_s)),
    )
    uvicorn.Server(settings).run(sockets=[listener])


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve an index from the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it reports every instruction set it does not find
    try:
        config = ServerConfig(
            **{item.name: getattr(args, item.name) for item in fields(ServerConfig) if item.name in args}
        )
        check_retriever(args.retriever_name)
        listener = bind(config.host, config.port)
        corpus = Corpus.open(args.corpus_path, args.corpus_cache)
        engine = open_index(args.index_path, corpus, args.retriever_name, args.retriever_model, args.threads)
        serve(engine, config, listener)
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl.retrieval.server", description="Serve a retrieval index.")
    defaults = ServerConfig()
    parser.add_argument("--index_path", required=True, help="folder that verl.retrieval.build wrote, or a file in it")
    parser.add_argument("--corpus_path", required=True, help="jsonl or jsonl.gz corpus that the index was built from")
    parser.add_argument("--corpus_cache", help="folder of the converted corpus (default: CORPUS_PATH.cache)")
    parser.add_argument("--retriever_name", required=True, help=f"one of {', '.join(RETRIEVERS)}")
    parser.add_argument("--retriever_model", help="encoder: local folder or Hugging Face name")
    parser.add_argument("--topk", type=int, default=defaults.topk, help="documents per query (default: %(default)s)")
    parser.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=defaults.port, help="0 for any free port (default: %(default)s)")
    parser.add_argument(
        "--batch_window_ms",
        type=float,
        default=defaults.batch_window_ms,
        help="how long a batch waits for other requests (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of a search (default: all that the process may use)")
    return parser


if __name__ == "__main__":
    main()
