"""Gain Beyond RAG (GBR): what the searcher's documents add to the frozen generator's accuracy over naive RAG.

Two variants circulate. The s3 paper defines the gain `Acc - Acc_RAG`; the released training code adds the accuracy
itself once more, `2 * Acc - Acc_RAG`. Both are here, the configuration states which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from verl.errors import DataError
from verl.rewards.evidence import Evidence, failed
from verl.types import Question, RewardOutcome

GainVariant = Literal["paper", "released"]
_ACCURACY_WEIGHT: dict[str, float] = {"paper": 1.0, "released": 2.0}


def gain(accuracy: float, baseline_accuracy: float, variant: GainVariant) -> float:
    """Return the reward `w * accuracy - baseline_accuracy` with w = 1 (paper) or 2 (released code)."""
    return _ACCURACY_WEIGHT[variant] * accuracy - baseline_accuracy


@dataclass(frozen=True, slots=True)
class Gain:
    """GBR as a reward; parts: accuracy, baseline_accuracy and gain (their difference, in both variants)."""

    variant: GainVariant

    def validate(self, questions: Sequence[Question]) -> None:
        """Check that every question has its naive-RAG baseline.

        Raises:
            DataError: some have none.
        """
        missing = [question.id for question in questions if question.baseline is None]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(questions)} questions have no naive-RAG baseline, first {missing[0]!r}; "
                "expected one for each, precompute the baseline column or choose a reward without it"
            )

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        baseline = evidence.question.baseline
        if baseline is None:
            return failed(f"question {evidence.question.id!r} has no naive-RAG baseline; precompute it")
        verdict = await evidence.verdict()
        accuracy, before = float(verdict.correct), float(baseline.correct)
        parts = {"accuracy": accuracy, "baseline_accuracy": before, "gain": accuracy - before}
        return RewardOutcome(gain(accuracy, before, self.variant), parts)
