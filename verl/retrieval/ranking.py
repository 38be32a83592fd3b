"""The one order of results: by score, and by document id where scores are equal."""

from __future__ import annotations

import numpy as np

from verl.retrieval.corpus import Corpus
from verl.types import SearchResult


def best_first(corpus: Corpus, query: str, rows: np.ndarray, scores: np.ndarray, topk: int) -> SearchResult:
    """Return the `topk` best of some candidates; equal scores in the order of the documents' ids, compared as strings.

    The result is the whole corpus's only if the candidates hold every document whose score is at least that of the
    `topk`-th best one.

    Args:
        rows: (candidates,) int64, rows of `corpus`, each once.
        scores: (candidates,) float32
    """
    order = np.argsort(-scores, kind="stable")
    rows, scores = rows[order], scores[order]
    if len(rows) > topk:
        kept = int(np.searchsorted(-scores, -scores[topk - 1], side="right"))
        rows, scores = rows[:kept], scores[:kept]
    if len(rows) > 1 and np.any(scores[1:] == scores[:-1]):
        ids = corpus.ids(rows)
        order = np.array(sorted(range(len(rows)), key=lambda at: (-scores[at], ids[at])))
        rows, scores = rows[order], scores[order]
    documents = tuple(corpus.rows(rows[:topk]))
    return SearchResult(query, documents, tuple(float(score) for score in scores[:topk]))
