"""How fast this machine does what indexes are made of, measured in a few seconds; the base of `build plan`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np

from verl.retrieval.index_kinds import IndexConfig

_ROWS = 20_000
_CENTROIDS = 1024
_GRAPH_ROWS = 2_000


@dataclass(frozen=True, slots=True)
class Rates:
    """Speeds of one machine, in numbers of vectors that are compared with a query in a second, on one thread.

    The defaults were measured on one core of an AMD EPYC (Zen 4); that of the disk is an assumption in either case.

    Attributes:
        measured: whether these are this machine's.
        flops: multiplications and additions per second when vectors are assigned to clusters, on all threads.
        flat_numbers: of whole vectors, one after the other.
        half_numbers: of half-precision vectors.
        byte_numbers: of byte codes.
        graph_numbers: of whole vectors, here and there, while a graph is built on all threads.
        disk_bytes: read and written in a second.
    """

    measured: bool = False
    flops: float = 80e9
    flat_numbers: float = 8e9
    half_numbers: float = 12e9
    byte_numbers: float = 10e9
    graph_numbers: float = 2e9
    disk_bytes: float = 0.5e9


def calibrate(width: int, config: IndexConfig) -> Rates:
    """Measure the rates for vectors of `width` numbers; takes some seconds and about 100 MB."""
    rng = np.random.default_rng(0)
    rows = max(_CENTROIDS, min(_ROWS, 32_000_000 // width))
    vectors = rng.standard_normal((rows, width), dtype=np.float32)
    centroids = faiss.IndexFlatIP(width)
    centroids.add(vectors[:_CENTROIDS])
    assigned = vectors[:4096]
    seconds = _best(lambda: centroids.search(assigned, 1))
    return Rates(
        measured=True,
        flops=2 * len(assigned) * _CENTROIDS * width / seconds,
        flat_numbers=_scan("Flat", vectors),
        half_numbers=_scan("SQfp16", vectors),
        byte_numbers=_scan("SQ8", vectors),
        graph_numbers=_graph(vectors[:_GRAPH_ROWS], config),
    )


def _scan(factory: str, vectors: np.ndarray) -> float:
    """Return how many numbers a second one query is compared with; one query is searched by one thread."""
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    return vectors.size / _best(lambda: index.search(vectors[:1], 10))


def _graph(vectors: np.ndarray, config: IndexConfig) -> float:
    """A graph this small is walked nearly as a whole for every vector that is linked into it: half of it on average."""
    index = faiss.IndexHNSWFlat(vectors.shape[1], config.hnsw_m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = config.ef_construction
    start = time.perf_counter()
    index.add(vectors)
    return vectors.size * len(vectors) / 2 / (time.perf_counter() - start)


def _best(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest of a few runs, in seconds: the least disturbed one."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
