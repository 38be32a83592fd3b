"""Importance weights: between the rollout engine and the trainer, and between sampled trajectories.

Legend: B sequences, S tokens. Weights carry no gradient.
"""

from __future__ import annotations

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
