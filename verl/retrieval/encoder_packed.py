"""A forward pass of BERT and its kin for CPUs: texts of any lengths in one matrix, without padding.

All tokens of a batch form one matrix (T, D) for everything but attention, which runs over each run of texts of one
length, so no number is computed for padding and nothing needs a mask. Weights are packed once for oneDNN, with the
three projections of attention as one and bias, GELU and residual fused in. The rows of these matrix products do not
depend on the other rows, so a text's vector does not depend on its batch: measured, not even in the last bit, for any
number of threads (heads of 16 numbers or more; for smaller ones torch's attention itself rounds as threads go).

Measured with `scripts/bench/encoder.py` on one core (AMD EPYC, Zen 4), all-MiniLM-L6-v2 in float32, questions of about
12 and passages of about 100 tokens, texts per second relative to transformers with batches of 64 padded to the longest:

                                      one question   questions by 64   passages by 64
    transformers, one length at a time        0.7               1.0              1.2
    ONNX Runtime, one length at a time        2.6               1.5              1.6
    this network                       2.1 to 2.3        1.6 to 1.7       1.6 to 1.7

Where both took turns ONNX Runtime was 13 % ahead with one question and 3 % behind with batches, which are what the
service sends: not enough for a second backend. `torch.compile` made transformers 8 % faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from verl.retrieval.encoder_network import Head

_SAME_LAYERS = ("BertModel", "RobertaModel", "XLMRobertaModel")
"""The models of transformers that differ in names and positions only."""


_FILLER = (0,)
"""A text of one token."""
_STEPS = 8
"""Numbers of tokens that a batch can have between one power of two and the next."""


def rounded(tokens: int) -> int:
    """Return the number of tokens that a batch of so many is filled up to, at most an eighth more.

    oneDNN compiles a program for every number of rows that it meets and keeps it, which takes about half a millisecond
    and half a megabyte for each linear map: without this, a service's memory rose by 800 MiB in 20,000 questions.
    """
    step = max(1, 2 ** (tokens.bit_length() - 1) // _STEPS)
    return -(-tokens // step) * step


def can_pack(model: PreTrainedModel) -> bool:
    """Whether `PackedNetwork` computes what `model` does, on this machine."""
    config = model.config
    return (
        type(model).__name__ in _SAME_LAYERS
        and config.hidden_act == "gelu"
        and not config.is_decoder
        and model.dtype == torch.float32
        and model.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        # Operators of torch's own compiler: not documented, so another version may lack them.
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    )


class PackedNetwork:
    """See `verl.retrieval.encoder_network.Network`; holds what it needs of the model and not the model itself."""

    equal_lengths = False

    def __init__(self, model: PreTrainedModel, head: Head) -> None:
        embeddings = model.embeddings
        self.width: int = model.config.hidden_size
        self._head = head
        self._words = embeddings.word_embeddings.weight.detach()
        # No text has a second segment, so the segment's vector goes into the positions' once and for all.
        positions = embeddings.position_embeddings
        self._positions = (positions.weight + embeddings.token_type_embeddings.weight[0]).detach()
        self._padding_id: int | None = positions.padding_idx
        self._norm = _Norm.of(embeddings.LayerNorm)
        self._layers = tuple(_Layer.of(layer) for layer in model.encoder.layer)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Network.__call__`; texts of one length should stand side by side."""
        tokens = sum(map(len, texts))
        padded = [*texts, *[_FILLER] * (rounded(tokens) - tokens)]
        return self._head.finish(self._pooled(padded)[: len(texts)])

    def _pooled(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        runs = tuple((len(list(run)), length) for length, run in groupby(map(len, texts)))
        tokens = torch.tensor(list(chain.from_iterable(texts)))
        hidden = self._norm(nn.functional.embedding(tokens, self._words) + self._position_vectors(tokens, runs))
        for layer in self._layers:
            hidden = layer(hidden, runs)
        return _join([self._head.pool(part) for part in _cut(hidden, runs)])

    def _position_vectors(self, tokens: torch.Tensor, runs: _Runs) -> torch.Tensor:
        """Return the vector of each token's position in its text, (T, D)."""
        if self._padding_id is None:
            return _join([self._positions[:length].repeat(count, 1) for count, length in runs])
        numbers = []
        for part in _cut(tokens, runs):  # as RoBERTa counts: from the padding token's id, which a padding token keeps
            real = (part != self._padding_id).long()
            numbers.append((real.cumsum(dim=1) * real + self._padding_id).view(-1))
        return self._positions[_join(numbers)]


_Runs = Sequence[tuple[int, int]]
"""For every run of texts of one length: (texts, tokens of each)."""


def _cut(packed: torch.Tensor, runs: _Runs) -> list[torch.Tensor]:
    """Cut (T, ...) into its runs, (texts, tokens, ...) each."""
    parts = packed.split([count * length for count, length in runs]) if len(runs) > 1 else [packed]
    return [part.view(*run, *part.shape[1:]) for part, run in zip(parts, runs, strict=True)]


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put tensors one after the other; there is mostly one when a question comes alone, which need not be copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True)
class _Norm:
    """Layer normalisation over the last dimension."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> _Norm:
        return cls(norm.weight.detach(), norm.bias.detach(), norm.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear map whose weights are packed for oneDNN; several side by side count as one."""

    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, *maps: nn.Linear) -> _Linear:
        weight = torch.cat([linear.weight.detach() for linear in maps])
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return cls(packed, torch.cat([linear.bias.detach() for linear in maps]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "gelu", [], "none")

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


@dataclass(frozen=True, slots=True)
class _Layer:
    """Attention and feed-forward of one layer, each followed by its normalisation."""

    heads: int
    query_key_value: _Linear
    attended: _Linear
    attention_norm: _Norm
    up: _Linear
    down: _Linear
    output_norm: _Norm

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer:
        attention = layer.attention.self
        return cls(
            heads=attention.num_attention_heads,
            query_key_value=_Linear.of(attention.query, attention.key, attention.value),
            attended=_Linear.of(layer.attention.output.dense),
            attention_norm=_Norm.of(layer.attention.output.LayerNorm),
            up=_Linear.of(layer.intermediate.dense),
            down=_Linear.of(layer.output.dense),
            output_norm=_Norm.of(layer.output.LayerNorm),
        )

    def __call__(self, x: torch.Tensor, runs: _Runs) -> torch.Tensor:
        """x: (T, D). Returns (T, D)."""
        attended = _join([self._attend(part) for part in _cut(self.query_key_value(x), runs)])
        x = self.attention_norm(self.attended.plus(attended, x))
        return self.output_norm(self.down.plus(self.up.gelu(x), x))

    def _attend(self, part: torch.Tensor) -> torch.Tensor:
        """part: (texts, tokens, 3 D). Returns (texts * tokens, D)."""
        count, length, width = part.shape
        heads = part.view(count, length, 3, self.heads, width // (3 * self.heads))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(count * length, width // 3)
