"""The actor's loss: a surrogate, minus an entropy bonus, plus a KL penalty, corrected for the rollout engine.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from verl.algorithms.kl import KLKind, kl_penalty
from verl.algorithms.loss import gspo_policy_loss, ppo_policy_loss
from verl.algorithms.masked import Aggregation, aggregate, masked_mean
from verl.algorithms.weights import WeightLevel, truncated_importance_weights
from verl.batch import TrainBatch
from verl.workers.learner import LossOutput


@dataclass(frozen=True)
class PolicyLossConfig:
    """Which loss moves the policy.

    Attributes:
        kind: an entry of `SURROGATES`.
        clip_low: distance of the ratio's lower clip from 1.
        clip_high: distance of its upper clip from 1.
        dual_clip: bound for negative advantages (`ppo` only); null switches it off.
        aggregation: of per-token terms to a loss (see `verl.algorithms.masked.aggregate`; `gspo` has its own).
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of the KL to the reference in the loss.
        kl_kind: its estimator.
        tis_cap: largest truncated importance weight between trainer and rollout engine; null switches it off.
        tis_level: token or sequence.
    """

    kind: Literal["ppo", "gspo"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregation: Aggregation = "token_mean"
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_kind: KLKind = "k3"
    tis_cap: float | None = None
    tis_level: WeightLevel = "token"

    def __post_init__(self) -> None:
        if self.kind == "gspo" and self.aggregation != "seq_mean_token_mean":
            raise ValueError(f"aggregation={self.aggregation} with kind=gspo; GSPO is seq_mean_token_mean")
        if self.kind == "gspo" and self.dual_clip is not None:
            raise ValueError("dual_clip belongs to kind=ppo; set it to null with kind=gspo")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ValueError(f"tis_cap={self.tis_cap}; expected more than 0 (2 is usual), or null")

    def count(self, mask: Tensor) -> Tensor:
        """Return what the loss is normalised by: the action tokens of `mask` (B, S), or the sequences that have one."""
        return mask.sum() if self.aggregation == "token_mean" else mask.any(dim=1).sum()


class Surrogate(Protocol):
    """A policy loss in the terms of a configuration."""

    def __call__(
        self,
        config: PolicyLossConfig,
        logprobs: Tensor,
        old_logprobs: Tensor,
        batch: TrainBatch,
        normalizer: Tensor,
        weights: Tensor | None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss and its stats; (B, S) tensors in."""
        ...


def _ppo(
    config: PolicyLossConfig,
    logprobs: Tensor,
    old_logprobs: Tensor,
    batch: TrainBatch,
    normalizer: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    return ppo_policy_loss(
        logprobs,
        old_logprobs,
        batch.advantages,
        batch.action_mask,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.aggregation,
        normalizer=normalizer,
        weights=weights,
    )


def _gspo(
    config: PolicyLossConfig,
    logprobs: Tensor,
    old_logprobs: Tensor,
    batch: TrainBatch,
    normalizer: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    return gspo_policy_loss(
        logprobs,
        old_logprobs,
        batch.advantages,
        batch.action_mask,
        config.clip_low,
        config.clip_high,
        normalizer=normalizer,
        weights=weights,
    )


SURROGATES: Mapping[str, Surrogate] = {"ppo": _ppo, "gspo": _gspo}

_NAMES = {"clip_fraction": "pg_clipfrac", "approx_kl": "ppo_kl", "dual_clip_fraction": "pg_clipfrac_lower"}


def policy_loss(
    config: PolicyLossConfig, logprobs: Tensor, entropies: Tensor, batch: TrainBatch, normalizer: Tensor
) -> LossOutput:
    """Return the loss of a micro-batch.

    Args:
        logprobs: (B, S), under the policy being trained.
        entropies: (B, S), of its distributions.
        batch: the micro-batch; without `old_logprobs` the policy itself is the old one, which is right as long as it
            has not moved.
        normalizer: `config.count` of the mini-batch / ranks.

    Returns:
        terms `pg_loss`; means `entropy_loss` (the entropy), `kl_loss` (the KL) if it is in the loss, and the
        surrogate's, by their usual names.
    """
    mask = batch.action_mask
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    weights, means = None, {}
    if config.tis_cap is not None:
        weights, tis = truncated_importance_weights(old, batch.rollout_logprobs, mask, config.tis_cap, config.tis_level)
        means |= {f"tis_{name}": tis[name] for name in ("weight_mean", "truncated_fraction", "rollout_kl")}
    loss, stats = SURROGATES[config.kind](config, logprobs, old, batch, normalizer, weights)
    means |= {_NAMES.get(name, name): value for name, value in stats.items()}
    terms = {"pg_loss": loss}
    means["entropy_loss"] = masked_mean(entropies, mask)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * aggregate(entropies, mask, config.aggregation, normalizer)
    if config.kl_coef:
        penalty = kl_penalty(logprobs, batch.ref_logprobs, config.kl_kind)
        means["kl_loss"] = masked_mean(penalty, mask)
        loss = loss + config.kl_coef * aggregate(penalty, mask, config.aggregation, normalizer)
    return LossOutput(loss, terms, {name: (value, _weight(config, name, mask)) for name, value in means.items()})


def _weight(config: PolicyLossConfig, name: str, mask: Tensor) -> Tensor:
    """Return the number of things that the mean `name` is taken over."""
    over_sequences = config.tis_level == "sequence" if name.startswith("tis_") else config.kind == "gspo"
    if over_sequences and name not in ("entropy_loss", "kl_loss"):
        return mask.any(dim=1).sum()
    return mask.sum()
