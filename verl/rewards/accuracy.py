"""Rewards that read the frozen generator's answer alone: no baseline, no other context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from verl.rewards.evidence import Evidence
from verl.rewards.text import exact_match, f1, sub_span_match
from verl.types import RewardOutcome


async def generation_accuracy(evidence: Evidence) -> RewardOutcome:
    """Reward 1 for an accurate answer (span match, else the judge)."""
    verdict = await evidence.verdict()
    return RewardOutcome(float(verdict.correct), {"accuracy": float(verdict.correct)})


async def em(evidence: Evidence) -> RewardOutcome:
    """Reward 1 for an answer that equals a gold."""
    return await _compared(evidence, "em", lambda answer, golds: float(exact_match(answer, golds)))


async def sub_span(evidence: Evidence) -> RewardOutcome:
    """Reward 1 for an answer that holds a gold as a substring."""
    return await _compared(evidence, "sub_span", lambda answer, golds: float(sub_span_match(answer, golds)))


async def token_f1(evidence: Evidence) -> RewardOutcome:
    """Reward the F1 of the answer with the best gold."""
    return await _compared(evidence, "f1", f1)


async def _compared(evidence: Evidence, name: str, compare: Callable[[str, Sequence[str]], float]) -> RewardOutcome:
    value = compare((await evidence.verdict()).answer, evidence.question.answers)
    return RewardOutcome(value, {name: value})
