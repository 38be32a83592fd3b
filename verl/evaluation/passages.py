"""How well a context's documents match a question's gold passages, which are known by their titles.

Documents of one title count once, at the rank of the first. Ranks are the order in which the generator gets the
documents. nDCG and reciprocal rank are trec_eval's, through pytrec_eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytrec_eval

from verl.rewards.recall import title_key
from verl.types import Document, Question


@dataclass(frozen=True, slots=True)
class PassageMetrics:
    """All in [0, 1].

    Attributes:
        recall: share of the gold titles among the documents.
        precision: share of the documents' titles that are gold; 0 without documents.
        ndcg: normalised discounted cumulative gain over all documents.
        reciprocal_rank: of the first gold title.
    """

    recall: float
    precision: float
    ndcg: float
    reciprocal_rank: float


def passage_metrics(question: Question, documents: Sequence[Document]) -> PassageMetrics | None:
    """Return the metrics of one context; None if the question names no gold passages."""
    gold = {title_key(title) for title in question.gold_titles}
    if not gold:
        return None
    found = list(dict.fromkeys(title_key(document.title) for document in documents))
    if not found:
        return PassageMetrics(0.0, 0.0, 0.0, 0.0)
    evaluator = pytrec_eval.RelevanceEvaluator({"q": dict.fromkeys(gold, 1)}, {"ndcg", "recip_rank"})
    run = {title: float(len(found) - rank) for rank, title in enumerate(found)}
    measured = evaluator.evaluate({"q": run})["q"]
    hits = len(gold & set(found))
    return PassageMetrics(hits / len(gold), hits / len(found), measured["ndcg"], measured["recip_rank"])
