"""What a language model is asked here: the log-probabilities of given tokens, or the values of states.

Legend: B sequences, S tokens, V vocabulary, H hidden width, N selected tokens.

Both modules run the whole computation in their `forward`, because under FSDP2 the output layer belongs to the root's
parameter group, which is gathered only while the root's forward runs. They take no attention mask and no positions:
batches are right-padded and positions count from 0 (see verl/batch.py), so under a causal mask no real token ever sees
padding, and leaving the mask out allows the fastest attention kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from verl.algorithms.loss import entropy

HEAD_FILE = "value_head.safetensors"
HEAD_NAME = "head.weight"


class LogProbModel(nn.Module):
    """A causal language model that returns log-probabilities and entropies instead of logits."""

    def __init__(self, causal_lm: PreTrainedModel, chunk_tokens: int) -> None:
        """Wrap `causal_lm`; the logits of at most `chunk_tokens` tokens exist at one time."""
        super().__init__()
        self.causal_lm = causal_lm
        self.chunk_tokens = chunk_tokens

    @property
    def backbone(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        return self.causal_lm

    def forward(
        self, input_ids: Tensor, mask: Tensor, temperature: float = 1.0, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy of the masked tokens.

        Args:
            input_ids: (B, S) int64, right-padded.
            mask: (B, S) bool, the tokens to speak of; position 0 cannot be one of them.
            temperature: divides the logits.
            entropy_grad: whether the entropy is to be differentiated.

        Returns:
            logprobs and entropies, (B, S) float32 each, 0 outside the mask. `logprobs[b, s]` is that of
            `input_ids[b, s]` given the tokens before it, `entropies[b, s]` that of the distribution it came from.
        """
        hidden = self.causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        before = mask[:, 1:]
        picked = self._score(hidden[:, :-1][before], input_ids[:, 1:][before], temperature, entropy_grad)
        blank = torch.zeros(input_ids.shape, dtype=torch.float32, device=input_ids.device)
        return blank.masked_scatter(mask, picked[0]), blank.masked_scatter(mask, picked[1])

    def _score(self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        """Score (N, H) states against (N,) targets chunk by chunk; (N,) float32 each."""
        # One chunk even of no tokens: on every rank the output layer must take part in the backward pass.
        pairs = zip(hidden.split(self.chunk_tokens), targets.split(self.chunk_tokens), strict=True)
        if torch.is_grad_enabled():
            # Without it, autograd would keep every chunk's logits, which is all of them.
            scored = [
                checkpoint(self._score_chunk, *pair, temperature, entropy_grad, use_reentrant=False) for pair in pairs
            ]
        else:
            scored = [self._score_chunk(*pair, temperature, entropy_grad) for pair in pairs]
        logprobs, entropies = zip(*scored, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score_chunk(
        self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        logits = self.causal_lm.get_output_embeddings()(hidden).float() / temperature
        logprobs = -nn.functional.cross_entropy(logits, targets, reduction="none")
        return logprobs, entropy(logits if entropy_grad else logits.detach())


class ValueModel(nn.Module):
    """The body of a causal language model with a scalar head."""

    def __init__(self, body: PreTrainedModel) -> None:
        """Put a head of zeros on `body`."""
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @property
    def backbone(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        return self.body

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return (B, S) float32: the value of the state just before each token of (B, S) `input_ids`; 0 at position 0.

        The head computes in float32 even when the body does not.
        """
        hidden = self.body(input_ids=input_ids, use_cache=False).last_hidden_state
        after = self.head(hidden.float()).squeeze(-1)
        return nn.functional.pad(after[:, :-1], (1, 0))
