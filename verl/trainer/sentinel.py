"""Watches a run for what must not go on silently: failing services and broken updates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verl.errors import SearchAgentError
from verl.types import RewardOutcome

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

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share={self.max_failed_share}; expected a share in [0, 1]")
        if self.max_skipped_updates < 0:
            raise ValueError(f"max_skipped_updates={self.max_skipped_updates}; expected 0 or more")


class Sentinel:
    """Counts failures and stops the run when they pass the limits."""

    def __init__(self, config: SentinelConfig) -> None:
        self._config = config
        self._skipped_in_a_row: dict[str, int] = {}

    def check_rollouts(self, outcomes: Sequence[RewardOutcome]) -> None:
        """Raise RunStopped when too many of these trajectories failed, naming the commonest cause."""
        causes = Counter(outcome.failed for outcome in outcomes if outcome.failed)
        failed = causes.total()
        if not failed:
            return
        cause, count = causes.most_common(1)[0]
        if failed <= self._config.max_failed_share * len(outcomes):
            logger.warning("%d of %d trajectories failed: %s", failed, len(outcomes), cause)
            return
        raise RunStopped(
            f"{failed} of {len(outcomes)} trajectories failed, more than trainer.sentinel.max_failed_share="
            f"{self._config.max_failed_share}; commonest cause ({count}x): {cause}. Mend the service, then resume from "
            "the last checkpoint with trainer.resume=auto"
        )

    def check_updates(self, metrics: Mapping[str, float]) -> None:
        """Raise RunStopped after too many skipped updates in a row, of the actor or of the critic.

        Args:
            metrics: of a step; `actor/updates` and `actor/skipped_updates` (and the critic's) if it had any. A step
                with an update that was applied ends a row.
        """
        for model in ("actor", "critic"):
            if f"{model}/updates" not in metrics:
                continue
            skipped = self._skipped_in_a_row.get(model, 0) + int(metrics[f"{model}/skipped_updates"])
            self._skipped_in_a_row[model] = 0 if metrics[f"{model}/updates"] else skipped
            if self._skipped_in_a_row[model] > self._config.max_skipped_updates:
                raise RunStopped(
                    f"{skipped} updates of the {model} in a row had a NaN or infinite loss or gradient and were "
                    f"skipped; lower {model}.optim.lr or resume from an earlier checkpoint"
                )

    def state_dict(self) -> dict[str, int]:
        """Return the rows of skipped updates, by model."""
        return dict(self._skipped_in_a_row)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self._skipped_in_a_row = dict(state)
