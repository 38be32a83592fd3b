"""Rewards for how a trajectory was played; they look at neither documents nor answer and ask nobody."""

from __future__ import annotations

import math
from dataclasses import dataclass

from verl.rewards.evidence import Evidence
from verl.types import RewardOutcome


async def valid_format(evidence: Evidence) -> RewardOutcome:
    """Reward 1 for a trajectory that finished by itself and held no invalid turn."""
    value = float(evidence.trajectory.valid)
    return RewardOutcome(value, {"valid_format": value})


async def invalid_turns(evidence: Evidence) -> RewardOutcome:
    """Charge 1 for each turn without an action; the part `invalid_turns` is their number."""
    count = sum(turn.invalid for turn in evidence.trajectory.turns)
    return RewardOutcome(-float(count), {"invalid_turns": float(count)})


@dataclass(frozen=True, slots=True)
class SearchCost:
    """Charge `cost` for each search that was answered, but for the first `free` ones; part: searches."""

    cost: float = 1.0
    free: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and self.cost >= 0):
            raise ValueError(f"cost={self.cost}; expected a finite number, 0 or more (it is subtracted)")
        if self.free < 0:
            raise ValueError(f"free={self.free}; expected 0 or more searches")

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        searches = evidence.trajectory.searches
        return RewardOutcome(-self.cost * max(searches - self.free, 0), {"searches": float(searches)})
