"""Draw the next tokens of a batch from its logits. Legend: B rows, V vocabulary.

Semantics are vLLM's (`logprobs_mode="processed_logprobs"`): temperature, then top-k, then top-p, then the
log-probabilities of what is left; a greedy row (temperature 0) is neither scaled nor truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.agent.protocols import Sampling


@dataclass(frozen=True)
class RowSampling:
    """The sampling parameters of a batch.

    Attributes:
        temperature: (B,) float32; 0 is greedy.
        top_p: (B,) float32 in (0, 1].
        top_k: (B,) int64; V or more keeps everything.
        generators: one per row, on the logits' device, so that a row's draws do not depend on its batch.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    generators: tuple[torch.Generator, ...]

    @classmethod
    def of(cls, rows: Sequence[Sampling], seeds: Sequence[int], device: torch.device) -> RowSampling:
        """Collect the parameters of `rows`; `seeds[b]` seeds row b."""
        everything = torch.iinfo(torch.int64).max
        return cls(
            temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device),
            top_p=torch.tensor([row.top_p for row in rows], dtype=torch.float32, device=device),
            top_k=torch.tensor([row.top_k if row.top_k > 0 else everything for row in rows], device=device),
            generators=tuple(torch.Generator(device).manual_seed(seed) for seed in seeds),
        )

    def join(self, other: RowSampling) -> RowSampling:
        """Return these rows and then those of `other`."""
        return RowSampling(
            torch.cat([self.temperature, other.temperature]),
            torch.cat([self.top_p, other.top_p]),
            torch.cat([self.top_k, other.top_k]),
            self.generators + other.generators,
        )

    def select(self, index: Sequence[int]) -> RowSampling:
        """Return the rows `index`, in that order."""
        return RowSampling(
            self.temperature[list(index)],
            self.top_p[list(index)],
            self.top_k[list(index)],
            tuple(self.generators[i] for i in index),
        )


def sample(logits: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: (B, V), any floating dtype.

    Returns:
        ids (B,) int64 and their log-probabilities (B,) float32 under the distribution they were drawn from.
    """
    logprobs = processed_logprobs(logits.float(), rows)
    ids = logprobs.argmax(dim=-1)
    drawn = [b for b, temperature in enumerate(rows.temperature.tolist()) if temperature > 0]
    if drawn:
        # argmax_v p_v / e_v with e_v ~ Exp(1) is distributed as p (Gumbel-max).
        noise = torch.stack(
            [torch.empty_like(logprobs[b]).exponential_(generator=rows.generators[b]).log() for b in drawn]
        )
        ids[drawn] = (logprobs[drawn] - noise).argmax(dim=-1)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


def processed_logprobs(logits: Tensor, rows: RowSampling) -> Tensor:
    """Return (B, V) float32 log-probabilities after temperature, top-k and top-p; -inf where truncated away."""
    greedy = rows.temperature == 0
    scaled = logits / torch.where(greedy, 1.0, rows.temperature)[:, None]
    top_k = torch.where(greedy, logits.shape[-1], rows.top_k.clamp(max=logits.shape[-1]))
    top_p = torch.where(greedy, 1.0, rows.top_p)
    if bool((top_k < logits.shape[-1]).any()) or bool((top_p < 1).any()):
        scaled = _truncate(scaled, top_k, top_p)
    return scaled.log_softmax(dim=-1)


def _truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf what lies outside the k best and the smallest set of best tokens that holds probability `top_p`."""
    ordered, order = logits.sort(dim=-1, descending=True)
    kth = ordered.gather(1, (top_k - 1)[:, None])
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    ordered = ordered.masked_fill(outside, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, ordered)
