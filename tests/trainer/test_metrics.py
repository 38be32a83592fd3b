"""Figures about trajectories, computed by hand."""

from __future__ import annotations

import math

import pytest

from tests.trainer.fakes import question, sample, trajectory, turn
from verl.trainer.metrics import policy_tokens, rollout_metrics, trajectory_metrics
from verl.types import Stop, Turn

TWO_HOP = question("B", "2-hop", ("T1", "T2"))
# Searches twice, selecting one and then two passages, and finds one of two gold passages.
LONG = trajectory(
    TWO_HOP,
    (
        turn(4, found=("T1", "X"), query="a"),
        turn(3, found=("Y",), query="b", selected=(1,)),
        turn(2, finished=True, selected=(1, 2)),
    ),
    Stop.FINISHED,
    "T1",
    "Y",
)
# One turn without an action, then out of turns; nothing found.
LOST = trajectory(question("A"), (turn(6, invalid=True), turn(1, invalid=True)), Stop.TURN_LIMIT)


def test_how_the_policy_searched() -> None:
    metrics = trajectory_metrics([LONG, LOST])
    expected = {
        "env/number_of_actions/mean": 2.5,
        "env/number_of_actions/max": 3,
        "env/number_of_actions/min": 2,
        "env/number_of_valid_action": 1.5,
        "env/ratio_of_valid_action": 3 / 5,
        "env/invalid_actions": 2 / 5,
        "env/finish_ratio": 0.5,
        "env/turn_limit_ratio": 0.5,
        "env/length_ratio": 0,
        "env/valid_rate": 0.5,
        "env/valid_search_rate": 2 / 5,
        "env/searches": 1,
        "env/number_of_valid_search": 1,
        "env/selected_documents": 1.5,
        "env/documents": 1,
        "env/gold_recall": 0.25,
        "response_length/mean": 8,
        "response_length/max": 9,
        "response_length/min": 7,
        "prompt_length/mean": 2,
        "prompt_length/max": 2,
        "prompt_length/min": 2,
        "response_length/clip_ratio": 0,
        "prompt_length/clip_ratio": 0,
        "state_tokens/total": 16,
        # Two observations of three tokens each.
        "state_tokens/coverage": 16 / 22,
    }
    assert metrics == pytest.approx(expected)


def test_no_trajectories_give_no_division_by_zero() -> None:
    metrics = trajectory_metrics([])
    assert set(metrics.values()) == {0}
    assert "env/gold_recall" not in metrics
    assert "response_length/mean" not in metrics


def test_questions_without_gold_passages_do_not_count_in_the_recall() -> None:
    bare = trajectory(question("C", gold=()))
    assert trajectory_metrics([LONG, bare])["env/gold_recall"] == 0.5
    assert "env/gold_recall" not in trajectory_metrics([bare])


def test_only_what_finished_by_itself_without_an_invalid_turn_is_valid() -> None:
    assert LONG.valid
    assert not LOST.valid
    assert not trajectory(turns=(turn(finished=True),), stop=Stop.LENGTH).valid
    assert not trajectory(turns=(turn(invalid=True), turn(finished=True))).valid


def test_a_context_that_ends_and_a_prompt_too_long_are_told_apart() -> None:
    cut = trajectory(turns=(turn(),), stop=Stop.LENGTH)
    refused = trajectory(turns=(), stop=Stop.LENGTH)
    metrics = trajectory_metrics([LONG, LOST, cut, refused])
    assert (metrics["response_length/clip_ratio"], metrics["prompt_length/clip_ratio"]) == (0.25, 0.25)
    assert metrics["env/length_ratio"] == 0.5


def test_policy_tokens_are_those_that_were_sampled() -> None:
    assert policy_tokens(LONG) == 9


def test_rewards_are_averaged_over_what_was_scored() -> None:
    a, b = question("A"), question("B")
    samples = [
        sample(2.0, a, parts={"accuracy": 1.0, "gain": 1.0, "recall": 0.5}),
        sample(0.0, a, parts={"accuracy": 0.0, "gain": 0.0, "recall": 0.0}),
        sample(-1.0, b, parts={"accuracy": 0.0, "gain": -1.0}),
        sample(asked=b, failed="away"),
    ]
    metrics = rollout_metrics(samples)
    expected = {
        "env/failed": 1,
        "env/trajectories": 4,
        "reward/mean": 1 / 3,
        "reward/max": 2,
        "reward/min": -1,
        "reward/accuracy": 1 / 3,
        "reward/gain": 0,
        "reward/recall": 0.25,
        "reward/utility_1_gen_1": 1 / 3,
        "reward/utility_0_gen_1": 0,
        "reward/utility_0_gen_0": 1 / 3,
        "reward/utility_-1_gen_0": 1 / 3,
        "reward/groups_with_variance": 0.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_where_nothing_was_answered_there_is_no_accuracy() -> None:
    samples = [sample(6.0, parts={"recall": 1.0}), sample(-2.5, parts={"recall": 0.0})]
    assert "reward/accuracy" not in rollout_metrics(samples)
    assert rollout_metrics([*samples, sample(1.0, parts={"accuracy": 1.0})])["reward/accuracy"] == 1.0


def test_rejections_are_counted_by_their_kind() -> None:
    def rejected(fault: str) -> Turn:
        return turn(finished=True, invalid=True, note="why", fault=fault)

    played = [trajectory(turns=(rejected(fault),)) for fault in ("tag_missing", "tag_missing", "blank", "")]
    metrics = trajectory_metrics([*played, trajectory()])
    found = {name: value for name, value in metrics.items() if name.startswith("env/rejected/")}
    assert found == {"env/rejected/tag_missing": 0.4, "env/rejected/blank": 0.2, "env/rejected/other": 0.2}


def test_rewards_other_than_gbr_have_no_gbr_cases() -> None:
    metrics = rollout_metrics([sample(0.5, parts={"recall": 0.5})])
    assert not [name for name in metrics if name.startswith("reward/utility")]


def test_when_everything_failed_there_is_nothing_to_average() -> None:
    assert rollout_metrics([sample(failed="away")]) == {"env/failed": 1, "env/trajectories": 1}
    assert rollout_metrics([]) == {"env/failed": 0, "env/trajectories": 0}


def test_a_failed_trajectory_is_no_nan_in_any_mean() -> None:
    metrics = rollout_metrics([sample(1.0), sample(failed="away")])
    assert all(math.isfinite(value) for value in metrics.values())
