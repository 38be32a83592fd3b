"""Exact inner-product search over plain vectors, mapped or in memory, block by block."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import torch

_BATCH = 2
"""Queries from which on one matrix product per block beats scanning the vectors once per query."""
_BLOCK_ROWS = 16_384
_COPIED_ROWS = 1024
_SCORES_BYTES = 64 << 20


class ExactSearch:
    """Finds the best rows of a matrix for queries; scores are those of float32 kernels, good to rounding.

    A single query is scanned by FAISS, every thread over its own part of the rows. Several are a matrix product, for
    which the vectors are copied to aligned memory, a cacheful at a time: the numbers of a mapped FAISS file begin at an
    odd address, where MKL multiplies up to four times as slowly (measured with AVX2, 2 to 8 queries).

    Args:
        vectors: (N, D) float32 or float16, C-contiguous.
        threads: CPU threads; what FAISS may use when None.
    """

    def __init__(self, vectors: np.ndarray, threads: int | None = None) -> None:
        self._vectors = vectors
        self._threads = threads or faiss.omp_get_max_threads()
        self._pool = ThreadPoolExecutor(self._threads, "scan", lambda: faiss.omp_set_num_threads(1))

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the `count` best rows of every query, best first.

        Args:
            queries: (Q, D) float32
            count: 1 to N.

        Returns:
            rows (Q, count) int64 and their scores (Q, count) float32
        """
        parts = self._scans(queries, count) if len(queries) < _BATCH else self._products(queries, count)
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        for rows, scores in parts:
            if best is not None:
                rows, scores = torch.cat([best[0], rows], dim=1), torch.cat([best[1], scores], dim=1)
            scores, order = torch.topk(scores, min(count, scores.shape[1]), dim=1)
            best = rows.gather(1, order), scores
        if best is None:
            raise ValueError("no vectors to search")
        return best[0].numpy(), best[1].numpy()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _scans(self, queries: np.ndarray, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        def scan(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            part = np.ascontiguousarray(self._vectors[start:stop], dtype=np.float32)
            scores, rows = faiss.knn(queries, part, min(count, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
            return rows + start, scores

        edges = self._edges()
        for rows, scores in self._pool.map(scan, edges[:-1], edges[1:]):
            yield torch.from_numpy(rows), torch.from_numpy(scores)

    def _edges(self) -> list[int]:
        """Return where the threads' parts begin and end; vectors that must be converted come in smaller parts."""
        rows = len(self._vectors)
        parts = min(self._threads, rows)
        if self._vectors.dtype != np.float32:
            parts = max(parts, -(-rows // _BLOCK_ROWS))
        return np.linspace(0, rows, parts + 1).astype(int).tolist()

    def _products(self, queries: np.ndarray, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        asked = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        step = max(1, min(_BLOCK_ROWS, _SCORES_BYTES // (4 * len(queries))))
        copied = torch.empty(min(self._threads * _COPIED_ROWS, step), queries.shape[1])
        products = torch.empty(len(queries), step)
        for start in range(0, len(self._vectors), step):
            block = self._vectors[start : start + step]
            for at in range(0, len(block), len(copied)):
                part = self._copy(block[at : at + len(copied)], copied)
                torch.mm(asked, part.T, out=products[:, at : at + len(part)])
            scores, rows = torch.topk(products[:, : len(block)], min(count, len(block)), dim=1)
            yield rows + start, scores

    def _copy(self, block: np.ndarray, to: torch.Tensor) -> torch.Tensor:
        """Copy `block` to the head of `to`, as float32, every thread a part; return that head."""
        part = to[: len(block)]

        def copy(start: int) -> None:
            np.copyto(part.numpy()[start : start + _COPIED_ROWS], block[start : start + _COPIED_ROWS])

        starts = range(0, len(block), _COPIED_ROWS)
        deque(self._pool.map(copy, starts) if len(starts) > 1 else map(copy, starts), maxlen=0)
        return part
