"""DeepRetrieval's rewards of one query: recall of the targets (family A), and the rank of the first hit (family B).

What a turn is paid, with the parameters as they are:

| the policy's answer | released | corrected |
|---|---|---|
| tags missing, repeated or out of order | -4 | -4 |
| nothing between the answer tags | +1 | -4 |
| no JSON object, no text under the key, a blank query | -3 | -4 |
| a query that finds nothing, or too little | -2.5 | -2.5 |
| a query that finds something | 1 + its tier | 1 + its tier |

| recall of at least | tier | rank of the first hit up to | tier |
|---|---|---|---|
| 0.7 | 5 | 5 | 5 |
| 0.5 | 4 | 20 | 4 |
| 0.4 | 3 | 50 | 2 |
| 0.3 | 1 | 100 | 1 |
| 0.1 | 0.5 | 1,000 | 0.5 |
| 0.05 | 0.1 | 3,000 | 0.1 |

`released` pays what the published code pays, which rewards an empty answer above a query that misses. `corrected`, the
default, pays least for what cannot be read: format is judged on tags and JSON. `grading: continuous` (recall only)
pays -2.5 for a recall of 0, 6 for a recall of 1, and what lies on the line between them for any other. Nothing pays
for the length of anything. The variants without reasoning are paid alike; which tags have to be there is the grammar's
business. SQuAD's published reward is `first_hit_rank` with `miss: -2.5` and `unreadable: -3.0`.

One thing differs from the published code in both variants: a search that fails has no score there either way (the
published one pays -3), so the trajectory is failed and trains nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from verl.rewards.evidence import Evidence, failed
from verl.rewards.text import tokens
from verl.types import Document, Question, RewardOutcome, Turn

Variant = Literal["corrected", "released"]
Grading = Literal["tiers", "continuous"]
Form = Literal["readable", "unreadable", "empty", "tags"]
"""How an answer reads: a query; tags without one; tags around nothing; wrong tags."""

_HITS = (1, 5, 10, 20, 50, 100, 1000, 3000)


@dataclass(frozen=True, slots=True)
class Grade:
    """What a query's documents are worth; `tier` is None where they are not worth any.

    Attributes:
        wrong: the documents reach no tier; with graded payments they are paid all the same.
    """

    tier: float | None
    parts: Mapping[str, float]
    wrong: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """How a trajectory's last turn reads, and what its query found; nothing where there is none."""

    form: Form
    documents: tuple[Document, ...] = ()

    def parts(self, wrong: bool) -> dict[str, float]:
        """Return what every reward of a query reports: whether tags and JSON are right, and what went wrong."""
        readable = self.form == "readable"
        return {
            "format": float(readable),
            "tags": float(self.form != "tags"),
            "format_error_ratio": float(not readable),
            "wrong_answer_ratio": float(readable and wrong),
        }


@dataclass(frozen=True, slots=True)
class QueryReward(ABC):
    """What both rewards have in common. Parts, each 0 or 1: those of `Seen.parts`.

    Attributes:
        topk: documents that count, from the first.
        well_formed: paid for right tags, besides what the answer is paid.
        malformed: paid in all for wrong tags; corrected, for everything that cannot be read.
        miss: paid besides for a query that is in no tier.
        unreadable: paid besides for right tags without a query, in the variant `released` alone.
    """

    variant: Variant = "corrected"
    topk: int = 3000
    well_formed: float = 1.0
    malformed: float = -4.0
    miss: float = -3.5
    unreadable: float = -4.0

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise ValueError(f"topk={self.topk}; expected at least 1")
        paid = (self.well_formed, self.malformed, self.miss, self.unreadable, *self._tier_pays())
        if not all(map(math.isfinite, paid)):
            raise ValueError(f"the payments are {', '.join(map(str, paid))}; expected finite numbers")
        least = self.well_formed + min(self.miss, *self._tier_pays())
        if self.variant == "corrected" and self.malformed >= least:
            raise ValueError(
                f"malformed={self.malformed} is not below {least}, what the worst query is paid; lower it, or set "
                "variant=released"
            )

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        """Pay for the last turn; fails where it asked for no query, or got no result for it."""
        seen = look(evidence)
        if isinstance(seen, RewardOutcome):
            return seen
        grade = await self.grade(evidence.question, seen.documents[: self.topk])
        return RewardOutcome(self._paid(seen.form, grade.tier), {**grade.parts, **seen.parts(grade.wrong)})

    @abstractmethod
    async def grade(self, question: Question, documents: Sequence[Document]) -> Grade:
        """Judge what a query found."""

    @abstractmethod
    def _tier_pays(self) -> tuple[float, ...]:
        """Return what the tiers pay."""

    def _paid(self, form: Form, tier: float | None) -> float:
        if form == "readable":
            return self.well_formed + (self.miss if tier is None else tier)
        if form == "tags" or self.variant == "corrected":
            return self.malformed
        return self.well_formed if form == "empty" else self.well_formed + self.unreadable


@dataclass(frozen=True, slots=True)
class RetrievalRecall(QueryReward):
    """Family A: recall of the target ids (`question.answers`) among the documents' ids, each target counted once.

    Parts besides: `recall`, and for each tier, for example `70_recall_ratio`, whether the recall reaches it.

    Attributes:
        tiers: pairs of a recall and what it and more is paid, from the highest.
        grading: `continuous` pays in proportion to recall instead of by tier.
    """

    tiers: tuple[tuple[float, float], ...] = ((0.7, 5.0), (0.5, 4.0), (0.4, 3.0), (0.3, 1.0), (0.1, 0.5), (0.05, 0.1))
    grading: Grading = "tiers"

    def __post_init__(self) -> None:
        bounds = [bound for bound, _ in self.tiers]
        if not bounds or not all(0 < bound <= 1 for bound in bounds) or not _descend(bounds):
            raise ValueError(f"tiers start at the recalls {bounds}; expected ones above 0 up to 1, from the highest")
        QueryReward.__post_init__(self)

    async def grade(self, question: Question, documents: Sequence[Document]) -> Grade:
        """Judge by recall."""
        recall = id_recall(question.answers, documents)
        parts = {f"{100 * bound:g}_recall_ratio": float(recall >= bound) for bound, _ in self.tiers}
        parts["recall"] = recall
        if self.grading == "continuous":
            return Grade(self.miss + (self.tiers[0][1] - self.miss) * recall, parts, recall < self.tiers[-1][0])
        tier = next((paid for bound, paid in self.tiers if recall >= bound), None)
        return Grade(tier, parts, tier is None)

    def _tier_pays(self) -> tuple[float, ...]:
        return tuple(paid for _, paid in self.tiers)


@dataclass(frozen=True, slots=True)
class FirstHitRank(QueryReward):
    """Family B: the rank of the first document whose text holds an answer (DPR's `has_answer`), from 1.

    In the variant `corrected` a document that comes again takes no rank. Parts besides: `hit@k` for several k, and
    `rank`, only where there is a hit.

    Attributes:
        tiers: pairs of a rank and what it and better ones are paid, from the best.
    """

    tiers: tuple[tuple[int, float], ...] = ((5, 5.0), (20, 4.0), (50, 2.0), (100, 1.0), (1000, 0.5), (3000, 0.1))

    def __post_init__(self) -> None:
        bounds = [bound for bound, _ in self.tiers]
        if not bounds or bounds[0] < 1 or not _descend(bounds[::-1]):
            raise ValueError(f"tiers end at the ranks {bounds}; expected ones from 1, from the best")
        QueryReward.__post_init__(self)

    async def grade(self, question: Question, documents: Sequence[Document]) -> Grade:
        """Judge by rank."""
        if self.variant == "corrected":
            documents = distinct(documents)
        # 3,000 texts take long enough to keep other trajectories waiting.
        rank = await asyncio.to_thread(first_hit, question.answers, documents)
        parts = {f"hit@{k}": float(rank is not None and rank <= k) for k in _HITS if k <= self.topk}
        if rank is None:
            return Grade(None, parts, wrong=True)
        parts["rank"] = float(rank)
        tier = next((paid for bound, paid in self.tiers if rank <= bound), None)
        return Grade(tier, parts, tier is None)

    def _tier_pays(self) -> tuple[float, ...]:
        return tuple(paid for _, paid in self.tiers)


def look(evidence: Evidence) -> Seen | RewardOutcome:
    """Read the last turn; a failed outcome where it asked for no query, or got no result for it."""
    turns = evidence.trajectory.turns
    if not turns:
        return failed("the policy had no turn; its prompt may be too long")
    form = form_of(turns[-1])
    if form != "readable":
        return Seen(form)
    if turns[-1].result is None:
        return failed("the last turn has no search result; this reward is for a protocol that ends with a query")
    return Seen(form, turns[-1].result.documents)


def form_of(turn: Turn) -> Form:
    """Say how a turn's answer reads, from what its grammar noted; a note on a tag begins with it."""
    if not turn.invalid:
        return "readable"
    if not turn.note or turn.note.startswith("<"):
        return "tags"
    inner = turn.text.partition("</answer>")[0].rpartition("<answer>")[2]  # the first tag may be in the prompt
    return "unreadable" if inner.strip() else "empty"


def id_recall(targets: Sequence[str], documents: Sequence[Document]) -> float:
    """Return the share of the distinct target ids that are a document's id; in [0, 1]."""
    wanted = {target.strip() for target in targets}
    return len(wanted & {document.id for document in documents}) / len(wanted)


def first_hit(answers: Sequence[str], documents: Sequence[Document]) -> int | None:
    """Return the rank, from 1, of the first document whose text holds an answer; None if none does.

    Holding is `verl.rewards.text.has_answer`, spelled for many texts: no token has a space in it.
    """
    wanted = [_spaced(tokens(answer)) for answer in answers if tokens(answer)]
    for rank, document in enumerate(documents, start=1):
        text = _spaced(tokens(document.text))
        if any(answer in text for answer in wanted):
            return rank
    return None


def distinct(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Return the documents in order, every id at its first place."""
    first: dict[str, Document] = {}
    for document in documents:
        first.setdefault(document.id, document)
    return tuple(first.values())


def _spaced(words: Sequence[str]) -> str:
    return f" {' '.join(words)} "


def _descend(bounds: Sequence[float]) -> bool:
    return all(higher > lower for higher, lower in itertools.pairwise(bounds))
