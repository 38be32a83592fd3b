"""Reductions over the masked entries of a tensor, and the one place that turns per-token terms into a loss.

Legend: B sequences, S tokens. A mask is bool (or 0/1 of any dtype) and True where an entry counts. What lies outside
a mask never reaches a result or a gradient, NaN and infinity included.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)

_WHITEN_EPS = 1e-8


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with 0 where `mask` (broadcastable to it) is False; a NaN there stays out of the gradient too."""
    return x.masked_fill(~mask.bool(), 0)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Return the mean of the masked entries, over all dimensions or over `dim`.

    Args:
        x: any shape.
        mask: broadcastable to the shape of `x`.
        dim: the dimensions to reduce; None reduces all of them to a scalar.

    Returns:
        The mean, and 0 wherever the mask selects nothing.
    """
    mask = mask.bool().expand_as(x)
    return zero_outside(x, mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with zero mean and unit sample variance over the masked entries: (x - mean) / sqrt(var + 1e-8).

    Fewer than two masked entries have no sample variance; it counts as 0, so a lone entry becomes 0 like any entry
    that equals the mean.

    Args:
        x: any floating shape.
        mask: broadcastable to the shape of `x`.

    Returns:
        The shape and dtype of `x`, 0 outside the mask.
    """
    mask = mask.bool().expand_as(x)
    # In float64, because the rounding error of a float32 mean, divided by sqrt(1e-8), would turn equal entries into
    # noise of order 1 instead of zeros.
    wide = zero_outside(x, mask).double()
    centred = zero_outside(wide - masked_mean(wide, mask), mask)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    return (centred * torch.rsqrt(variance + _WHITEN_EPS)).to(x.dtype)


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Reduce per-token terms to a scalar.

    `token_mean` weighs every token alike (DAPO, Yu et al. 2025); `seq_mean_token_sum` sums each sequence and weighs
    sequences alike; `seq_mean_token_mean` averages each sequence first (GRPO, Shao et al. 2024). A sequence without
    masked tokens adds nothing and is not counted.

    Args:
        per_token: (B, S).
        mask: (B, S).
        aggregation: one of `AGGREGATIONS`.
        normalizer: replaces the final denominator, which otherwise is the number of masked tokens (`token_mean`) or
            of sequences that have one (the other two). With the count of the whole mini-batch, the results of its
            micro-batches add up to the result of the mini-batch; where ranks average their gradients instead of
            adding them, pass count / ranks. With `seq_mean_token_sum`, sequences * maximal length is the constant
            denominator of Dr.GRPO (Liu et al. 2025). 0 is read as "nothing to count" and divides by 1.

    Returns:
        A scalar; 0 with zero gradient if the mask is empty.

    Raises:
        ValueError: unknown aggregation, shapes that differ, or a negative normalizer.
    """
    require_same_shape(per_token=per_token, mask=mask)
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is unknown; use one of {', '.join(AGGREGATIONS)}")
    mask = mask.bool()
    if aggregation == "token_mean":
        total, count = zero_outside(per_token, mask).sum(), mask.sum()
    elif aggregation == "seq_mean_token_sum":
        total, count = zero_outside(per_token, mask).sum(), mask.any(dim=1).sum()
    else:
        total, count = masked_mean(per_token, mask, dim=1).sum(), mask.any(dim=1).sum()
    return _divide(total, count if normalizer is None else normalizer)


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors share one shape; broadcasting would hide a misalignment.

    Raises:
        ValueError: names every tensor with its shape.
    """
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; give all of them the same (B, S)")


def _divide(total: Tensor, denominator: float | Tensor) -> Tensor:
    # Only numbers are checked: looking into a tensor would make the accelerator wait.
    if not isinstance(denominator, Tensor) and not denominator >= 0:
        raise ValueError(f"normalizer={denominator} is not a count; pass the global number of tokens or sequences")
    denominator = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    return total / denominator.masked_fill(denominator == 0, 1)
