"""The best documents of a bag of terms, without reading all of the long posting lists.

A frequent word is in most lists of a query's entries and in few of its points. So the lists are added up from the
shortest on, and as soon as the `topk`-th best sum so far exceeds all that the lists left could add, no document outside
the ones met can be a result any more: the rest is looked up for those documents alone, and fewer of them at each list
(MaxScore: Turtle and Flood 1995, "Query evaluation: strategies and optimizations"). Which documents that leaves is
decided with room for rounding; their scores are then added up anew in the order of the query, so they are to the last
bit those of adding up every list. In a small corpus every list is short, and all are added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDING = 2.0**-22
"""Relative error of a sum of float32 by each of its terms, with room to spare."""
_FEW_DOCUMENTS = 8192
_LOOKUP_COST = 8
"""Looking a document up in a list takes as long as adding up so many entries of it."""


@dataclass(frozen=True, slots=True)
class _List:
    """The entries of one term of a query.

    Attributes:
        rows: (entries,) int32, rising.
        scores: (entries,) float32, positive.
        times: how often the query holds the term.
        most: what the term can add to a document's score.
    """

    rows: np.ndarray
    scores: np.ndarray
    times: int
    most: float

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the scores of some documents, 0 where the list has none; (n,) float32."""
        if not len(self.rows):
            return np.zeros(len(rows), np.float32)
        at = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows.take(at) == rows, self.scores.take(at), np.float32(0))


class Postings:
    """The scores of an index, term by term. Not for several threads at once.

    Args:
        starts: (terms + 1,) int64, where the entries of a term begin.
        rows: (entries,) int32, documents that hold the term, rising.
        scores: (entries,) float32, what the term adds to their scores, positive.
        documents: number of documents.
    """

    def __init__(self, starts: np.ndarray, rows: np.ndarray, scores: np.ndarray, documents: int) -> None:
        self._starts, self._rows, self._scores = starts, rows, scores
        self._highest = np.full(len(starts) - 1, np.nan, np.float32)  # found when a term is first asked for
        self._totals = np.zeros(documents, np.float32)

    def best(self, terms: Sequence[int], topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all documents whose score is at least that of the `topk`-th best one, or all that hold a term.

        Args:
            terms: at least one; a term that stands here twice counts twice.

        Returns:
            Rows, each once, and scores, (n,) float32 and positive: in one order, which is none in particular.
        """
        if len(self._totals) <= _FEW_DOCUMENTS:
            return self._best_of_few(terms, topk)
        by_term = {term: self._list(term, times) for term, times in Counter(terms).items()}
        lists = sorted(by_term.values(), key=lambda entries: len(entries.rows))
        rows = self._likely(lists, topk, 1 - _ROUNDING * (len(terms) + 1))
        scores = np.zeros(len(rows), np.float32)
        for term in terms:
            scores += by_term[term].of(rows)
        kept = candidates(scores, topk)
        return rows[kept], scores[kept]

    def _best_of_few(self, terms: Sequence[int], topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Add up every list and look at every document: the fewest calls, where those are what takes time."""
        totals = np.zeros(len(self._totals), np.float32)
        for term in terms:
            span = slice(self._starts[term], self._starts[term + 1])
            totals[self._rows[span]] += self._scores[span]
        rows = candidates(totals, topk)
        return rows, totals[rows]

    def _list(self, term: int, times: int) -> _List:
        span = slice(self._starts[term], self._starts[term + 1])
        scores = self._scores[span]
        if np.isnan(self._highest[term]):
            self._highest[term] = scores.max(initial=0)
        return _List(self._rows[span], scores, times, times * float(self._highest[term]))

    def _likely(self, lists: Sequence[_List], topk: int, slack: float) -> np.ndarray:
        """Return the rows of all documents that may be among the results, each once."""
        totals, found, met = self._totals, [], 0
        left = np.cumsum([entries.most for entries in reversed(lists)])[::-1].tolist()  # in this list and those after
        try:
            for number, entries in enumerate(lists):
                # To look through what was met pays only before a longer list, and if it can hold a sum that is enough.
                if topk <= met < len(entries.rows) and left[number] < left[0] - left[number]:
                    rows = np.concatenate(found)
                    likely = self._narrow(rows, totals.take(rows), lists, number, left, topk, slack)
                    if likely is not None:
                        return likely
                before = totals.take(entries.rows)
                found.append(entries.rows[before == 0])
                totals[entries.rows] = before + entries.scores * np.float32(entries.times)
                met += len(found[-1])
            rows = np.concatenate(found)
            sums = totals.take(rows)
            return rows[sums >= slack * _floor(sums, topk)]
        finally:
            for rows in found:
                totals[rows] = 0

    def _narrow(
        self,
        rows: np.ndarray,
        sums: np.ndarray,
        lists: Sequence[_List],
        number: int,
        left: Sequence[float],
        topk: int,
        slack: float,
    ) -> np.ndarray | None:
        """Return the documents among those met, with their sums so far, that may be results; None to add up on.

        Args:
            number: the first list that is not in the sums.
            left: what this list and the ones after it can add, by number.
        """
        floor = slack * _floor(sums, topk)
        if left[number] >= floor:
            return None  # a document that was not met may still be among the best
        kept = sums + left[number] >= floor
        rest = sum(len(entries.rows) for entries in lists[number:])
        if _LOOKUP_COST * np.count_nonzero(kept) * (len(lists) - number) > rest:
            return None
        rows, sums = rows[kept], sums[kept]
        for entries, later in zip(lists[number:], [*left[number + 1 :], 0.0], strict=True):
            sums = sums + entries.of(rows) * np.float32(entries.times)
            kept = sums + later >= slack * _floor(sums, topk)
            rows, sums = rows[kept], sums[kept]
        return rows


def candidates(scores: np.ndarray, topk: int) -> np.ndarray:
    """Return the positions of the positive scores of at least the `topk`-th best one, rising.

    Args:
        scores: (documents,) float32, none negative.

    Returns:
        (at least topk, if so many are positive,) int64
    """
    floor = _floor(scores, topk)
    return np.flatnonzero(scores >= floor) if floor > 0 else np.flatnonzero(scores > 0)


def _floor(scores: np.ndarray, topk: int) -> float:
    """Return the `topk`-th best score, 0 where there are fewer."""
    return float(np.partition(scores, -topk)[-topk]) if topk <= len(scores) else 0.0
