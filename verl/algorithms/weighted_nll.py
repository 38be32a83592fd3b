"""Losses of supervised fine-tuning on weighted examples, as one coefficient per learned token.

With `NLL_it` the negative log-likelihood of learned token t of example i, `n_i` its learned tokens, `w_i` its weight
and `l_i = 1/n_i sum_t NLL_it`, the loss of a global batch of B examples is

    token_mean      sum_i w_i sum_t NLL_it / sum_i n_i
    sequence_mean   sum_i w_i l_i / B
    released_v1     m/B sum_i 4 w_i l_i

each of which is `sum_it c_i NLL_it` with a c_i that depends on nothing but the batch as a whole. So the result is the
same however the examples are packed, cut into micro-batches or spread over ranks.

Sources: w_i and l_i are those of ExSearch's M-step (arXiv 2505.20128, L_R + L_A). Its released trainer (branch v1,
WeightedTrainer) sums `4 exp(-s_i) l_i` over a micro-batch; gradient accumulation and data parallelism average these
sums, so with micro-batches of m examples it is m/B times the sum over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Reduction = Literal["token_mean", "sequence_mean", "released_v1"]

RELEASED_FACTOR = 4.0


def token_coefficients(
    reduction: Reduction, weights: Sequence[float], learned: Sequence[int], micro_batch: int | None = None
) -> list[float]:
    """Return c_i of each example of a global batch.

    Args:
        weights: w_i.
        learned: n_i; an example without learned tokens gets 0 and still counts in B.
        micro_batch: m of `released_v1`; None takes the whole batch for one micro-batch, so that the sum stays a sum.
    """
    if reduction == "token_mean":
        total = max(1, sum(learned))
        return [weight / total for weight in weights]
    scale = 1.0 / max(1, len(weights))
    if reduction == "released_v1":
        scale *= RELEASED_FACTOR * (micro_batch or len(weights))
    return [scale * weight / count if count else 0.0 for weight, count in zip(weights, learned, strict=True)]
