"""The retriever service: `python -m verl.retrieval.server --index_path I --corpus_path C --retriever_name N`.

The port is bound first, so that one in use is known at once, and answers while the index is being loaded: `/retrieve`
and `/health` with 503, `/ready` with 503 and the state. With several workers the port answers as soon as the first one
has loaded its index; until then connections are refused.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType

import uvicorn

from verl.errors import ConfigError, SearchAgentError
from verl.retrieval.app import RetrieverApp
from verl.retrieval.auth import token_from
from verl.retrieval.opening import EngineOptions, Opened, open_engine
from verl.retrieval.protocol import ConnectionGuard
from verl.retrieval.server_config import ServerConfig
from verl.retrieval.server_flags import configs, parser
from verl.retrieval.service import SearchService
from verl.retrieval.worker_pool import WorkerPool

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SPARE_FILES = 256
_SWITCH_S = 0.001
"""How long the engine's Python code may keep requests waiting for the interpreter; Python's own default is 5 ms."""


def serve(
    open_: Callable[[], Opened],
    config: ServerConfig,
    listener: socket.socket,
    listen_while_loading: bool = True,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Open the engine and answer requests until SIGTERM or SIGINT, then finish those in flight.

    Args:
        open_: opens the engine; called in the engine's thread.
        listener: a bound socket.
        listen_while_loading: whether connections are accepted before the engine is open.
        on_ready: called once the engine is open and the port answers.

    Raises:
        SearchAgentError: the engine cannot be opened.
    """
    app = RetrieverApp(SearchService(config))
    server = _Server(app, _allow_connections(config), open_, listen_while_loading, on_ready)
    # uvicorn finishes its work on either signal and then raises it again: all was done as asked, so the process ends
    # with 0.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: _end(app.service))
    sys.setswitchinterval(_SWITCH_S)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure


class _Server(uvicorn.Server):
    """uvicorn, which also opens the engine, and says that it is going away before it does."""

    def __init__(
        self,
        app: RetrieverApp,
        config: ServerConfig,
        open_: Callable[[], Opened],
        listen_while_loading: bool,
        on_ready: Callable[[], None] | None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=ConnectionGuard(config).protocol(),  # type: ignore[arg-type]  # it is only called
                ws="none",
                loop="uvloop",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nothing asks who the client is
                timeout_keep_alive=config.keep_alive_s,  # type: ignore[arg-type]  # seconds of a timer
                timeout_graceful_shutdown=max(1, round(config.shutdown_timeout_s)),
            )
        )
        self._app = app
        self._open = open_
        self._listen_while_loading = listen_while_loading
        self._on_ready = on_ready
        self._drain_s = config.drain_s
        self._stop_at: float | None = None
        self._loading: asyncio.Task[None] | None = None
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to load and to listen."""
        self._loading = asyncio.create_task(self._load())
        while not (self._listen_while_loading or self._loading.done() or self.should_exit):
            await asyncio.wait((self._loading,), timeout=0.1)
        if self.should_exit:
            return
        await super().startup(sockets)
        self._loading.add_done_callback(self._loaded)

    async def on_tick(self, counter: int) -> bool:
        """Stop once the time after SIGTERM has passed in which requests are still accepted."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Prepare to stop at the first signal; stop at the second."""
        self._app.service.drain()
        if self._stop_at is None and self._drain_s and self.started:
            self._captured_signals.append(sig)
            self._stop_at = time.monotonic() + self._drain_s
        else:
            super().handle_exit(sig, frame)

    async def _load(self) -> None:
        service, start = self._app.service, time.perf_counter()
        try:
            opened = await service.call(self._open)
            service.start(opened.engine, opened.cacheable)
            if opened.reranker is not None:
                self._app.serve_reranker(opened.reranker)
        except Exception as error:  # whatever it is, it ends the process and not only this task
            self.failure = error
            self.should_exit = True
            return
        # What is loaded stays: looking through it at every collection would stop all requests for that time.
        gc.collect()
        gc.freeze()
        seconds = time.perf_counter() - start
        logger.info("%s: %s documents, ready after %.1f s", service.info.name, service.info.documents, seconds)

    def _loaded(self, _: asyncio.Task[None]) -> None:
        if self.failure is None and self._on_ready is not None:
            self._on_ready()


def _end(service: SearchService) -> None:
    if service.busy:  # what is loaded or searched for cannot be interrupted, and nobody waits for it any more
        logging.shutdown()
        os._exit(0)
    sys.exit(0)


def _allow_connections(config: ServerConfig) -> ServerConfig:
    """Raise the limit of open files as far as connections need it and the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = config.max_connections + _SPARE_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if hard != resource.RLIM_INFINITY and hard < wanted:
        most = max(1, hard - _SPARE_FILES)
        logger.warning("%d open files are allowed, so at most %d connections (ulimit -n)", hard, most)
        return replace(config, max_connections=most)
    return config


def bind(host: str, port: int) -> socket.socket:
    """Reserve the address before the index is loaded, so that a port in use is known at once.

    Raises:
        ConfigError: the address cannot be bound.
    """
    return _bound(host, port, socket.SO_REUSEADDR)


def bind_shared(host: str, port: int) -> socket.socket:
    """Reserve an address for workers, who `join` it; no other server can take it, not even one with workers."""
    bind(host, port).close()  # fails where anything uses the port, whatever it lets others do
    reserved = _bound(host, port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)
    # Set, it admits what a server before us left behind; unset, it refuses the next server.
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return reserved


def join(host: str, port: int) -> socket.socket:
    """Return a worker's own socket of a shared address; the system shares the connections out."""
    return _bound(host, port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


def _bound(host: str, port: int, *options: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    for option in options:
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error}); stop what uses it or pass another --port"
        ) from error
    return listener


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve an index from the command line."""
    flags = parser()
    args = flags.parse_args(arguments)
    set_up_logging()
    try:
        config, options = configs(args)
        token_from(config.token_env)
        listener = (bind if config.workers == 1 else bind_shared)(config.host, config.port)
        _report(config, listener)
        if config.workers == 1:
            serve(partial(open_engine, options), config, listener)
        else:
            _serve_by_workers(config, options, listener)
    except SearchAgentError as error:
        flags.exit(1, f"error: {error}\n")


def set_up_logging() -> None:
    """Log to stderr, our own messages from INFO on."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it reports every instruction set it does not find
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of every malformed request


def _report(config: ServerConfig, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    logger.info("listening at http://%s:%d/retrieve", f"[{config.host}]" if ":" in config.host else config.host, port)
    if config.host not in _LOOPBACK and not config.token_env:
        logger.warning(
            "%s can be reached from other machines and no token is asked for: anyone there can search; pass "
            "--token_env, or --host 127.0.0.1",
            config.host,
        )


def _serve_by_workers(config: ServerConfig, options: EngineOptions, reserved: socket.socket) -> None:
    """Run worker processes; `reserved` keeps the port for them and takes no connection itself."""
    port = reserved.getsockname()[1]
    if options.threads is None:
        options = replace(options, threads=max(1, len(os.sched_getaffinity(0)) // config.workers))
    options = replace(options, web_rate=options.web_rate / config.workers)
    pool = WorkerPool(_work, (replace(config, port=port), options), config.workers, config.stop_timeout_s)
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: pool.stop())
    pool.run()


def _work(ready: Callable[[], None], config: ServerConfig, options: EngineOptions) -> None:
    """Be a worker."""
    set_up_logging()
    try:
        listener = join(config.host, config.port)
        serve(partial(open_engine, options), config, listener, listen_while_loading=False, on_ready=ready)
    except SearchAgentError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
