"""From scores to advantages, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from verl.batch import Batch
from verl.trainer.estimate import ESTIMATORS, AlgorithmConfig, estimate, place_scores

# Two questions, two samples each; T is an action token, o an observation, . padding.
#   row 0: p T T o T        row 1: p T T . .       row 2: p T o T .       row 3: p T T T T
ACTIONS = torch.tensor(
    [[0, 1, 1, 0, 1], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 1]],
    dtype=torch.bool,
)
LENGTHS = torch.tensor([5, 3, 4, 5])
SCORES = torch.tensor([2.0, 0.0, 1.0, -1.0])


def batch(actions: Tensor = ACTIONS, groups: tuple[int, ...] = (0, 0, 1, 1)) -> Batch:
    rows, width = actions.shape
    attention = torch.arange(width) < LENGTHS[:rows, None]
    return Batch(
        input_ids=torch.zeros(rows, width, dtype=torch.int64),
        attention_mask=attention | actions,
        action_mask=actions,
        position_ids=torch.arange(width).expand(rows, width),
        rollout_logprobs=torch.zeros(rows, width),
        group_ids=torch.tensor(groups),
    )


def on_actions(value: float) -> Tensor:
    return torch.where(ACTIONS, value, 0.0)


def plain(**changes: object) -> AlgorithmConfig:
    """No KL in the reward unless asked for."""
    return AlgorithmConfig(**({"kl_in_reward": False} | changes))  # type: ignore[arg-type]


def test_a_score_goes_to_the_last_action_token_and_nowhere_else() -> None:
    placed = place_scores(SCORES, ACTIONS)
    expected = torch.tensor([[0, 0, 0, 0, 2.0], [0, 0, 0.0, 0, 0], [0, 0, 0, 1.0, 0], [0, 0, 0, 0, -1.0]])
    assert torch.equal(placed, expected)
    assert placed.dtype == torch.float32


def test_a_row_without_actions_gets_no_reward() -> None:
    actions = ACTIONS.clone()
    actions[0] = False
    assert torch.equal(place_scores(SCORES, actions)[0], torch.zeros(5))


def test_kl_in_the_reward_is_taken_off_each_action_token() -> None:
    # k1 = -1.0 - -1.5 = 0.5 a token, coefficient 0.1: row 0 has three action tokens, 2 - 3 * 0.05 = 1.85.
    config = AlgorithmConfig(estimator="rloo", kl_in_reward=True)
    train, metrics = estimate(config, batch(), SCORES, on_actions(-1.0), on_actions(-1.5), None, 0.1)
    rewards = [2 - 0.15, 0 - 0.1, 1 - 0.1, -1 - 0.2]
    assert metrics["critic/kl"] == pytest.approx(0.5)
    assert metrics["critic/kl_coeff"] == 0.1
    assert metrics["critic/rewards/mean"] == pytest.approx(sum(rewards) / 4)
    assert metrics["critic/rewards/max"] == pytest.approx(1.85)
    assert metrics["critic/rewards/min"] == pytest.approx(-1.2)
    assert metrics["critic/score/mean"] == pytest.approx(0.5)
    # RLOO over totals: row 0 against row 1.
    assert train.advantages is not None
    assert train.advantages[0, 1].item() == pytest.approx(1.85 - -0.1)


def test_kl_is_measured_but_not_paid_when_it_is_in_the_loss() -> None:
    _, metrics = estimate(
        plain(estimator="rloo"), batch(), SCORES, on_actions(-1.0), on_actions(-1.5), None, kl_coef=0.1
    )
    assert metrics["critic/kl"] == pytest.approx(0.5)
    assert metrics["critic/rewards/max"] == 2.0


def test_log_probabilities_outside_the_actions_do_not_reach_the_kl() -> None:
    config = AlgorithmConfig(estimator="rloo", kl_in_reward=True)
    wild = torch.where(ACTIONS, -1.0, math.inf)
    train, metrics = estimate(config, batch(), SCORES, wild, on_actions(-1.0), None, 0.1)
    assert metrics["critic/kl"] == 0
    assert metrics["critic/rewards/max"] == 2.0
    assert train.advantages is not None and train.advantages.isfinite().all()


def test_gae_bridges_observations_and_discounts_per_action_token() -> None:
    # gamma 0.5, lambda 1, V = 0.5: row 0 has actions at 1, 2, 4; returns 2 * 0.25, 2 * 0.5, 2.
    config = plain(estimator="gae", gamma=0.5, lam=1.0, whiten=False)
    train, metrics = estimate(config, batch(), SCORES, on_actions(-1.0), None, on_actions(0.5), 0.0)
    assert train.returns is not None and train.advantages is not None
    torch.testing.assert_close(train.returns[0], torch.tensor([0, 0.5, 1.0, 0, 2.0]))
    torch.testing.assert_close(train.advantages[0], torch.tensor([0, 0.0, 0.5, 0, 1.5]))
    torch.testing.assert_close(train.returns[2], torch.tensor([0, 0.5, 0, 1.0, 0]))
    assert metrics["critic/values/mean"] == pytest.approx(0.5)
    assert metrics["critic/returns/max"] == 2.0
    assert metrics["critic/returns/min"] == -1.0


def test_gae_whitens_over_the_action_tokens_alone() -> None:
    config = plain(estimator="gae")
    train, _ = estimate(config, batch(), SCORES, on_actions(-1.0), None, on_actions(0.0), 0.0)
    assert train.advantages is not None
    whitened = train.advantages[ACTIONS]
    # With gamma = lambda = 1 and V = 0 the raw advantage of a token is its row's score.
    raw = SCORES[:, None].expand(4, 5)[ACTIONS]
    torch.testing.assert_close(whitened, (raw - raw.mean()) / raw.std())
    assert torch.equal(train.advantages[~ACTIONS], torch.zeros(int((~ACTIONS).sum())))


def test_grpo_divides_by_the_group_deviation_and_dr_grpo_does_not() -> None:
    with_std, _ = estimate(plain(estimator="grpo"), batch(), SCORES, on_actions(-1.0), None, None, 0.0)
    without, _ = estimate(
        plain(estimator="grpo", normalize_std=False), batch(), SCORES, on_actions(-1.0), None, None, 0.0
    )
    assert with_std.advantages is not None and without.advantages is not None
    # Group 0: scores 2 and 0, mean 1, sample std sqrt(2).
    assert with_std.advantages[0, 1].item() == pytest.approx(1 / (math.sqrt(2) + 1e-6))
    assert without.advantages[0, 1].item() == 1.0
    assert without.advantages[3, 4].item() == -1.0
    assert with_std.returns is None and with_std.values is None


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    train, _ = estimate(plain(estimator="rloo"), batch(groups=(0, 0, 0, 1)), SCORES, on_actions(-1.0), None, None, 0.0)
    assert train.advantages is not None
    assert train.advantages[0, 1].item() == pytest.approx(2 - (0 + 1) / 2)
    assert train.advantages[3, 1].item() == -1.0, "a group of one keeps its score"


def test_reinforce_plus_plus_whitens_discounted_returns() -> None:
    config = plain(estimator="reinforce_plus_plus", gamma=0.5)
    train, _ = estimate(config, batch(), SCORES, on_actions(-1.0), None, None, 0.0)
    returns = torch.tensor([0.5, 1.0, 2.0, 0.0, 0.0, 0.5, 1.0, -0.125, -0.25, -0.5, -1.0])
    assert train.advantages is not None
    torch.testing.assert_close(train.advantages[ACTIONS], (returns - returns.mean()) / returns.std())


def test_the_critic_explains_all_none_or_less_than_nothing() -> None:
    config = plain(estimator="gae", whiten=False)
    scores = SCORES[:, None].expand(4, 5)

    def explained(values: Tensor) -> float:
        return estimate(config, batch(), SCORES, on_actions(-1.0), None, values, 0.0)[1]["critic/vf_explained_var"]

    assert explained(torch.where(ACTIONS, scores, 0.0)) == pytest.approx(1, abs=1e-5)
    assert explained(on_actions(0.3)) == pytest.approx(0, abs=1e-4)
    assert explained(torch.where(ACTIONS, -scores, 0.0)) == pytest.approx(-3, abs=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_without_any_action_has_no_advantages_and_no_nan(estimator: str) -> None:
    nothing = torch.zeros_like(ACTIONS)
    zeros = torch.zeros(4, 5)
    train, metrics = estimate(plain(estimator=estimator), batch(nothing), SCORES, zeros, zeros, zeros, 0.1)
    assert train.advantages is not None
    assert torch.equal(train.advantages, zeros)
    assert all(math.isfinite(value) for value in metrics.values())
    assert "critic/advantages/mean" not in metrics


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"estimator": "ppo"}, "expected one of gae, grpo"),
        ({"critic_warmup": 3, "estimator": "grpo"}, "needs a critic"),
        ({"critic_warmup": -1}, "0 or more"),
        ({"kl_coef": -0.1}, "0 or more"),
        ({"gamma": 1.5}, r"\[0, 1\]"),
        ({"lam": -0.5}, r"\[0, 1\]"),
        ({"kl_target": 0.0}, "null for a fixed"),
        ({"kl_horizon": 0}, "at least 1"),
        ({"dynamic_sampling": -2}, "0 or more"),
    ],
)
def test_a_wrong_algorithm_is_refused_with_the_fix(wrong: dict[str, object], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        AlgorithmConfig(**wrong)  # type: ignore[arg-type]
