"""What the service counts, for Prometheus; right under several workers, which share a folder of counter files."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Read by prometheus_client when it is imported: with it, counters live in files of this folder."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ServiceMetrics:
    """The metrics of one worker process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("retriever_requests", "Answered requests.", ["path", "status"], registry=registry)
        self.errors = Counter("retriever_errors", "Error answers by their code.", ["code"], registry=registry)
        self.queries = Counter("retriever_queries", "Queries of accepted requests.", registry=registry)
        self.cache_hits = Counter(
            "retriever_cache_hits",
            "Queries that cost no search: found in memory, on disk, or asked for twice in one batch.",
            ["where"],
            registry=registry,
        )
        self.searched = Counter("retriever_searched_queries", "Queries that the engine searched.", registry=registry)
        self.engine_seconds = Histogram(
            "retriever_engine_seconds", "Time of an engine call.", buckets=_SECONDS, registry=registry
        )
        self.batch_queries = Histogram(
            "retriever_batch_queries", "Queries of a batch.", buckets=_SIZES, registry=registry
        )
        self.request_seconds = Histogram(
            "retriever_request_seconds", "Time of POST /retrieve, its body read.", buckets=_SECONDS, registry=registry
        )
        self.queued = Gauge(
            "retriever_queued_queries", "Queries waiting.", registry=registry, multiprocess_mode="livesum"
        )
        self.ready = Gauge("retriever_ready", "Workers ready.", registry=registry, multiprocess_mode="livesum")
        self.resident = Gauge(
            "retriever_resident_bytes", "Resident memory.", registry=registry, multiprocess_mode="liveall"
        )

    def render(self) -> bytes:
        """Return the metrics of all workers in Prometheus' text format; reads files, so it may block."""
        self.resident.set(resident_bytes())
        folder = os.environ.get(SHARED_FOLDER)
        if folder is None:
            return generate_latest(self._registry)
        merged = CollectorRegistry()
        MultiProcessCollector(merged, path=folder)
        return generate_latest(merged)


def resident_bytes(process: int | str = "self") -> int:
    """Return the resident memory of a process, mapped files included."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE_BYTES
