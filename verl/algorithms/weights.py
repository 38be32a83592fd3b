"""Importance weights: between the rollout engine and the trainer, and between sampled trajectories.

Legend: B sequences, S tokens. Weights carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from verl.algorithms.masked import aggregate, require_same_shape, zero_outside

WeightLevel = Literal["token", "sequence"]
WEIGHT_LEVELS: tuple[str, ...] = get_args(WeightLevel)


@torch.no_grad()
def truncated_importance_weights(
    train_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    cap: float,
    level: WeightLevel = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return min(p_train / p_rollout, cap), which corrects for a rollout engine that samples from another policy.

    The engine differs by its numerics (Yao et al. 2025, truncated importance sampling) or by older weights. At the
    token level each token has its own ratio (biased, low variance); at the sequence level all action tokens of a
    sequence share the product of their ratios (unbiased up to the cap, high variance).

    Args:
        train_logprobs: (B, S), recomputed by the trainer.
        rollout_logprobs: (B, S), recorded when sampling.
        mask: (B, S), action tokens.
        cap: largest weight, above 0.
        level: one of `WEIGHT_LEVELS`.

    Returns:
        weights (B, S), 0 outside the mask, and stats over tokens or sequences according to the level:
        `weight_mean`, `truncated_fraction`, `rollout_kl` (mean of rollout - train log-probability, k1; of the sums
        over a sequence at the sequence level), and `log_ratio_abs_max`. Stats of an empty mask are 0.

    Raises:
        ValueError: shapes differ, a cap that is not above 0, or an unknown level.
    """
    require_same_shape(train_logprobs=train_logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    if level not in WEIGHT_LEVELS:
        raise ValueError(f"level={level!r} is unknown; use one of {', '.join(WEIGHT_LEVELS)}")
    if not cap > 0:
        raise ValueError(f"cap={cap}; expected more than 0 (2 is usual)")
    mask = mask.bool()
    log_ratio = zero_outside(train_logprobs - rollout_logprobs, mask)
    if level == "sequence":
        log_ratio = zero_outside(log_ratio.sum(dim=1, keepdim=True).expand(mask.shape), mask)
    ratio = log_ratio.exp()
    weights = zero_outside(ratio.clamp(max=cap), mask)
    stats = {
        "weight_mean": weights,
        "truncated_fraction": (ratio > cap).to(weights.dtype),
        "rollout_kl": -log_ratio,
    }
    over = "token_mean" if level == "token" else "seq_mean_token_mean"
    means = {name: aggregate(value, mask, over) for name, value in stats.items()}
    largest = log_ratio.abs().max() if log_ratio.numel() else log_ratio.new_zeros(())
    return weights, means | {"log_ratio_abs_max": largest}


@torch.no_grad()
def self_normalized_weights(answer_logprobs: Tensor, group_ids: Tensor) -> Tensor:
    """Return the weight of each trajectory in its group: softmax of the answer's log-probability given it.

    The E-step of ExSearch: trajectories z sampled for a question x with answer y get w proportional to p(y | x, z).

    Args:
        answer_logprobs: (B,) float, log p(y | x, z) summed over the answer's tokens; -inf is allowed.
        group_ids: (B,) int, equal for samples of one question.

    Returns:
        (B,), summing to 1 within each group. A group whose entries are all -inf gets equal weights.

    Raises:
        ValueError: shapes differ or are not (B,), or an entry is NaN.
    """
    if answer_logprobs.ndim != 1 or answer_logprobs.shape != group_ids.shape:
        raise ValueError(
            f"answer_logprobs {tuple(answer_logprobs.shape)} and group_ids {tuple(group_ids.shape)}; expected (B,) both"
        )
    if bool(answer_logprobs.isnan().any()):
        raise ValueError("answer_logprobs holds NaN; drop failed trajectories before weighting")
    ids, index = torch.unique(group_ids, return_inverse=True)
    lowest = answer_logprobs.new_full((len(ids),), -torch.inf)
    largest = lowest.scatter_reduce(0, index, answer_logprobs, reduce="amax")[index]
    # The best of a group maps to exp(0) also where it is -inf, whose difference from itself would be a NaN.
    scaled = (answer_logprobs - largest).masked_fill(answer_logprobs == largest, 0).exp()
    return scaled / scaled.new_zeros(len(ids)).index_add(0, index, scaled)[index]


Weighting = Literal["paper", "released_v1", "reward", "uniform", "rejection"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


@dataclass(frozen=True)
class Candidates:
    """The trajectories z of some questions x with accepted answers y, one row each.

    Attributes:
        group_ids: (B,) int64, equal for the trajectories of one question.
        usable: (B,) bool; a trajectory that failed or breaks a rule is not, and its other entries are not looked at.
        answer_logprobs: (B,) float, log p(y | x, z) summed over the answer's tokens.
        answer_tokens: (B,) int64, how many tokens that are.
        rewards: (B,) float, of the predicted answer, in [0, 1].
        correct: (B,) bool, whether the predicted answer is accurate.
    """

    group_ids: Tensor
    usable: Tensor
    answer_logprobs: Tensor
    answer_tokens: Tensor
    rewards: Tensor
    correct: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in self.__dataclass_fields__}
        if self.group_ids.ndim != 1 or len(set(shapes.values())) != 1:
            raise ValueError(f"shapes {shapes}; expected (B,) of each")


def check_weighting(weighting: Weighting, samples: int) -> None:
    """Refuse a weighting that says nothing with so few trajectories a question.

    Raises:
        ValueError: unknown, or normalised over a single trajectory.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weights={weighting!r} is unknown; use one of {', '.join(WEIGHTINGS)}")
    if weighting == "paper" and samples < 2:
        raise ValueError(
            f"weights=paper with samples={samples}: weights are normalised over the trajectories of a question, so "
            "with one each all of them would be 1 and the E-step would say nothing; sample at least 2 a question, or "
            "use weights=released_v1, reward or rejection, which are not normalised"
        )


@torch.no_grad()
def trajectory_weights(
    weighting: Weighting, candidates: Candidates, length_exponent: float = 0.0
) -> tuple[Tensor, dict[str, float]]:
    """Return how much each trajectory counts in the M-step of self-training.

    With s = log p(y | x, z) / n ** length_exponent over n answer tokens:

        paper        exp(s_k) / sum_j exp(s_j) over the usable trajectories of the question (arXiv 2505.20128, w~)
        released_v1  exp(mean log-probability), not normalised; the exponent is not used
        reward       the reward of the predicted answer, not normalised
        uniform      1 / usable trajectories of the question: every trajectory is imitated alike
        rejection    1 where the predicted answer is accurate, else 0

    A trajectory that is not usable weighs 0, and so does one whose log-probability is NaN. A question whose usable
    trajectories all make the answer impossible (-inf) has no posterior and weighs 0 under `paper`.

    Args:
        length_exponent: 0 takes the sum of the log-probabilities, 1 their mean.

    Returns:
        (B,) float64 weights, and stats: `weighted` (trajectories above 0), `nan`, `questions`, `dead_questions`
        (without any weight), and `effective_samples`, the mean over the others of (sum w)^2 / sum w^2.

    Raises:
        ValueError: an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weights={weighting!r} is unknown; use one of {', '.join(WEIGHTINGS)}")
    logprobs = candidates.answer_logprobs.double()
    reads_logprobs = weighting in ("paper", "released_v1")
    nan = candidates.usable & logprobs.isnan() & reads_logprobs
    usable = candidates.usable & ~nan & (candidates.answer_tokens > 0 if reads_logprobs else True)
    lengths = candidates.answer_tokens.clamp(min=1).double()
    ids, index = torch.unique(candidates.group_ids, return_inverse=True)
    if weighting == "paper":
        raw = _possible_softmax(logprobs / lengths**length_exponent, usable, index)
    elif weighting == "released_v1":
        raw = (logprobs / lengths).exp()
    elif weighting == "reward":
        raw = candidates.rewards.double()
    elif weighting == "rejection":
        raw = candidates.correct.double()
    else:
        raw = 1 / _sums(usable.double(), index, len(ids))[index]
    weights = torch.where(usable, raw, 0.0)
    total, squares = _sums(weights, index, len(ids)), _sums(weights**2, index, len(ids))
    alive = total > 0
    effective = (total[alive] ** 2 / squares[alive]).mean() if bool(alive.any()) else total.new_zeros(())
    return weights, {
        "weighted": float((weights > 0).sum()),
        "nan": float(nan.sum()),
        "questions": float(len(ids)),
        "dead_questions": float((~alive).sum()),
        "effective_samples": float(effective),
    }


def _possible_softmax(scores: Tensor, usable: Tensor, index: Tensor) -> Tensor:
    """Softmax of (B,) scores over the usable rows of each group; 0 in groups where every score is -inf."""
    possible = usable & (scores > -torch.inf)
    weights = torch.zeros_like(scores)
    if bool(possible.any()):
        weights[possible] = self_normalized_weights(scores[possible], index[possible])
    return weights


def _sums(values: Tensor, index: Tensor, groups: int) -> Tensor:
    return values.new_zeros(groups).index_add(0, index, values)
