"""The best documents of a bag of terms, in compiled code that adds up all of their posting lists.

The documents are taken a window at a time, small enough for its sums to stay in the cache: the lists are added up in
the order of the query, so that every score is to the last bit what adding up whole arrays gives, as bm25s does; then
the sums that could still be among the best are picked out. Adding up is a few instructions an entry, all of them in a
row. Skipping through long lists instead (MaxScore; Turtle and Flood 1995) was measured too: it reads fewer entries, but
looks documents up one by one, almost as many as could be among the best by their rare words. With queries of eight
words over 100,000 passages it took two and a half times as long, with six rarer words over 1 M as long as this.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numba import uint64

from verl.retrieval.compiled import compiled

_WINDOW = 32_768
"""Documents of a window, a power of two."""
_CHUNK = 64
"""Sums that are compared with the floor at once; a window is a whole number of chunks."""
_SPARSE = 8
"""In a window with so many times more documents than entries, only the sums of the entries are looked at."""
_comparing = partial(compiled, fastmath={"nnan", "nsz"})
"""Lets the compiler compare several numbers at once, as long as all of them are numbers."""


class Postings:
    """The scores of an index, term by term. Not for several threads at once.

    Args:
        starts: (terms + 1,) integers, where the entries of a term begin.
        rows: (entries,) integers, documents that hold the term, rising.
        scores: (entries,) float32, what the term adds to their scores, positive.
        documents: number of documents.
    """

    def __init__(self, starts: np.ndarray, rows: np.ndarray, scores: np.ndarray, documents: int) -> None:
        # One signature for all indexes, so that compiling happens once; the mapped files have these types already.
        self._starts = np.asarray(starts, np.int64)
        self._lists = np.asarray(rows, np.int32), np.asarray(scores, np.float32)
        self._documents = documents
        self._sums = np.zeros(_WINDOW, np.float32)
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
        spans = np.stack((self._starts[asked], self._starts[asked + 1]), axis=1)
        return _best(*self._lists, spans, topk, self._documents, self._sums)


@compiled
def _best(rows, scores, spans, topk, documents, sums):  # numba infers the types, here and below
    """Return rows and scores of the best; `spans`, (terms, 2), is where the lists begin and end in `rows`."""
    heap = np.zeros(topk, np.float32)
    found, size = (np.empty(2 * topk + _WINDOW, np.int32), np.empty(2 * topk + _WINDOW, np.float32)), 0
    here = np.empty_like(spans)
    for first in range(0, documents, _WINDOW):
        stop = min(first + _WINDOW, documents)
        entries = 0
        for number in range(len(spans)):
            start, end = spans[number]
            to = _position(rows, start, min(end, start + _WINDOW), stop)
            _add(rows[start:to], scores[start:to], first, sums)
            here[number, 0], here[number, 1] = start, to
            spans[number, 0] = to
            entries += to - start
        if size + stop - first > len(found[0]):  # most of them have been overtaken meanwhile
            size = _keep(found, size, heap[0])
            found = _with_room(found, size)
        if entries * _SPARSE < stop - first:
            for number in range(len(here)):
                part = rows[here[number, 0] : here[number, 1]]
                size = _pick_entries(part, first, sums, heap, found, size)
        else:
            size = _pick_all(sums[: stop - first], first, heap, found, size)
            sums[: stop - first] = 0
    size = _keep(found, size, heap[0])
    return found[0][:size].copy(), found[1][:size].copy()


@compiled
def _position(rows, low, high, row):
    """Return the first place from `low` on whose document is not before `row`, `high` if there is none."""
    while low < high:
        middle = (low + high) >> 1
        if rows[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _add(rows, scores, first, sums):
    """Add entries to the sums of their documents."""
    for at in range(len(rows)):
        sums[_place(rows[at], first)] += scores[at]


@compiled
def _place(row, first):
    """Return where a document's sum stands: nowhere else, not even for the entries of a damaged file.

    Without a sign, because the compiler has a negative index counted from the end, which takes as long as the rest.
    """
    return uint64(row - first) & uint64(_WINDOW - 1)


@_comparing
def _highest(sums):
    highest = np.float32(0)
    for value in sums:
        highest = max(highest, value)
    return highest


@compiled
def _pick_all(sums, first, heap, found, size):
    """Note the documents of a window that may be among the best; return how many are noted by now."""
    for start in range(0, len(sums), _CHUNK):
        chunk = sums[start : start + _CHUNK]
        highest = _highest(chunk)
        if highest > 0 and highest >= heap[0]:
            for at in range(len(chunk)):
                if chunk[at] > 0 and chunk[at] >= heap[0]:
                    size = _note(first + start + at, chunk[at], heap, found, size)
    return size


@compiled
def _pick_entries(rows, first, sums, heap, found, size):
    """Do the same for the documents of one list, and set their sums back, so that each is met once."""
    for row in rows:
        place = _place(row, first)
        score = sums[place]
        if score > 0 and score >= heap[0]:
            size = _note(row, score, heap, found, size)
        sums[place] = 0
    return size


@compiled
def _note(row, score, heap, found, size):
    """Note a document, and its score in the heap of the best scores, the worst of them first."""
    found[0][size], found[1][size] = row, score
    at, count = 0, len(heap)
    while score > heap[0]:
        child = 2 * at + 1
        if child + 1 < count and heap[child + 1] < heap[child]:
            child += 1
        if child >= count or heap[child] >= score:
            heap[at] = score
            break
        heap[at] = heap[child]
        at = child
    return size + 1


@compiled
def _keep(found, size, floor):
    """Move the documents whose score is at least `floor` to the front; return how many there are."""
    kept = 0
    for at in range(size):
        if found[1][at] >= floor:
            found[0][kept], found[1][kept] = found[0][at], found[1][at]
            kept += 1
    return kept


@compiled
def _with_room(found, size):
    """Return what was noted, with room for one more window at least."""
    if size + _WINDOW <= len(found[0]):
        return found
    rows, scores = np.empty(2 * (size + _WINDOW), np.int32), np.empty(2 * (size + _WINDOW), np.float32)
    rows[:size], scores[:size] = found[0][:size], found[1][:size]
    return rows, scores
