"""Everything a supervised fine-tuning is configured by."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from verl.algorithms.weighted_nll import Reduction
from verl.single_controller.cluster import RayConfig
from verl.single_controller.placement import HardwareConfig
from verl.trainer.checkpoint import CheckpointConfig
from verl.trainer.sft_data import Overlong, Weighting
from verl.trainer.tracking import TrackingConfig
from verl.workers.lora import LoraConfig
from verl.workers.model import ModelConfig
from verl.workers.optim import OptimConfig


@dataclass(frozen=True)
class SftDataConfig:
    """What is learned.

    Attributes:
        train: file of examples, see `verl.trainer.sft_data`; null where the caller brings them.
        validation: another one, of which only the loss is computed.
        max_length: tokens of the longest example.
        overlong: what becomes of longer ones.
        weighting: where weights come from.
        max_samples: take the first so many rows of `train`.
        shuffle: order the examples anew in each epoch.
    """

    train: Path | None = None
    validation: Path | None = None
    max_length: int = 8192
    overlong: Overlong = "drop"
    weighting: Weighting = "given"
    max_samples: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(
                f"max_length={self.max_length}; expected at least 2 tokens, one to learn and one before it"
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples={self.max_samples}; expected at least 1, or null for all")


@dataclass(frozen=True)
class SftBatchConfig:
    """How examples become optimizer steps.

    Attributes:
        size: examples of one step, over all ranks.
        micro_tokens: most tokens of one forward and backward pass on a rank, padding included.
        inference_tokens: the same for validation.
        packing: lay several examples into one row; none sees another.
        row_tokens: tokens of a packed row; null is `data.max_length`. Attention costs the square of it, except with
            flash_attention_2, where a row is a micro-batch.
    """

    size: int = 64
    micro_tokens: int = 16384
    inference_tokens: int = 32768
    packing: bool = True
    row_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "micro_tokens", "inference_tokens", "row_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")


@dataclass(frozen=True)
class SftLossConfig:
    """How the tokens' losses become one number; formulas in `verl.algorithms.weighted_nll`.

    Attributes:
        micro_batch: of `released_v1`, the examples of a micro-batch, whose sums accumulation averages (published: 2);
            null sums over the whole batch.
    """

    reduction: Reduction = "token_mean"
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch}; expected at least 1")
        if self.micro_batch is not None and self.reduction != "released_v1":
            raise ValueError(f"micro_batch is of reduction=released_v1, not of {self.reduction}; leave it out")


@dataclass(frozen=True)
class SftOptimConfig(OptimConfig):
    """`OptimConfig` with the defaults of fine-tuning; `total_steps` follows from the data unless it is set."""

    lr: float = 1e-5
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = 0.1

    def _check_length(self) -> None:
        pass


@dataclass(frozen=True)
class SftRunConfig:
    """The run itself.

    Attributes:
        folder: gets the model, checkpoints, metrics and the report.
        epochs: visits of every example.
        total_steps: length in optimizer steps, in place of `epochs`.
        test_freq: compute the validation loss every so many steps, and always at the end; 0 only at the end.
        val_before_train: compute it before the first step too.
        resume: `auto` continues from the latest checkpoint in `folder`, `never` starts anew, a path continues there.
        report: write report.md, report.json and the curves at the end.
    """

    folder: Path
    seed: int = 42
    epochs: int = 1
    total_steps: int | None = None
    test_freq: int = 0
    val_before_train: bool = True
    resume: str = "auto"
    report: bool = True
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(save_freq=0, best_metric=None, export_hf=False)
    )

    def __post_init__(self) -> None:
        if self.epochs < 1 or (self.total_steps is not None and self.total_steps < 1):
            raise ValueError(f"epochs={self.epochs}, total_steps={self.total_steps}; expected at least 1")
        if self.test_freq < 0:
            raise ValueError(f"test_freq={self.test_freq}; expected 0 or more")


@dataclass(frozen=True)
class SftConfig:
    """A supervised fine-tuning. `lora` null trains every parameter."""

    model: ModelConfig
    trainer: SftRunConfig
    data: SftDataConfig = field(default_factory=SftDataConfig)
    optim: SftOptimConfig = field(default_factory=SftOptimConfig)
    batch: SftBatchConfig = field(default_factory=SftBatchConfig)
    loss: SftLossConfig = field(default_factory=SftLossConfig)
    lora: LoraConfig | None = None
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def recorded(self) -> SftConfig:
        """Return what goes into files and trackers: without the values of the workers' variables, which may be keys."""
        return replace(self, ray=replace(self.ray, environment=dict.fromkeys(self.ray.environment, "***")))

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row."""
        if self.model.attention == "flash_attention_2":
            return self.batch.micro_tokens
        return self.batch.row_tokens or self.data.max_length

    def optim_over(self, total_steps: int) -> OptimConfig:
        """Return the optimizer's configuration with the length of the run."""
        stated = {item.name: getattr(self.optim, item.name) for item in fields(OptimConfig)}
        return OptimConfig(**{**stated, "total_steps": self.optim.total_steps or total_steps})
