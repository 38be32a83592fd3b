"""Tensors of one training step, shapes checked on construction.

Legend: B sequences, S tokens. Sequences are right-padded. Everything of shape (B, S) is aligned with the token it
speaks of: `logprobs[b, s]` is the log-probability of `input_ids[b, s]` given the tokens before it, and `values[b, s]`
is the value of the state just before that token is emitted. Position 0 never holds an action.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What the rollouts produced.

    Attributes:
        input_ids: (B, S) int64, prompt then trajectory, right-padded.
        attention_mask: (B, S) bool, True on real tokens.
        action_mask: (B, S) bool, True on tokens the policy sampled; the only mask that any loss, KL or whitening sees.
        position_ids: (B, S) int64, 0.. on real tokens.
        rollout_logprobs: (B, S) float32, under the sampling policy; 0 outside `action_mask`.
        group_ids: (B,) int64, equal for samples of one question within this batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    position_ids: Tensor
    rollout_logprobs: Tensor
    group_ids: Tensor

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(self.input_ids.shape)}; expected (B, S)")
        shape = tuple(self.input_ids.shape)
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            expected = shape[:1] if item.name == "group_ids" else shape
            if tuple(value.shape) != expected:
                raise ValueError(f"{item.name} has shape {tuple(value.shape)}; expected {expected}")
            dtype = _DTYPES[item.name]
            if value.dtype != dtype:
                raise ValueError(f"{item.name} has dtype {value.dtype}; expected {dtype}")
        if bool((self.action_mask & ~self.attention_mask).any()):
            raise ValueError("action_mask marks padding; actions must lie within attention_mask")
        if shape[1] and bool(self.action_mask[:, 0].any()):
            raise ValueError("action_mask marks position 0; an action needs at least one token before it")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, number of real tokens of each sequence."""
        return self.attention_mask.sum(dim=1)

    def select(self, index: Tensor) -> Batch:
        """Return the rows `index` ((N,) int64), in that order, as a batch of the same class."""
        taken = {f.name: getattr(self, f.name)[index] for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **taken)

    def trimmed(self) -> Batch:
        """Drop the columns that are padding in every row."""
        longest = int(self.lengths.max()) if len(self) else 0
        cut = {
            f.name: getattr(self, f.name)[:, :longest]
            for f in fields(self)
            if f.name != "group_ids" and getattr(self, f.name) is not None
        }
        return replace(self, **cut)


@dataclass(frozen=True)
class TrainBatch(Batch):
    """A batch with everything the updates need; (B, S) float32 each, None where the algorithm does not use it."""

    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, **tensors: Tensor | None) -> TrainBatch:
        """Extend `batch` by the given (B, S) float32 tensors."""
        return cls(**{f.name: getattr(batch, f.name) for f in fields(batch)} | tensors)


@dataclass(frozen=True)
class WeightedBatch(Batch):
    """Rows to learn from. A row may hold several sequences one after the other; `position_ids` start at 0 with each.

    Attributes:
        token_weights: (B, S) float32, what the negative log-likelihood of a token counts in the loss; 0 outside
            `action_mask`, the learned tokens.
    """

    token_weights: Tensor | None = None


_DTYPES = {
    "input_ids": torch.int64,
    "attention_mask": torch.bool,
    "action_mask": torch.bool,
    "position_ids": torch.int64,
    "group_ids": torch.int64,
    "rollout_logprobs": torch.float32,
    "token_weights": torch.float32,
    "old_logprobs": torch.float32,
    "ref_logprobs": torch.float32,
    "values": torch.float32,
    "advantages": torch.float32,
    "returns": torch.float32,
}
