"""The best documents of a bag of terms, without reading all of the long posting lists, in compiled code.

A frequent word is in most lists of a query's entries and in few of its points. So the lists are added up from the
shortest on, and as soon as the `topk`-th best sum so far exceeds all that the lists left could add, no document outside
the ones met can be a result any more: the rest is looked up for those documents alone, and fewer of them at each list
(MaxScore: Turtle and Flood 1995, "Query evaluation: strategies and optimizations"). Which documents that leaves is
decided with room for rounding; their scores are then added up anew in the order of the query, so they are to the last
bit those of adding up whole arrays term by term, as bm25s does. Where so many documents are asked for that looking them
up would take longer, every list is added up.

One array as long as the corpus stays from query to query; each notes the documents that it meets and sets those back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit

_LOOKUP_COST = 32
"""Looking a document up in a long list takes about as long as adding up so many entries of it."""
_ROUNDING = 2.0**-22
"""Relative error of a sum of float32 by each of its terms, with room to spare."""


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
        self._rows, self._scores = np.asarray(rows, np.int32), np.asarray(scores, np.float32)
        self._highest = np.full(len(starts) - 1, np.nan, np.float32)  # found when a term is first asked for
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
        lists = (self._starts, self._rows, self._scores)
        return _best(lists, self._highest, np.array(terms, np.int64), topk, self._totals, self._met)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder to keep it in
        return njit(nogil=True)(function)


@_compiled
def _floor(totals, met, topk):  # numba infers the types, here and below
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
def _at_least(totals, met, floor):
    """Return the documents among `met` whose score is `floor` or more."""
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


@_compiled
def _add(lists, term, totals, met, count):
    """Add a term's list to the totals; return how many documents were met by now."""
    starts, rows, scores = lists
    for at in range(starts[term], starts[term + 1]):
        row = rows[at]
        if totals[row] == 0:
            met[count] = row
            count += 1
        totals[row] += scores[at]
    return count


@_compiled
def _entry(lists, term, row):
    """Return what a term adds to a document, 0 where the document does not hold it."""
    starts, rows, scores = lists
    low, high = starts[term], starts[term + 1]
    while low < high:
        middle = (low + high) >> 1
        if rows[middle] < row:
            low = middle + 1
        else:
            high = middle
    return scores[low] if low < starts[term + 1] and rows[low] == row else np.float32(0)


@_compiled
def _shortest_first(starts, terms):
    ordered = terms.copy()
    for number in range(1, len(ordered)):
        term, at = ordered[number], number
        length = starts[term + 1] - starts[term]
        while at and starts[ordered[at - 1] + 1] - starts[ordered[at - 1]] > length:
            ordered[at] = ordered[at - 1]
            at -= 1
        ordered[at] = term
    return ordered


@_compiled
def _most_left(lists, highest, terms):
    """Return what each term and those after it can add to a score at most, (terms + 1,) float64."""
    starts, _, scores = lists
    left = np.zeros(len(terms) + 1)
    for number in range(len(terms) - 1, -1, -1):
        term = terms[number]
        if np.isnan(highest[term]):
            best = np.float32(0)
            for at in range(starts[term], starts[term + 1]):
                best = max(best, scores[at])
            highest[term] = best
        left[number] = left[number + 1] + highest[term]
    return left


@_compiled
def _likely(lists, highest, terms, topk, totals, met):
    """Return the documents that may be among the `topk` best, each once, and how many were met on the way."""
    starts, count, slack = lists[0], 0, 1 - _ROUNDING * (len(terms) + 1)
    terms = _shortest_first(starts, terms)
    left = _most_left(lists, highest, terms)
    rest = 0
    for term in terms:
        rest += starts[term + 1] - starts[term]
    for number, term in enumerate(terms):
        length = starts[term + 1] - starts[term]
        # To look through what was met pays only before a longer list, and if it can hold a sum that is enough.
        if topk <= count < length and left[number] < left[0] - left[number]:
            floor = slack * _floor(totals, met[:count], topk)
            if left[number] < floor:
                found = _at_least(totals, met[:count], floor - left[number])
                if _LOOKUP_COST * len(found) * (len(terms) - number) <= rest:
                    return _narrowed(lists, terms[number:], left[number:], topk, slack, totals, found), count
        count = _add(lists, term, totals, met, count)
        rest -= length
    return _at_least(totals, met[:count], slack * _floor(totals, met[:count], topk)), count


@_compiled
def _narrowed(lists, terms, left, topk, slack, totals, found):
    """Return those of `found` that may be among the best once `terms` are added up too, looked up for them alone."""
    for number, term in enumerate(terms):
        for row in found:
            totals[row] += _entry(lists, term, row)
        found = _at_least(totals, found, slack * _floor(totals, found, topk) - left[number + 1])
    return found


@_compiled
def _best(lists, highest, terms, topk, totals, met):
    starts, entries, count = lists[0], 0, 0
    for term in terms:
        entries += starts[term + 1] - starts[term]
    if _LOOKUP_COST * topk * len(terms) < entries:
        found, count = _likely(lists, highest, terms, topk, totals, met)
        result = np.zeros(len(found), np.float32)
        for number, row in enumerate(found):
            for term in terms:
                result[number] += _entry(lists, term, row)
        places = np.arange(len(found), dtype=np.int32)
        kept = _at_least(result, places, _floor(result, places, topk))
        found, result = found[kept], result[kept]
    else:
        for term in terms:
            count = _add(lists, term, totals, met, count)
        found = _at_least(totals, met[:count], _floor(totals, met[:count], topk))
        result = totals[found]
    for row in met[:count]:
        totals[row] = 0
    return found, result
