"""A batch of sequences that decode side by side: left-padded, with a key-value cache, open to joining and leaving.

Legend: B rows, S tokens of the longest row, V vocabulary. Keys are cached with their rotary positions applied, and
positions count real tokens only, so a row may gain or lose padding on its left at any time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel


class DecodingBatch:
    """Rows of token ids over one model; call under `torch.inference_mode`."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
        mask = torch.zeros((len(prompts), longest), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self._model = model
        self._ids = ids.to(model.device)  # (B, S) before the first forward pass, (B, 1) after: what is not cached yet
        self._mask = mask.to(model.device)  # (B, S)
        self._cache = DynamicCache()

    def forward(self) -> Tensor:
        """Return the logits of every row's next token: (B, V)."""
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        output = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def append(self, ids: Tensor) -> None:
        """Continue every row by one token, (B,) int64."""
        self._ids = ids[:, None]
        self._mask = pad(self._mask, (0, 1), value=1)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the rows `rows`, at least one, in that order, and drop the columns that are padding in all of them."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._mask.device)
        self._ids, mask = self._ids[index], self._mask[index]
        padding = int(mask.argmax(dim=1).min())
        self._mask = mask[:, padding:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[index, :, padding:]
            layer.values = layer.values[index, :, padding:]

    def join(self, other: DecodingBatch) -> None:
        """Take the rows of `other` in, behind these; both must be waiting for their next forward pass."""
        width = max(self._mask.shape[1], other._mask.shape[1])
        mine, theirs = width - self._mask.shape[1], width - other._mask.shape[1]
        self._ids = torch.cat([self._ids, other._ids])
        self._mask = torch.cat([pad(self._mask, (mine, 0)), pad(other._mask, (theirs, 0))])
        for layer, joining in zip(self._cache.layers, other._cache.layers, strict=True):
            layer.keys = torch.cat([_widen(layer.keys, mine), _widen(joining.keys, theirs)])
            layer.values = torch.cat([_widen(layer.values, mine), _widen(joining.values, theirs)])


def _widen(states: Tensor, columns: int) -> Tensor:
    """(B, heads, S, width) -> (B, heads, columns + S, width), zeros on the left."""
    return pad(states, (0, 0, columns, 0))
