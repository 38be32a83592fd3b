"""The frozen policy that the KL is measured against.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from verl.batch import Batch
from verl.workers.learner import infer
from verl.workers.model import ModelConfig, Residence, load_causal_lm, shard
from verl.workers.ranks import Ranks


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference.

    Attributes:
        inference_tokens: most tokens of one forward pass on a rank, padding included.
        temperature: divides the logits; the actor's, because a KL compares the distributions that were sampled.
    """

    model: ModelConfig
    inference_tokens: int = 32768
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.inference_tokens < 1:
            raise ValueError(f"inference_tokens={self.inference_tokens}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; expected more than 0")


class Reference:
    """A frozen policy over the ranks; every method is collective, so all ranks call it."""

    def __init__(self, config: ReferenceConfig, ranks: Ranks) -> None:
        """Load, freeze and shard the model.

        Raises:
            ConfigError: the model does not load or is not supported.
        """
        self._config = config
        self._ranks = ranks
        self._model = load_causal_lm(config.model).requires_grad_(False)
        shard(self._model, config.model, ranks)
        self._residence = Residence(self._model, config.model, ranks)

    def log_probs(self, batch: Batch) -> Tensor:
        """Return (B, S) float32 log-probabilities of the action tokens of this rank's rows, 0 elsewhere."""

        def forward(micro: Batch) -> Tensor:
            return self._model(micro.input_ids, micro.action_mask, self._config.temperature)[0]

        self._residence.wake()
        return infer(self._model, batch, forward, self._config.inference_tokens, self._ranks)

    def sleep(self) -> None:
        """Send the parameters to the CPU; the next `log_probs` fetches them."""
        self._residence.sleep()
