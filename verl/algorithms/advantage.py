"""Advantage estimators: how much better than expected each action token was.

Legend: B sequences, S tokens, A the largest number of action tokens of a sequence. Every (B, S) tensor is aligned
with the token it speaks of (see verl/batch.py); results are 0 outside the mask and carry no gradient.

The three estimators over groups leave a sequence without action tokens, which is how a failed trajectory arrives, out
of its group's statistics; its score is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl.algorithms.masked import masked_whiten, require_same_shape, zero_outside

_GRPO_EPS = 1e-6


@torch.no_grad()
def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates (Schulman et al. 2016, eq. 16) over the action tokens alone.

    With the masked tokens of a sequence numbered t = 0, 1, ..., delta_t = r_t + gamma V_{t+1} - V_t and
    A_t = delta_t + gamma lam A_{t+1}, both V and A being 0 after the last one. Observations between two actions are
    thus bridged: they take no time step, so they neither discount nor contribute a value. The estimates are not
    whitened.

    s3 and Search-R1 run the recursion over every response token, observations included; passing the attention mask
    of the response as `mask` (and whitening with it) reproduces that.

    Args:
        token_rewards: (B, S) float; rewards outside the mask are ignored.
        values: (B, S) float, value of the state before each token.
        mask: (B, S).
        gamma: discount per action token.
        lam: GAE's lambda.

    Returns:
        advantages and returns (advantages + values), (B, S) each.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(token_rewards=token_rewards, values=values, mask=mask)
    mask = mask.bool()
    order = _actions_first(mask)
    reward = zero_outside(token_rewards, mask).gather(1, order).double()
    value = zero_outside(values, mask).gather(1, order).double()
    next_value = torch.nn.functional.pad(value[:, 1:], (0, 1))[:, : value.shape[1]]
    advantage = _discounted_sums(reward + gamma * next_value - value, gamma * lam)
    advantages = zero_outside(torch.zeros_like(values).scatter(1, order, advantage.to(values.dtype)), mask)
    return advantages, zero_outside(advantages + values, mask)


@torch.no_grad()
def grpo(scores: Tensor, group_ids: Tensor, mask: Tensor, normalize_std: bool = True) -> Tensor:
    """Return group-relative advantages (GRPO, Shao et al. 2024): (score - group mean) / (group std + 1e-6).

    The std is the sample one. A group of one has no baseline and keeps its score, as in the published code.

    Args:
        scores: (B,) float.
        group_ids: (B,) int, equal for samples of one question.
        mask: (B, S).
        normalize_std: False only subtracts the mean (Dr.GRPO, Liu et al. 2025), which does not favour questions on
            which the samples agree.

    Returns:
        (B, S), constant over the masked tokens of a sequence.

    Raises:
        ValueError: scores, group_ids and mask disagree on B.
    """
    groups = _Groups(scores, group_ids, mask)
    centred = groups.scores - groups.mean_of(groups.scores)
    advantage = centred
    if normalize_std:
        variance = groups.sum_of(centred.square()) / (groups.size - 1).clamp(min=1)
        advantage = centred / (variance.sqrt() + _GRPO_EPS)
    return groups.spread(torch.where(groups.size > 1, advantage, groups.scores))


@torch.no_grad()
def rloo(scores: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    """Return leave-one-out advantages (RLOO, Ahmadian et al. 2024): score - mean score of the others of the group.

    A group of one has no others: the baseline is 0 and it keeps its score.

    Args:
        scores: (B,) float.
        group_ids: (B,) int, equal for samples of one question.
        mask: (B, S).

    Returns:
        (B, S), constant over the masked tokens of a sequence.

    Raises:
        ValueError: scores, group_ids and mask disagree on B.
    """
    groups = _Groups(scores, group_ids, mask)
    others = (groups.sum_of(groups.scores) - groups.scores) / (groups.size - 1).clamp(min=1)
    return groups.spread(torch.where(groups.size > 1, groups.scores - others, groups.scores))


@torch.no_grad()
def reinforce_plus_plus(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return REINFORCE++ advantages (Hu 2025): returns discounted per action token, whitened over the whole batch.

    Args:
        token_rewards: (B, S) float; rewards outside the mask are ignored.
        mask: (B, S).
        gamma: discount per action token; observations take no step.

    Returns:
        (B, S), zero mean and unit sample variance over the mask (see `masked_whiten` for fewer than two tokens).

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(token_rewards=token_rewards, mask=mask)
    mask = mask.bool()
    order = _actions_first(mask)
    returns = _discounted_sums(zero_outside(token_rewards, mask).gather(1, order).double(), gamma)
    spread = returns.new_zeros(mask.shape).scatter(1, order, returns)
    return masked_whiten(spread, mask).to(token_rewards.dtype)


def _actions_first(mask: Tensor) -> Tensor:
    """(B, A) int64: the positions of each sequence's actions in order, then some of its other positions.

    Gathering by it puts consecutive actions side by side, so that a recursion takes A steps instead of S; in search
    trajectories most of S is observations.
    """
    longest = int(mask.sum(dim=1).max()) if mask.numel() else 0
    return torch.argsort(mask.byte(), dim=1, descending=True, stable=True)[:, :longest]


def _discounted_sums(x: Tensor, discount: float) -> Tensor:
    """(B, A) float64 -> (B, A): x_t + discount * x_{t+1} + discount^2 * x_{t+2} + ...

    In float64, because rounding adds up over A steps and whitening may magnify it.
    """
    sums = torch.empty_like(x)
    running = x.new_zeros(x.shape[0])
    for step in reversed(range(x.shape[1])):
        running = x[:, step] + discount * running
        sums[:, step] = running
    return sums


class _Groups:
    """Sums over the groups of a batch, of the sequences that have an action token.

    In float64, where float32 scores add up exactly: equal scores give a deviation of exactly 0, which a division by
    std + 1e-6 would otherwise blow up.
    """

    def __init__(self, scores: Tensor, group_ids: Tensor, mask: Tensor) -> None:
        """Index the groups of scores (B,), group_ids (B,), mask (B, S)."""
        if not scores.shape == group_ids.shape == mask.shape[:1]:
            raise ValueError(
                f"scores {tuple(scores.shape)}, group_ids {tuple(group_ids.shape)} and mask {tuple(mask.shape)} "
                "disagree; expected (B,), (B,) and (B, S)"
            )
        self._mask = mask.bool()
        self._counted = self._mask.any(dim=1)
        self._dtype = scores.dtype
        ids, self._index = torch.unique(group_ids, return_inverse=True)
        self._number = len(ids)
        self.scores = zero_outside(scores.double(), self._counted)
        self.size = self.sum_of(torch.ones_like(self.scores))

    def sum_of(self, x: Tensor) -> Tensor:
        """(B,) -> (B,): for each sequence, the sum of x over the counted sequences of its group."""
        sums = x.new_zeros(self._number).index_add(0, self._index, zero_outside(x, self._counted))
        return sums[self._index]

    def mean_of(self, x: Tensor) -> Tensor:
        """(B,) -> (B,): for each sequence, the mean of x over the counted sequences of its group."""
        return self.sum_of(x) / self.size.clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:
        """(B,) -> (B, S): x on the masked tokens of each sequence, in the dtype of the scores."""
        return zero_outside(x.to(self._dtype)[:, None].expand(self._mask.shape), self._mask)
