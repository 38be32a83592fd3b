"""AdamW over sharded parameters, the learning-rate schedule, and the check that refuses a broken gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl.errors import CheckpointError


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move. A step of the schedule is one training step, whatever number of mini-batches it has.

    Attributes:
        lr: peak learning rate.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled, on every parameter.
        grad_clip: largest norm of the gradient over all parameters; None does not clip.
        schedule: what follows the warm-up, until `total_steps`.
        warmup_steps: training steps over which the rate rises linearly; None takes `warmup_ratio`.
        warmup_ratio: the same, as a share of `total_steps`.
        min_lr_ratio: where linear and cosine end, as a share of `lr`.
        total_steps: length of the run; needed by `warmup_ratio`, linear and cosine.
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip: float | None = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise ValueError(f"lr={self.lr} is negative")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip={self.grad_clip}; expected more than 0, or null to switch clipping off")
        if not 0 <= self.warmup_ratio <= 1 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}, min_lr_ratio={self.min_lr_ratio}; both are shares")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} is negative")
        self._check_length()

    def _check_length(self) -> None:
        if self.total_steps is None and (self.schedule != "constant" or self._warmup_is_a_share):
            raise ValueError(f"schedule={self.schedule}, warmup_ratio={self.warmup_ratio} need total_steps")

    @property
    def _warmup_is_a_share(self) -> bool:
        return self.warmup_steps is None and self.warmup_ratio > 0

    @property
    def warmup(self) -> int:
        """Training steps of the warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return int(self.warmup_ratio * (self.total_steps or 0))


def learning_rate(config: OptimConfig, step: int) -> float:
    """Return the rate of training step `step` (0 is the first).

    Warm-up step s of w has rate lr * (s + 1) / w, so that the first step is not lost to a rate of 0.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant" or config.total_steps is None:
        return config.lr
    done = min(1.0, (step - config.warmup) / max(1, config.total_steps - config.warmup))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


class Optimizer:
    """AdamW with float32 state that is sharded like the parameters."""

    def __init__(self, model: nn.Module, config: OptimConfig, rest_on_cpu: bool) -> None:
        """Optimise the trainable parameters of a sharded `model`.

        Args:
            rest_on_cpu: keep the state on the CPU between steps.
        """
        self.config = config
        self._rest_on_cpu = rest_on_cpu
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in self._named]
        self._adam = torch.optim.AdamW(
            self._parameters, config.lr, config.betas, config.eps, config.weight_decay, fused=True
        )
        # Allocated now and not by the first step, so that a checkpoint has the same entries before and after it.
        for parameter in self._parameters:
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._training_steps = torch.zeros((), dtype=torch.int64)
        self.rest()

    @property
    def lr(self) -> float:
        """The rate of the current training step."""
        return learning_rate(self.config, int(self._training_steps))

    def gradient_norm(self) -> float:
        """Return the norm of the gradient over all parameters and ranks; every rank must call it."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, gradient_norm: float) -> None:
        """Clip the gradients, which have the given norm, and move the parameters."""
        if self.config.grad_clip is not None and gradient_norm > self.config.grad_clip:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.config.grad_clip / gradient_norm)
        for group in self._adam.param_groups:
            group["lr"] = self.lr
        self._place_like_parameters()
        self._adam.step()
        self.rest()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def end_training_step(self) -> None:
        """Move the schedule on by one."""
        self._training_steps += 1

    def rest(self) -> None:
        """Send the state to the CPU if it is to rest there."""
        if self._rest_on_cpu:
            self.offload()

    def offload(self) -> None:
        """Send the state to the CPU; the next step fetches it."""
        for state in self._adam.state.values():
            state.update({name: value.to("cpu") for name, value in state.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by name."""
        state = {
            f"{name}.{key}": value
            for name, parameter in self._named
            for key, value in self._adam.state[parameter].items()
        }
        return state | {"training_steps": self._training_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state`, which `state_dict` of an optimizer of the same parameters returned, into this one."""
        copy_tensors(self.state_dict(), state)

    def _place_like_parameters(self) -> None:
        for parameter, state in self._adam.state.items():
            state.update({name: value.to(parameter.device) for name, value in state.items()})


@torch.no_grad()
def copy_tensors(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copy `sources` into `targets` entry by entry.

    Raises:
        CheckpointError: the two do not have the same names and shapes; then nothing is copied.
    """
    if different := sorted(set(targets) ^ set(sources)):
        raise CheckpointError(
            f"{len(different)} entries are on one side only, such as {different[0]!r}; the state is of another model"
        )
    for name, target in targets.items():
        if target.shape != sources[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(sources[name].shape)}; expected {tuple(target.shape)}: the state is of "
                "another model"
            )
    for name, target in targets.items():
        target.copy_(sources[name])
