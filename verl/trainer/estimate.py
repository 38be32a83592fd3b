"""From scores to advantages: the one table that says what each algorithm is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from verl.algorithms import advantage
from verl.algorithms.kl import kl_penalty
from verl.algorithms.masked import masked_mean, masked_whiten
from verl.batch import Batch, TrainBatch

Estimator = Literal["gae", "grpo", "rloo", "reinforce_plus_plus"]


@dataclass(frozen=True)
class AlgorithmConfig:
    """How rewards become advantages.

    Attributes:
        estimator: `gae` is PPO's and needs a critic; the others do not.
        gamma, lam: discount and GAE's lambda, per action token.
        normalize_std: GRPO divides by the group's standard deviation (False: Dr. GRPO).
        whiten: whiten GAE advantages over the batch's action tokens.
        kl_in_reward: subtract coef * KL(policy, reference) from each action token's reward.
        kl_kind: `k1`, `abs`, `k2` or `k3`.
        kl_coef: the coefficient, or the adaptive controller's first one.
        kl_target: KL that the adaptive controller steers for; None keeps the coefficient fixed.
        kl_horizon: the adaptive controller's horizon, in trajectories.
        critic_warmup: steps at the start that train only the critic.
        dynamic_sampling: draw further questions while groups without reward variance are dropped (DAPO), at most
            this many draws a step; 0 switches it off and keeps every group.
    """

    estimator: Estimator = "gae"
    gamma: float = 1.0
    lam: float = 1.0
    normalize_std: bool = True
    whiten: bool = True
    kl_in_reward: bool = True
    kl_kind: Literal["k1", "abs", "k2", "k3"] = "k1"
    kl_coef: float = 0.001
    kl_target: float | None = None
    kl_horizon: int = 10_000
    critic_warmup: int = 0
    dynamic_sampling: int = 0

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator={self.estimator!r}; expected one of {', '.join(ESTIMATORS)}")
        for name in ("kl_coef", "critic_warmup", "dynamic_sampling"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 or more")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected a value in [0, 1]")
        if self.kl_target is not None and not self.kl_target > 0:
            raise ValueError(f"kl_target={self.kl_target}; expected more than 0, or null for a fixed coefficient")
        if self.kl_horizon < 1:
            raise ValueError(f"kl_horizon={self.kl_horizon}; expected at least 1 trajectory")
        if self.critic_warmup and not self.needs_critic:
            raise ValueError(f"critic_warmup={self.critic_warmup} needs a critic, which {self.estimator} lacks; set 0")

    @property
    def needs_critic(self) -> bool:
        """Whether the estimator reads values."""
        return self.estimator == "gae"

    @property
    def compares_samples(self) -> bool:
        """Whether the estimator judges a sample by the others of its question."""
        return self.estimator in ("grpo", "rloo")


@dataclass(frozen=True)
class Scored:
    """What an estimator sees: `scores (B,)`, `token_rewards (B, S)`, and the batch with its log-probs and values."""

    scores: Tensor
    token_rewards: Tensor
    batch: TrainBatch


def _gae(config: AlgorithmConfig, scored: Scored) -> tuple[Tensor, Tensor | None]:
    mask = scored.batch.action_mask
    advantages, returns = advantage.gae(scored.token_rewards, scored.batch.values, mask, config.gamma, config.lam)
    if config.whiten:
        advantages = masked_whiten(advantages, mask)
    return advantages, returns


def _grpo(config: AlgorithmConfig, scored: Scored) -> tuple[Tensor, Tensor | None]:
    totals = scored.token_rewards.sum(dim=1)
    batch = scored.batch
    return advantage.grpo(totals, batch.group_ids, batch.action_mask, config.normalize_std), None


def _rloo(config: AlgorithmConfig, scored: Scored) -> tuple[Tensor, Tensor | None]:
    totals = scored.token_rewards.sum(dim=1)
    return advantage.rloo(totals, scored.batch.group_ids, scored.batch.action_mask), None


def _reinforce_plus_plus(config: AlgorithmConfig, scored: Scored) -> tuple[Tensor, Tensor | None]:
    return advantage.reinforce_plus_plus(scored.token_rewards, scored.batch.action_mask, config.gamma), None


ESTIMATORS: dict[str, Callable[[AlgorithmConfig, Scored], tuple[Tensor, Tensor | None]]] = {
    "gae": _gae,
    "grpo": _grpo,
    "rloo": _rloo,
    "reinforce_plus_plus": _reinforce_plus_plus,
}


def place_scores(scores: Tensor, action_mask: Tensor) -> Tensor:
    """Put each trajectory's score on its last action token.

    Args:
        scores: (B,) float32.
        action_mask: (B, S) bool; a row without actions gets no reward.

    Returns:
        (B, S) float32 token rewards.
    """
    positions = torch.arange(action_mask.shape[1], device=action_mask.device)
    last = torch.where(action_mask, positions, -1).amax(dim=1)
    rewards = torch.zeros(action_mask.shape, dtype=torch.float32, device=action_mask.device)
    rows = last >= 0
    rewards[rows, last[rows]] = scores[rows].float()
    return rewards


def estimate(
    config: AlgorithmConfig,
    batch: Batch,
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor | None,
    kl_coef: float,
) -> tuple[TrainBatch, dict[str, float]]:
    """Turn scores into a batch to train on.

    Args:
        scores: (B,) float32 rewards of whole trajectories.
        old_logprobs, ref_logprobs, values: (B, S) float32, None where unused.
        kl_coef: the controller's present coefficient.

    Returns:
        The TrainBatch with advantages (and returns for a critic), and metrics named as in s3's trainer.
    """
    mask = batch.action_mask
    token_rewards = place_scores(scores, mask)
    metrics = _spread("critic/score", scores)
    if ref_logprobs is not None:
        metrics["critic/kl"] = masked_mean(kl_penalty(old_logprobs, ref_logprobs, "k1"), mask).item()
        if config.kl_in_reward:
            metrics["critic/kl_coeff"] = kl_coef
            penalty = kl_penalty(old_logprobs, ref_logprobs, config.kl_kind)
            token_rewards = token_rewards - kl_coef * torch.where(mask, penalty, 0.0)
    train = TrainBatch.of(batch, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, values=values)
    advantages, returns = ESTIMATORS[config.estimator](config, Scored(scores, token_rewards, train))
    metrics |= _spread("critic/rewards", token_rewards.sum(dim=1)) | _spread("critic/advantages", advantages[mask])
    if returns is not None and values is not None:
        metrics |= _fit(returns[mask], values[mask])
    return replace(train, advantages=advantages, returns=returns), metrics


def _fit(returns: Tensor, values: Tensor) -> dict[str, float]:
    """Say how well the critic foresaw the returns; (N,) each, of the action tokens."""
    metrics = _spread("critic/returns", returns) | _spread("critic/values", values)
    if returns.numel():
        unexplained = (returns - values).var(unbiased=False) / (returns.var(unbiased=False) + 1e-5)
        metrics["critic/vf_explained_var"] = (1 - unexplained).item()
    return metrics


def _spread(name: str, x: Tensor) -> dict[str, float]:
    if x.numel() == 0:
        return {}
    return {f"{name}/mean": x.mean().item(), f"{name}/max": x.max().item(), f"{name}/min": x.min().item()}
