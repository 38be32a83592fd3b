"""The policy being trained.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from verl.batch import Batch, TrainBatch
from verl.workers.export import export_causal_lm, full_weights, weight_shapes
from verl.workers.heads import LogProbModel
from verl.workers.learner import Learner, LossOutput, UpdateConfig
from verl.workers.model import ModelConfig, load_causal_lm
from verl.workers.optim import OptimConfig
from verl.workers.policy_loss import PolicyLossConfig, policy_loss
from verl.workers.ranks import Ranks


@dataclass(frozen=True)
class ActorConfig:
    """The policy, its optimizer and its loss.

    Attributes:
        temperature: divides the logits, as it did when the tokens were sampled.
    """

    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; the policy that is trained needs more than 0")


class Actor(Learner[LogProbModel]):
    """A policy over the ranks; every method is collective, so all ranks call it."""

    def __init__(self, config: ActorConfig, ranks: Ranks) -> None:
        """Load and shard the model.

        Raises:
            ConfigError: the model does not load or is not supported.
        """
        super().__init__(load_causal_lm(config.model), config.model, config.optim, config.update, ranks)
        self._config = config

    def log_probs(self, batch: Batch) -> Tensor:
        """Return (B, S) float32 log-probabilities of the action tokens of this rank's rows, 0 elsewhere."""

        def forward(micro: Batch) -> Tensor:
            return self.model(micro.input_ids, micro.action_mask, self._config.temperature)[0]

        return self._infer(batch, forward)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """Improve the policy by the loss.

        Args:
            batch: the whole batch, the same on every rank, with `advantages`; also `ref_logprobs` if the KL is in the
                loss, and `old_logprobs` unless the batch is used for a single optimizer step.

        Returns:
            Stats as of `Learner._update`, prefixed with `actor/`; the same on every rank.

        Raises:
            ValueError: the batch lacks something.
        """
        self._check(batch)
        config = self._config

        def loss(micro: TrainBatch, normalizer: Tensor) -> LossOutput:
            wants_entropy = config.loss.entropy_coef != 0
            scored = self.model(micro.input_ids, micro.action_mask, config.temperature, wants_entropy)
            return policy_loss(config.loss, *scored, micro, normalizer)

        stats = self._update(batch, loss, config.loss.count)
        return {f"actor/{name}": value for name, value in stats.items()}

    def full_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter in full under its Hugging Face name, in `dtype` (the compute dtype if None).

        One at a time, on the rank's device; all ranks iterate in step.
        """
        self.wake()
        return full_weights(self.model, dtype or self._config.model.compute_dtype)

    def weight_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return name, dtype and shape of what `full_weights()` yields, in its order, without gathering."""
        return weight_shapes(self.model, self._config.model.compute_dtype)

    def export_hf(self, folder: Path, tokenizer_path: str, dtype: torch.dtype | None = None) -> None:
        """Write a folder that transformers and vLLM load: config, safetensors, tokenizer; rank 0 writes.

        Args:
            dtype: of the written weights; the compute dtype if None.
        """
        weights = self.full_weights(dtype)
        export_causal_lm(self.model.causal_lm, weights, folder, tokenizer_path, self._ranks.rank == 0)

    def _check(self, batch: TrainBatch) -> None:
        if batch.advantages is None:
            raise ValueError("the batch has no advantages; estimate them before the update")
        if self._config.loss.kl_coef and batch.ref_logprobs is None:
            raise ValueError(f"loss.kl_coef={self._config.loss.kl_coef} needs ref_logprobs, which the batch lacks")
        size = self._config.update.mini_batch_size
        several = self._config.update.epochs > 1 or (size is not None and len(batch) > size)
        if several and batch.old_logprobs is None:
            raise ValueError(
                "the batch has no old_logprobs, but serves several optimizer steps, after the first of which the "
                "policy is another; call log_probs before the update"
            )
