"""Search that answers a query the same whether it comes alone or in any batch, over every kind of FAISS index.

FAISS scores one pair of query and document by one kernel or another, according to how many queries come together and
where the document stands, and the last bits differ. So FAISS only proposes candidates, a few more than asked for. Each
is scored again here from its own vector, as the index holds it, in a way that knows of nothing but the pair. Where
candidates that were not proposed could still be as good as the last one wanted, more are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import faiss
import numpy as np

from verl.retrieval.exact import ExactSearch

_SPARE = 20
"""Candidates beyond `topk`: enough to see that the rest is worse, few enough to cost next to nothing."""
_GROWTH = 4
_BLOCK_ROWS = 4096
_BLOCK_BYTES = 32 << 20
_MOST_BYTES = 1 << 30
_GPU_MOST = 2048
"""FAISS's limit on the candidates of a search on a GPU."""
_ROUNDING = 2.0**-24
_HALF_ROUNDING = 2.0**-11


@dataclass(frozen=True, slots=True)
class Candidates:
    """What an index proposes for some consecutive queries.

    Attributes:
        rows: (Q, C) int64, -1 where it found no more.
        scores: (Q, C) float32, rough.
        vectors: returns the vectors of query number `q`'s candidates `columns`, (n, D) float32, as the index holds
            them; anything where there is no candidate.
    """

    rows: np.ndarray
    scores: np.ndarray
    vectors: Callable[[int, slice], np.ndarray]


@dataclass(frozen=True, slots=True)
class Hits:
    """What may be among the `topk` of one query: rows (n,) int64, each once, and their scores (n,) float32."""

    rows: np.ndarray
    scores: np.ndarray


class Source(Protocol):
    """Proposes candidates.

    Attributes:
        most: never ask for more candidates.
        error: bound of |rough score - true score| as a share of the product of the two vectors' lengths.
    """

    most: int
    error: float

    def candidates(self, queries: np.ndarray, count: int) -> Iterator[Candidates]:
        """Yield the `count` best candidates of `queries`, (Q, D) float32, some queries at a time, in order."""
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...


class FlatSource:
    """All vectors of a flat index, scanned on the CPU; see `verl.retrieval.exact`."""

    def __init__(self, index: faiss.IndexFlat) -> None:
        self._index = index  # owns the memory that is viewed here
        self._vectors = flat_vectors(index)
        self._search = ExactSearch(self._vectors)
        self.most = index.ntotal
        self.error = 2 * index.d * _ROUNDING

    def candidates(self, queries: np.ndarray, count: int) -> Iterator[Candidates]:
        """See `Source.candidates`."""
        rows, scores = self._search.search(queries, count)
        yield Candidates(rows, scores, lambda at, columns: self._vectors[rows[at, columns]])

    def close(self) -> None:
        """See `Source.close`."""
        self._search.close()


class RowSource:
    """Codes in the order of the rows (SQ8, SQfp16) or a graph (HNSW), searched by FAISS on the CPU.

    A graph is walked with `ef_search` candidates whatever `topk` is, because another number takes another walk.
    """

    def __init__(self, index: faiss.Index, ef_search: int | None) -> None:
        self._index = index
        self._walk = 0 if ef_search is None else min(index.ntotal, ef_search)
        self.most = self._walk or index.ntotal
        self.error = 4 * index.d * _ROUNDING
        if self._walk:
            index.hnsw.efSearch = self._walk

    def candidates(self, queries: np.ndarray, count: int) -> Iterator[Candidates]:
        """See `Source.candidates`."""
        scores, rows = self._index.search(queries, max(self._walk, count))
        rows, scores = rows[:, :count], scores[:, :count]
        yield Candidates(rows, scores, lambda at, columns: _reconstruct(self._index, rows[at, columns]))

    def close(self) -> None:
        """See `Source.close`."""


class ListSource:
    """Inverted lists (IVF), of which FAISS searches the `nprobe` nearest on the CPU."""

    def __init__(self, index: faiss.IndexIVF, nprobe: int) -> None:
        self._index = index
        index.nprobe = nprobe
        self.most = min(index.ntotal, _MOST_BYTES // (4 * index.d))
        # A score is the cluster's plus the code's, hence twice the rounding of a plain product.
        self.error = 4 * index.d * _ROUNDING
        # More would choose the clusters by a matrix product, and so in the last resort by the other queries.
        self._queries = faiss.cvar.distance_compute_blas_threshold - 1

    def candidates(self, queries: np.ndarray, count: int) -> Iterator[Candidates]:
        """See `Source.candidates`."""
        step = max(1, min(self._queries, _BLOCK_BYTES // (4 * count * self._index.d)))
        for start in range(0, len(queries), step):
            scores, rows, vectors = self._index.search_and_reconstruct(queries[start : start + step], count)
            rows[rows >= self._index.ntotal] = -1  # in a damaged file
            yield Candidates(rows, scores, lambda at, columns, held=vectors: held[at, columns])

    def close(self) -> None:
        """See `Source.close`."""


class GpuSource:
    """A copy of an index on GPUs, in half precision; the vectors come from the index on the CPU, in full.

    Of a flat index the result depends on the query alone, as on the CPU. Which clusters of an IVF index are searched
    is chosen in half precision, and may in the last resort depend on the batch.

    Args:
        index: the index on the CPU, with its `nprobe` set.
        gpu: its copy.
    """

    def __init__(self, index: faiss.Index, gpu: faiss.Index) -> None:
        self._index, self._gpu = index, gpu
        self._vectors = flat_vectors(index) if isinstance(index, faiss.IndexFlat) else None
        if isinstance(index, faiss.IndexIVF):
            index.make_direct_map()
        self.most = min(index.ntotal, _GPU_MOST)
        self.error = 2 * _HALF_ROUNDING + 4 * index.d * _ROUNDING

    def candidates(self, queries: np.ndarray, count: int) -> Iterator[Candidates]:
        """See `Source.candidates`."""
        scores, rows = self._gpu.search(queries, count)
        yield Candidates(rows, scores, lambda at, columns: self._lookup(rows[at, columns]))

    def _lookup(self, rows: np.ndarray) -> np.ndarray:
        return _reconstruct(self._index, rows) if self._vectors is None else self._vectors[np.maximum(rows, 0)]

    def close(self) -> None:
        """See `Source.close`."""
        self._gpu = None


def nearest(source: Source, queries: np.ndarray, topk: int) -> list[Hits]:
    """Return for every query all documents of `source` whose score is at least that of its `topk`-th best one.

    Args:
        queries: (Q, D) float32, finite.
        topk: 1 to `source.most`.
    """
    found: list[Hits] = [Hits(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
    pending = np.arange(len(queries))
    count = min(source.most, topk + _SPARE)
    while len(pending):
        unclear: list[int] = []
        start = 0
        for part in source.candidates(queries[pending], count):
            numbers = pending[start : start + len(part.rows)]
            start += len(numbers)
            for at, number in enumerate(numbers.tolist()):
                found[number], clear = _rank(part, at, queries[number], topk, source.error)
                if not clear and count < source.most:
                    unclear.append(number)
        pending = np.array(unclear, dtype=np.int64)
        count = min(source.most, _GROWTH * count)
    return found


def _rank(part: Candidates, at: int, query: np.ndarray, topk: int, error: float) -> tuple[Hits, bool]:
    """Score the candidates of one query; the flag says that no document beyond them can be among its `topk`."""
    rows = part.rows[at]
    scores, lengths = np.empty(len(rows), np.float32), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _BLOCK_ROWS):
        columns = slice(start, start + _BLOCK_ROWS)
        vectors = part.vectors(at, columns)
        scores[columns], lengths[columns] = pair_scores(vectors, query), np.linalg.norm(vectors, axis=1)
    there = rows >= 0
    hits = Hits(rows[there], scores[there])
    if not there.all() or len(rows) < topk:
        return hits, True
    wanted = float(np.partition(scores, -topk)[-topk])
    margin = error * float(np.linalg.norm(query)) * float(lengths.max())
    return hits, float(part.scores[at].min()) + margin < wanted


def pair_scores(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the inner products of `vectors`, (n, D), with `query`, (D,), as (n,) float32.

    Products and sums are taken in float64 and rounded once, so that no kernel's order of summation shows.
    """
    return np.multiply(vectors, query, dtype=np.float64).sum(axis=1).astype(np.float32)


def flat_vectors(index: faiss.IndexFlat) -> np.ndarray:
    """Return the vectors of a flat index, (N, D) float32, where they lie; valid as long as the index lives."""
    return faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)


def _reconstruct(index: faiss.Index, rows: np.ndarray) -> np.ndarray:
    """Return the vectors of `rows`, (n, D) float32; any vector for a row of -1."""
    return index.reconstruct_batch(np.maximum(rows, 0))


def stored_vector(index: faiss.Index, row: int, near: np.ndarray) -> np.ndarray | None:
    """Return the vector of `row`, (D,) float32, as the index holds it.

    Of inverted lists only the few nearest to `near`, the likely value, are looked through, and None says that it is in
    none of them: a map of all rows to their lists would find it for certain, and would take 8 bytes per row.
    """
    if not isinstance(index, faiss.IndexIVF):
        return index.reconstruct(row)
    _, numbers = index.quantizer.search(near[np.newaxis], min(8, index.nlist))
    for number in numbers[0].tolist():
        size = index.invlists.list_size(number)
        ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size) if size else np.empty(0, np.int64)
        offsets = np.flatnonzero(ids == row)
        if len(offsets):
            vector = np.empty(index.d, dtype=np.float32)
            index.reconstruct_from_offset(number, int(offsets[0]), faiss.swig_ptr(vector))
            return vector
    return None
