from __future__ import annotations

import logging
import math

import pytest

from verl.trainer.sentinel import RunStopped, Sentinel, SentinelConfig
from verl.types import RewardOutcome

FINE = RewardOutcome(1.0)


def failed(cause: str) -> RewardOutcome:
    return RewardOutcome(math.nan, failed=cause)


def updates(applied: int, skipped: int, model: str = "actor") -> dict[str, float]:
    return {f"{model}/updates": float(applied), f"{model}/skipped_updates": float(skipped)}


def test_a_share_at_the_limit_goes_on_with_a_warning_and_one_above_stops(caplog: pytest.LogCaptureFixture) -> None:
    sentinel = Sentinel(SentinelConfig(max_failed_share=0.25))
    with caplog.at_level(logging.WARNING):
        sentinel.check_rollouts([failed("away"), FINE, FINE, FINE])
    assert "1 of 4 trajectories failed: away" in caplog.text
    with pytest.raises(RunStopped, match=r"2 of 4 .*max_failed_share=0.25.*\(2x\): away.*trainer.resume=auto"):
        sentinel.check_rollouts([failed("away"), failed("away"), FINE, FINE])


def test_the_commonest_cause_is_named() -> None:
    outcomes = [failed("timeout"), failed("refused"), failed("refused")]
    with pytest.raises(RunStopped, match=r"\(2x\): refused"):
        Sentinel(SentinelConfig()).check_rollouts(outcomes)


def test_nothing_to_check_is_nothing_wrong() -> None:
    sentinel = Sentinel(SentinelConfig(max_failed_share=0.0, max_skipped_updates=0))
    sentinel.check_rollouts([])
    sentinel.check_rollouts([FINE])
    sentinel.check_updates({"reward/mean": 1.0})
    with pytest.raises(RunStopped):
        sentinel.check_rollouts([failed("away"), *[FINE] * 99])


def test_an_applied_update_ends_a_row_of_skipped_ones() -> None:
    sentinel = Sentinel(SentinelConfig(max_skipped_updates=3))
    sentinel.check_updates(updates(applied=0, skipped=3))
    sentinel.check_updates(updates(applied=1, skipped=3))
    sentinel.check_updates(updates(applied=0, skipped=3))
    with pytest.raises(RunStopped, match=r"4 updates of the actor in a row.*actor.optim.lr"):
        sentinel.check_updates(updates(applied=0, skipped=1))


def test_the_critic_has_a_row_of_its_own() -> None:
    sentinel = Sentinel(SentinelConfig(max_skipped_updates=1))
    sentinel.check_updates(updates(1, 0) | updates(0, 1, "critic"))
    with pytest.raises(RunStopped, match="2 updates of the critic"):
        sentinel.check_updates(updates(1, 0) | updates(0, 1, "critic"))


def test_a_step_without_updates_neither_lengthens_nor_ends_a_row() -> None:
    sentinel = Sentinel(SentinelConfig(max_skipped_updates=2))
    sentinel.check_updates(updates(0, 2))
    sentinel.check_updates({})
    with pytest.raises(RunStopped):
        sentinel.check_updates(updates(0, 1))


def test_a_row_goes_on_after_a_resume() -> None:
    before, after = Sentinel(SentinelConfig()), Sentinel(SentinelConfig())
    before.check_updates(updates(0, 3))
    after.load_state_dict(before.state_dict())
    with pytest.raises(RunStopped):
        after.check_updates(updates(0, 1))


@pytest.mark.parametrize("wrong", [{"max_failed_share": 1.5}, {"max_failed_share": -0.1}, {"max_skipped_updates": -1}])
def test_limits_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SentinelConfig(**wrong)  # type: ignore[arg-type]
