"""The one order of results: by score, and by document id where scores are equal."""

from __future__ import annotations

from itertools import pairwise

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
    found = list(zip(scores[order].tolist(), rows[order].tolist(), strict=True))  # few: lists are faster than arrays
    kept = topk
    while kept < len(found) and found[kept][0] == found[topk - 1][0]:
        kept += 1
    del found[kept:]
    if any(score == next_score for (score, _), (next_score, _) in pairwise(found)):
        ids = corpus.ids([row for _, row in found])
        found = [pair for _, pair in sorted(zip(ids, found, strict=True), key=lambda item: (-item[1][0], item[0]))]
    documents = tuple(corpus.rows([row for _, row in found[:topk]]))
    return SearchResult(query, documents, tuple(score for score, _ in found[:topk]))
