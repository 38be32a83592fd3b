"""How the retriever service listens, batches and defends itself; plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from verl.errors import ConfigError
from verl.retrieval.wire import RequestLimits

MEGABYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Where results are kept; their key is the engine's fingerprint and the query.

    Attributes:
        memory_mb: size of the cache in memory, of each worker; 0 keeps nothing.
        path: sqlite file on a local disk that all workers share and that outlives them; None for none.
        disk_mb: size of that file above which its oldest results are dropped.
    """

    memory_mb: float = 64.0
    path: Path | None = None
    disk_mb: float = 1024.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.memory_mb) and self.memory_mb >= 0):
            raise ConfigError(f"server cache_mb={self.memory_mb}; expected 0 (no cache) or a number of megabytes")
        if not (math.isfinite(self.disk_mb) and self.disk_mb >= 1):
            raise ConfigError(f"server cache_disk_mb={self.disk_mb}; expected at least 1")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the service listens, batches and defends itself.

    Attributes:
        host: address to listen on; the default can only be reached from this machine.
        port: 0 lets the system choose a free one, which is logged.
        workers: processes that answer on the port, each with an engine of its own; index files are shared memory.
        topk: documents per query when a request does not say.
        limits: what one request may ask for.
        batch_queries: most queries that go to the engine at once.
        batch_window_ms: how long a batch waits for the queries of other requests.
        max_queued_queries: queries that may wait for the engine in one worker (for an answer, where the engine asks the
            web); a request that would exceed it gets 503 with `Retry-After`.
        max_connections: open connections of one worker; above it the one that has been silent longest is closed.
        max_body_mb: what all bodies on their way may hold together in one worker.
        header_timeout_s: how long a client may take to send the head of a request.
        body_timeout_s: how long a client may take to send its body.
        write_timeout_s: how long a client may take to accept more of its answer.
        keep_alive_s: how long a connection without a request is kept.
        drain_s: after SIGTERM, how long `/ready` says 503 while requests are still accepted, so that a load balancer
            sends them elsewhere.
        shutdown_timeout_s: how long requests in flight may take after that.
        token_env: environment variable with the bearer token that requests must carry; empty for none.
        cache: where results are kept.
    """

    host: str = "127.0.0.1"
    port: int = 3000
    workers: int = 1
    topk: int = 3
    limits: RequestLimits = field(default_factory=RequestLimits)
    batch_queries: int = 256
    batch_window_ms: float = 2.0
    max_queued_queries: int = 8192
    max_connections: int = 8192
    max_body_mb: int = 256
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    drain_s: float = 0.0
    shutdown_timeout_s: float = 30.0
    token_env: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        for name in ("workers", "topk", "batch_queries", "max_connections", "max_body_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"server {name}={getattr(self, name)}; expected at least 1")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"server port={self.port}; expected 1 to 65535, or 0 for any free port")
        for name in ("header_timeout_s", "body_timeout_s", "write_timeout_s", "keep_alive_s"):
            _check_seconds(name, getattr(self, name), above_zero=True)
        for name in ("batch_window_ms", "drain_s", "shutdown_timeout_s"):
            _check_seconds(name, getattr(self, name), above_zero=False)
        if self.max_queued_queries < self.limits.max_queries:
            raise ConfigError(
                f"server max_queued_queries={self.max_queued_queries}; expected at least {self.limits.max_queries}, "
                "the most queries of one request"
            )

    @property
    def stop_timeout_s(self) -> float:
        """How long a process may take to end after SIGTERM."""
        return self.drain_s + 2 * self.shutdown_timeout_s + 5.0  # for the requests, then for the engine


def _check_seconds(name: str, value: float, above_zero: bool) -> None:
    if not (math.isfinite(value) and (value > 0 if above_zero else value >= 0)):
        raise ConfigError(f"server {name}={value}; expected {'more than 0' if above_zero else '0 or more'}")
