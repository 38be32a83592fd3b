"""The value function of PPO.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from verl.algorithms.loss import value_loss
from verl.batch import Batch, TrainBatch
from verl.workers.export import export_value_model
from verl.workers.heads import ValueModel
from verl.workers.learner import Learner, LossOutput, UpdateConfig
from verl.workers.model import ModelConfig, gathered, load_value_model
from verl.workers.optim import OptimConfig
from verl.workers.ranks import Ranks


@dataclass(frozen=True)
class CriticConfig:
    """The critic, its optimizer and its loss.

    Attributes:
        value_clip: how far a value may move from the old one before its error stops shrinking.
    """

    model: ModelConfig
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    update: UpdateConfig = field(default_factory=UpdateConfig)
    value_clip: float = 0.5

    def __post_init__(self) -> None:
        if not self.value_clip >= 0:
            raise ValueError(f"value_clip={self.value_clip} is negative; expected a distance in units of the value")


class Critic(Learner[ValueModel]):
    """A value function over the ranks; every method is collective, so all ranks call it."""

    def __init__(self, config: CriticConfig, ranks: Ranks) -> None:
        """Load and shard the model.

        Raises:
            ConfigError: the model does not load.
        """
        super().__init__(load_value_model(config.model), config.model, config.optim, config.update, ranks)
        self._config = config

    def values(self, batch: Batch) -> Tensor:
        """Return (B, S) float32 values of the states before the action tokens of this rank's rows, 0 elsewhere."""

        def forward(micro: Batch) -> Tensor:
            return self.model(micro.input_ids).masked_fill(~micro.action_mask, 0)

        return self._infer(batch, forward)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """Fit the values to the returns.

        Args:
            batch: the whole batch, the same on every rank, with `values` (the old ones) and `returns`.

        Returns:
            Stats as of `Learner._update`, prefixed with `critic/`; the same on every rank.

        Raises:
            ValueError: the batch lacks something.
        """
        if batch.values is None or batch.returns is None:
            raise ValueError("the batch has no values or no returns; call values() and gae() before the update")

        def loss(micro: TrainBatch, normalizer: Tensor) -> LossOutput:
            values = self.model(micro.input_ids)
            mask = micro.action_mask
            error, stats = value_loss(
                values, micro.values, micro.returns, mask, self._config.value_clip, normalizer=normalizer
            )
            means = {"vf_clipfrac": stats["clip_fraction"], "vpred_mean": stats["value_mean"]}
            return LossOutput(error, {"vf_loss": error}, {name: (mean, mask.sum()) for name, mean in means.items()})

        stats = self._update(batch, loss, Tensor.sum)
        return {f"critic/{name}": value for name, value in stats.items()}

    def export_hf(self, folder: Path, tokenizer_path: str) -> None:
        """Write the body as a Hugging Face folder and the head beside it; `ModelConfig.path` takes that folder."""
        self.wake()
        weights = gathered(self.model, self._config.model.compute_dtype)
        export_value_model(self.model, weights, folder, tokenizer_path, self._ranks.rank == 0)
