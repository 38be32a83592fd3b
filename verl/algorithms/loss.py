"""Losses of the policy and the critic, and the entropy of the policy.

Legend: B sequences, S tokens, V vocabulary. Every loss is a scalar to minimise, returned with stats: detached scalar
tensors, means over what the loss's own mask selects. To combine the stats of micro-batches, weigh them by their
number of action tokens (of non-empty sequences for GSPO). A sequence without action tokens adds nothing, and an empty
mask gives a loss of 0 with zero gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verl.algorithms.masked import Aggregation, aggregate, masked_mean, require_same_shape, zero_outside

# exp(20) is far beyond any clip range. Without a bound exp overflows, and the infinity times the zero gradient of the
# unused branch of min() is a NaN.
_MAX_LOG_RATIO = 20.0


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token_mean",
    *,
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped surrogate loss of PPO (Schulman et al. 2017, eq. 7), token by token.

    With r = exp(logprobs - old_logprobs): -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). The two sides of the
    clip are separate as in DAPO (Yu et al. 2025). A log-ratio beyond +-20 counts as +-20.

    Args:
        logprobs: (B, S), under the policy being trained; the only input that receives a gradient.
        old_logprobs: (B, S), under the policy at the start of the step.
        advantages: (B, S).
        mask: (B, S), action tokens.
        clip_low: distance of the lower clip from 1.
        clip_high: distance of the upper clip from 1.
        dual_clip: c > 1 bounds the loss by -c A where A < 0 (Ye et al. 2020, eq. 5); None does not.
        aggregation: see `aggregate`.
        normalizer: see `aggregate`; the count of the whole mini-batch when this is one of its micro-batches.
        weights: (B, S) or (B, 1), factors of the per-token terms, as from `truncated_importance_weights`.

    Returns:
        loss, and stats `clip_fraction` (tokens whose clipped term was the active one), `dual_clip_fraction`,
        `approx_kl` (mean of old - new log-probability, k1), `ratio_mean`.

    Raises:
        ValueError: shapes differ, or a clip or the aggregation is out of range.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    _check_clips(clip_low, clip_high, dual_clip)
    mask = mask.bool()
    advantages = zero_outside(advantages.detach(), mask)
    log_ratio = zero_outside(logprobs - old_logprobs.detach(), mask)
    ratio = _bounded_exp(log_ratio)
    per_token, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    dual_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        dual_clipped = per_token > bound
        per_token = torch.minimum(per_token, bound)
    loss = aggregate(_weighted(per_token, weights, mask), mask, aggregation, normalizer)
    stats = {"clip_fraction": clipped, "dual_clip_fraction": dual_clipped, "approx_kl": -log_ratio, "ratio_mean": ratio}
    return loss, {name: masked_mean(value.detach().to(loss.dtype), mask) for name, value in stats.items()}


def gspo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of GSPO (Zheng et al. 2025, eq. 5 and 7): PPO's clip on one ratio per sequence.

    The ratio is the geometric mean of the token ratios, exp(mean over the action tokens of logprobs - old_logprobs),
    and the loss is the mean of the sequences' terms. GSPO has one advantage per sequence, which is what `grpo` and
    `rloo` give; if advantages vary within a sequence, its term is the mean of its tokens' terms.

    Args:
        logprobs: (B, S), under the policy being trained; the only input that receives a gradient.
        old_logprobs: (B, S), under the policy at the start of the step.
        advantages: (B, S).
        mask: (B, S), action tokens.
        clip_low: distance of the lower clip from 1 (the paper uses 3e-4).
        clip_high: distance of the upper clip from 1 (the paper uses 4e-4).
        normalizer: replaces the number of sequences that have action tokens; see `aggregate`.
        weights: (B, S) or (B, 1), factors as from `truncated_importance_weights`.

    Returns:
        loss, and stats over sequences: `clip_fraction`, `approx_kl` (of the length-normalised ratio), `ratio_mean`.

    Raises:
        ValueError: shapes differ, or a clip is out of range.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    _check_clips(clip_low, clip_high, None)
    mask = mask.bool()
    advantages = zero_outside(advantages.detach(), mask)
    log_ratio = masked_mean(logprobs - old_logprobs.detach(), mask, dim=1)[:, None].expand(mask.shape)
    ratio = _bounded_exp(log_ratio)
    per_token, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    loss = aggregate(_weighted(per_token, weights, mask), mask, "seq_mean_token_mean", normalizer)
    stats = {"clip_fraction": clipped, "approx_kl": -log_ratio, "ratio_mean": ratio}
    return loss, {
        name: aggregate(value.detach().to(loss.dtype), mask, "seq_mean_token_mean") for name, value in stats.items()
    }


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    *,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the critic's loss: half the masked mean of the larger of the clipped and unclipped squared errors.

    The clipped value stays within `clip` of the old one, as in the reference implementation of PPO (Dhariwal et al.
    2017, OpenAI baselines).

    Args:
        values: (B, S), predicted now; the only input that receives a gradient.
        old_values: (B, S), predicted at the start of the step.
        returns: (B, S), the targets.
        mask: (B, S), action tokens.
        clip: how far a value may move before its error stops shrinking.
        normalizer: replaces the number of action tokens; see `aggregate`.

    Returns:
        loss, and stats `clip_fraction` (tokens whose clipped error was the larger), `value_mean`.

    Raises:
        ValueError: shapes differ, or clip is negative.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    if not clip >= 0:
        raise ValueError(f"clip={clip} is negative; expected a distance in units of the value")
    mask = mask.bool()
    values = zero_outside(values, mask)
    old_values = zero_outside(old_values.detach(), mask)
    returns = zero_outside(returns.detach(), mask)
    unclipped_error = (values - returns).square()
    clipped_error = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    loss = 0.5 * aggregate(torch.maximum(unclipped_error, clipped_error), mask, "token_mean", normalizer)
    # The second condition alone would also count rounding noise of values that have not moved.
    clipped = (((values - old_values).abs() > clip) & (clipped_error > unclipped_error)).to(loss.dtype)
    return loss, {"clip_fraction": masked_mean(clipped, mask), "value_mean": masked_mean(values.detach(), mask)}


def entropy(logits: Tensor, *, chunk: int = 2**26) -> Tensor:
    """Return the entropy, in nats, of the distributions that `logits` describe.

    Computed in float32 (float64 for float64 logits) from the log-softmax, a slice of positions at a time: besides the
    logits, which the backward pass reads again, only the result is kept. A logit of -inf is a token of probability 0.
    The gradient cannot be differentiated again.

    Args:
        logits: (..., V), any floating dtype.
        chunk: logits per slice, at least one position; a slice takes a few float32 copies of them (256 MiB each).

    Returns:
        (...), float32 (float64 for float64 logits).
    """
    return _Entropy.apply(logits, max(1, chunk // max(1, logits.shape[-1])))


class _Entropy(torch.autograd.Function):
    """H = -sum p log p, whose gradient in the logits is -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: int) -> Tensor:
        """Keep the logits and the result only; the softmax is cheaper to recompute than to hold."""
        result = logits.new_empty(logits.shape[:-1], dtype=torch.promote_types(logits.dtype, torch.float32))
        for part, out in zip(_slices(logits, rows), result.view(-1).split(rows), strict=True):
            log_p = _finite_log_softmax(part, result.dtype)
            out.copy_((log_p.exp() * log_p).sum(dim=-1).neg_())
        ctx.save_for_backward(logits, result)
        ctx.rows = rows
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Recompute the softmax slice by slice and write the gradient in the dtype of the logits."""
        logits, result = ctx.saved_tensors
        rows = ctx.rows
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        per_row = torch.stack((result.reshape(-1), grad_output.reshape(-1)), dim=1)[..., None]
        for part, row, out in zip(_slices(logits, rows), per_row.split(rows), _slices(grad, rows), strict=True):
            log_p = _finite_log_softmax(part, result.dtype)
            out.copy_(log_p.exp().mul_(log_p.add_(row[:, 0])).mul_(-row[:, 1]))
        return grad, None


def _slices(logits: Tensor, rows: int) -> tuple[Tensor, ...]:
    return logits.reshape(-1, logits.shape[-1]).split(rows)


def _finite_log_softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probabilities whose -inf became the lowest finite number, so that 0 * log 0 is 0."""
    return torch.log_softmax(logits, dim=-1, dtype=dtype).clamp_(min=torch.finfo(dtype).min)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Return the per-token loss (B, S) and where its clipped term is the active one (B, S) bool."""
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(unclipped, clipped), clipped > unclipped


def _weighted(per_token: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
    if weights is None:
        return per_token
    if tuple(weights.shape) not in {tuple(mask.shape), (mask.shape[0], 1)}:
        expected = f"{tuple(mask.shape)} or {(mask.shape[0], 1)}"
        raise ValueError(f"weights has shape {tuple(weights.shape)}; expected {expected}")
    return per_token * zero_outside(weights.detach().expand(mask.shape), mask)


def _check_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not clip_low >= 0 or not clip_high >= 0:
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}; both are distances from 1 and at least 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}; expected more than 1 (3 is usual), or None to switch it off")
