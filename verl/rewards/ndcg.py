"""DeepRetrieval's reward of one query by the order of what it finds: NDCG (family C).

What a turn is paid, with the parameters as they are:

| the policy's answer | released | corrected |
|---|---|---|
| tags missing, repeated or out of order | -2 | -2 |
| nothing between the answer tags, no JSON object, no `query` in it | -2 | -2 |
| a `query` that is blank, or no text | 0 | -2 |
| a query that finds nothing relevant among the first k | 0 | 0 |
| a query that finds something | 0.1 + NDCG@k | 0.1 + NDCG@k |

NDCG has a linear gain and the discount log2(rank + 1): DCG = sum of grade / log2(rank + 1), over that of the ideal
order (Järvelin and Kekäläinen 2002). `corrected`, the default, sorts the ideal by grade and lets a document that comes
again take no rank, so it stays within 0 and 1. `released` computes what the published code does: the ideal is in the
order of the judgements, and a repeated document counts each time, so it may exceed 1.

How deep k is goes by the question's source, as published: `eval_k` where the source names a test or validation split,
else the entry of `train_k` that the source begins with (the longest), else `k`. A question carries its judgements as
`answers`, the ids of the relevant documents, and where they differ, `extra["grades"]`, a JSON object of grades by id in
the order of the judgements, which may name irrelevant ones with grade 0. Without it every answer has grade 1.

One thing differs from the published code in both variants: a search that fails has no score (the published one pays
0), so the trajectory is failed and trains nobody.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from verl.errors import DataError
from verl.rewards.evidence import Evidence, failed
from verl.rewards.rank import Seen, Variant, distinct, look
from verl.types import Document, Question, RewardOutcome

GRADES = "grades"
"""Key of the graded judgements in `Question.extra`."""

TRAIN_K = {
    "scifact": 50,
    "fever": 1000,
    "nfcorpus": 1000,
    "fiqa": 1000,
    "msmarco_beir": 1000,
    "hotpotqa": 3000,
    "scifact_dense": 1000,
    "fever_dense": 1000,
    "nfcorpus_dense": 100,
    "hotpotqa_dense": 1000,
    "msmarco_beir_dense": 1000,
}
"""The published cutoffs of training, by what a source begins with; MS MARCO's domains are at 10 throughout."""

_EVALUATION = {"test", "val"}
_QUERY_FAULTS = ("blank", "not_text")


@dataclass(frozen=True, slots=True)
class Ndcg:
    """Family C. Parts: `ndcg`, and those of `verl.rewards.rank.Seen.parts`.

    Attributes:
        k: documents that count, from the first, where nothing below says otherwise.
        eval_k: the same for sources that name a test or validation split.
        train_k: the same by what a source begins with.
        well_formed: paid for a query that finds something, besides NDCG.
        malformed: paid in all for what cannot be read.
        miss: paid in all for a query that finds nothing relevant.
    """

    variant: Variant = "corrected"
    k: int = 10
    eval_k: int = 10
    train_k: Mapping[str, int] = field(default_factory=lambda: dict(TRAIN_K))
    well_formed: float = 0.1
    malformed: float = -2.0
    miss: float = 0.0

    def __post_init__(self) -> None:
        for name, value in {"k": self.k, "eval_k": self.eval_k, **self.train_k}.items():
            if value < 1:
                raise ValueError(f"{name}={value}; expected a cutoff of at least 1")
        paid = (self.well_formed, self.malformed, self.miss)
        if not all(map(math.isfinite, paid)):
            raise ValueError(f"the payments are {', '.join(map(str, paid))}; expected finite numbers")
        least = min(self.miss, self.well_formed)
        if self.variant == "corrected" and self.malformed >= least:
            raise ValueError(
                f"malformed={self.malformed} is not below {least}, what the worst query is paid; lower it, or set "
                "variant=released"
            )

    def validate(self, questions: Sequence[Question]) -> None:
        """Check that every question's judgements can be read.

        Raises:
            DataError: they cannot; says whose.
        """
        for question in questions:
            judged(question)

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        """Pay for the last turn; fails where it asked for no query, or got no result for it."""
        seen = look(evidence)
        if isinstance(seen, RewardOutcome):
            return seen
        question = evidence.question
        try:
            grades = judged(question)
        except DataError as cause:
            return failed(str(cause))
        reached = ndcg(grades, seen.documents, self.cutoff(question.source), self.variant)
        parts = {"ndcg": reached, **seen.parts(wrong=reached == 0)}
        return RewardOutcome(self._paid(seen, evidence.trajectory.turns[-1].fault, reached), parts)

    def cutoff(self, source: str) -> int:
        """Return how many documents count for a question of `source`."""
        if not _EVALUATION.isdisjoint(re.split(r"[^a-z0-9]+", source.lower())):
            return self.eval_k
        begun = [prefix for prefix in self.train_k if source.startswith(prefix)]
        return self.train_k[max(begun, key=len)] if begun else self.k

    def _paid(self, seen: Seen, fault: str, reached: float) -> float:
        if seen.form != "readable":
            searched = self.variant == "released" and fault in _QUERY_FAULTS
            return self.miss if searched else self.malformed
        return self.well_formed + reached if reached > 0 else self.miss


def judged(question: Question) -> dict[str, int]:
    """Return the question's judgements: grade by document, in their order.

    Raises:
        DataError: `extra["grades"]` is no JSON object of grades, none of them is above 0, or an answer has none.
    """
    stated = question.extra.get(GRADES)
    if stated is None:
        return dict.fromkeys(question.answers, 1)
    try:
        grades = json.loads(stated)
    except (ValueError, RecursionError):
        grades = None
    if not isinstance(grades, dict) or not all(type(grade) is int for grade in grades.values()):
        raise DataError(
            f"question {question.id!r}: extra.{GRADES}={stated[:80]!a}; expected a JSON object of whole grades by "
            "document id"
        )
    if not any(grade > 0 for grade in grades.values()) or not grades.keys() >= set(question.answers):
        raise DataError(
            f"question {question.id!r}: extra.{GRADES} grades {len(grades)} documents; expected one above 0, and a "
            "grade for each of the answers"
        )
    return grades


def ndcg(grades: Mapping[str, int], documents: Sequence[Document], k: int, variant: Variant = "corrected") -> float:
    """Return NDCG@k with a linear gain; in [0, 1] if `corrected`, at least 0 if `released`."""
    gains = [max(grade, 0) for grade in grades.values()]
    if variant == "corrected":
        documents = distinct(documents)
        gains.sort(reverse=True)
    found = [max(grades.get(document.id, 0), 0) for document in documents[:k]]
    ideal = _dcg(gains[:k])
    return _dcg(found) / ideal if ideal > 0 else 0.0


def _dcg(gains: Sequence[int]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1) if gain)
