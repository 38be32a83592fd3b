"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): train W + alpha/r B A with W frozen, export the sum.

An adapted layer is still an `nn.Linear` under its old names, so sharding, gathering and exporting need not know of it;
only `merged` does, which adds the product to the weight when it is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from verl.errors import ConfigError

_A, _B = "lora_a", "lora_b"


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and how large.

    Attributes:
        rank: r.
        alpha: the product is scaled by alpha / r.
        dropout: on the input of the adapter.
        targets: last part of the names of the linear layers to adapt; `all-linear` is every one but the output layer.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}; expected at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}; expected more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; expected a share in [0, 1)")
        if not self.targets:
            raise ValueError("targets is empty; name linear layers such as q_proj, or all-linear")


class LoraLinear(nn.Linear):
    """A frozen linear layer with a trained low-rank addition, which is 0 at first."""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        """Take over the parameters of `linear`."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_a = nn.Parameter(linear.weight.new_empty(config.rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self._dropout = config.dropout
        self._scale = config.alpha / config.rank

    def forward(self, input: Tensor) -> Tensor:
        """Apply W + alpha/r B A."""
        low = nn.functional.dropout(input, self._dropout, self.training) if self._dropout else input
        low = nn.functional.linear(nn.functional.linear(low, self.lora_a), self.lora_b)
        return super().forward(input) + self._scale * low


def add_adapters(model: nn.Module, config: LoraConfig) -> int:
    """Freeze `model` and put adapters on the layers that `config` names, before it is sharded.

    Returns:
        The number of trained parameters.

    Raises:
        ConfigError: a target names no linear layer.
    """
    model.requires_grad_(False)
    found = _targets(model, config.targets)
    for name, linear in found.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoraLinear(linear, config))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def merged(
    weights: Iterable[tuple[str, Tensor]], adapted: Collection[str], config: LoraConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Turn the parameters of an adapted model into those of a plain one.

    Args:
        weights: of the adapted model in float32, a layer's weight before its adapter's.
        adapted: names of the layers with an adapter.
        dtype: of what is yielded.
    """
    held: dict[str, Tensor] = {}
    for name, value in weights:
        layer, _, part = name.rpartition(".")
        if layer not in adapted or part == "bias":
            yield name, value.to(dtype)
        elif part == _B:
            product = value @ held.pop(f"{layer}.{_A}")
            yield f"{layer}.weight", (held.pop(f"{layer}.weight") + config.alpha / config.rank * product).to(dtype)
        else:
            held[name] = value


def _targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    output = cast(nn.Module | None, getattr(model, "get_output_embeddings", lambda: None)())
    linear = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not output
    }
    if targets == ("all-linear",):
        return linear
    kinds = {name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(targets) - kinds):
        raise ConfigError(
            f"lora.targets names {', '.join(unknown)}; the model's linear layers are {', '.join(sorted(kinds))}"
        )
    return {name: layer for name, layer in linear.items() if name.rpartition(".")[2] in targets}
