"""The best documents of a bag of terms: every entry of their posting lists is added up, in compiled code.

The scores are to the last bit those of adding up whole arrays term by term, as bm25s does. What takes its time there is
all that is not adding: arrays as long as the corpus are zeroed and partitioned for each query. Here one array stays; a
query notes the documents that it meets, and only those are compared and set back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit


class Postings:
    """The scores of an index, term by term. Not for several threads at once.

    Args:
        starts: (terms + 1,) integers, where the entries of a term begin.
        rows: (entries,) integers, documents that hold the term, each once.
        scores: (entries,) float32, what the term adds to their scores, positive.
        documents: number of documents.
    """

    def __init__(self, starts: np.ndarray, rows: np.ndarray, scores: np.ndarray, documents: int) -> None:
        # One signature for all indexes, so that compiling happens once; the mapped files have these types already.
        self._starts = np.asarray(starts, np.int64)
        self._rows, self._scores = np.asarray(rows, np.int32), np.asarray(scores, np.float32)
        self._totals = np.zeros(documents, np.float32)
        self._met = np.empty(documents, np.int32)
        self.best(range(min(1, len(starts) - 1)), 1)  # compiled, or loaded, before anybody waits for it

    def best(self, terms: Sequence[int], topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all documents whose score is at least that of the `topk`-th best one, or all that hold a term.

        Args:
            terms: one that stands here twice counts twice.
            topk: at least 1.

        Returns:
            Rows, (n,) int32, each once, and scores, (n,) float32 and positive: in one order, which is none in
            particular.
        """
        asked = np.array(terms, np.int64)
        return _best(self._starts, self._rows, self._scores, asked, topk, self._totals, self._met)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder to keep it in
        return njit(nogil=True)(function)


@_compiled
def _best(starts, rows, scores, terms, topk, totals, met):  # type: ignore[no-untyped-def]  # numba infers them
    count = 0
    for term in terms:
        for at in range(starts[term], starts[term + 1]):
            row = rows[at]
            if totals[row] == 0:
                met[count] = row
                count += 1
            totals[row] += scores[at]
    found = _at_least(totals, met[:count], _floor(totals, met[:count], topk))
    result = totals[found]
    for row in met[:count]:
        totals[row] = 0
    return found, result


@_compiled
def _floor(totals, met, topk):  # type: ignore[no-untyped-def]
    """Return the `topk`-th best score; 0 where there are fewer. The best so far are a heap, the worst of them first."""
    if len(met) < topk:
        return np.float32(0)
    heap = np.zeros(topk, np.float32)
    for row in met:
        score = totals[row]
        if score <= heap[0]:
            continue
        at = 0
        while True:
            child = 2 * at + 1
            if child >= topk:
                break
            if child + 1 < topk and heap[child + 1] < heap[child]:
                child += 1
            if heap[child] >= score:
                break
            heap[at] = heap[child]
            at = child
        heap[at] = score
    return heap[0]


@_compiled
def _at_least(totals, met, floor):  # type: ignore[no-untyped-def]
    kept = 0
    for row in met:
        kept += totals[row] >= floor
    found = np.empty(kept, np.int32)
    kept = 0
    for row in met:
        if totals[row] >= floor:
            found[kept] = row
            kept += 1
    return found
