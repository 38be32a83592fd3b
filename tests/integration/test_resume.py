"""A training that is killed and resumed ends where an unbroken one does, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.training_world import TrainingWorld, history
from verl.trainer.verify_resume import Plan, verify

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]  # three trainings, one by one


def test_a_killed_and_resumed_run_equals_an_unbroken_one(world: TrainingWorld, tmp_path: Path) -> None:
    # Small groups, because sequences come one after the other; two mini-batches, so that their shuffled order counts.
    overrides = world.overrides(tmp_path, "rollout.samples=2", "actor.update.mini_batch_size=4")
    plan = Plan(tuple(overrides), tmp_path, before=1, after=1, timeout=300.0)
    assert verify(plan) == []
    rows = history(tmp_path / "resumed")
    assert [(row["step"], row["actor/updates"]) for row in rows] == [(1, 2.0), (2, 2.0)]
    assert all(row["actor/grad_norm"] > 0 for row in rows)
