"""Watches a run for what must not go on silently: failing services and broken updates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from verl.errors import SearchAgentError
from verl.types import RewardOutcome, Trajectory

logger = logging.getLogger(__name__)


class RunStopped(SearchAgentError):
    """The run cannot go on; the message says why and what to do. The last checkpoint is whole."""


@dataclass(frozen=True)
class SentinelConfig:
    """Limits.

    Attributes:
        max_failed_share: largest share of a step's trajectories that may have failed (retriever, generator, engine).
        max_skipped_updates: most updates in a row that may be skipped because a loss or gradient was not finite.
    """

    max_failed_share: float = 0.2
    max_skipped_updates: int = 3


class Sentinel:
    """Counts failures and stops the run when they pass the limits."""

    def __init__(self, config: SentinelConfig) -> None:
        self._config = config
        self._skipped_in_a_row = 0

    def check_rollouts(self, samples: Sequence[tuple[Trajectory, RewardOutcome]]) -> None:
        """Raise RunStopped when too many of a step's trajectories failed, naming the commonest cause."""
        causes = Counter(outcome.failed for _, outcome in samples if outcome.failed)
        failed = causes.total()
        if failed <= self._config.max_failed_share * len(samples):
            if failed:
                logger.warning("%d of %d trajectories failed: %s", failed, len(samples), causes.most_common(1)[0][0])
            return
        cause, count = causes.most_common(1)[0]
        raise RunStopped(
            f"{failed} of {len(samples)} trajectories failed, more than trainer.sentinel.max_failed_share="
            f"{self._config.max_failed_share}; commonest cause ({count}x): {cause}. Mend the service, then resume from "
            "the last checkpoint with trainer.resume=auto"
        )

    def check_updates(self, skipped: int, applied: int) -> None:
        """Raise RunStopped after too many skipped updates in a row (`applied` > 0 ends a row)."""
        self._skipped_in_a_row = self._skipped_in_a_row + skipped if applied == 0 else 0
        if self._skipped_in_a_row > self._config.max_skipped_updates:
            raise RunStopped(
                f"{self._skipped_in_a_row} updates in a row had a NaN or infinite loss or gradient and were skipped; "
                "lower the learning rate or resume from an earlier checkpoint"
            )
