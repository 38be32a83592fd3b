import math

import pytest
import torch
from torch import nn

from verl.errors import CheckpointError
from verl.workers.optim import OptimConfig, Optimizer, copy_tensors, learning_rate


def rates(config: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(config, step) for step in range(steps)]


def test_warm_up_then_constant() -> None:
    assert rates(OptimConfig(lr=1.0, warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(OptimConfig(lr=1.0, warmup_ratio=0.5, total_steps=4), 3) == [0.5, 1.0, 1.0]
    assert rates(OptimConfig(lr=1.0), 2) == [1.0, 1.0]


def test_decay_ends_at_the_floor_and_stays_there() -> None:
    linear = OptimConfig(lr=1.0, schedule="linear", warmup_steps=2, total_steps=6, min_lr_ratio=0.2)
    assert rates(linear, 8) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    cosine = OptimConfig(lr=2.0, schedule="cosine", total_steps=4)
    wanted = [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0]
    assert rates(cosine, 6) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"schedule": "cosine"}, "total_steps"),
        ({"warmup_ratio": 0.1}, "total_steps"),
        ({"grad_clip": 0.0}, "grad_clip"),
        ({"lr": -1.0}, "lr"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_nonsense_is_refused(changes: dict, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        OptimConfig(**changes)


def test_clipping_scales_to_the_limit_and_only_above_it() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = Optimizer(model, OptimConfig(grad_clip=1.0, lr=0.0), rest_on_cpu=True)
    for gradient, wanted in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        model.weight.grad = torch.tensor([gradient])
        norm = optimizer.gradient_norm()
        assert norm == pytest.approx(math.hypot(*gradient))
        optimizer.step(norm)
        assert model.weight.grad[0].tolist() == pytest.approx(wanted)


def test_state_of_another_model_is_refused_and_nothing_is_copied() -> None:
    mine = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="2 entries"):
        copy_tensors(mine, {"a": torch.ones(2), "c": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"b has shape \(3,\)"):
        copy_tensors(mine, {"a": torch.ones(2), "b": torch.ones(3)})
    assert not mine["a"].any()
