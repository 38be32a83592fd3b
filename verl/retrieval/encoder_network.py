"""Token ids to vectors: a transformers model as it is loaded, and what every network shares (pooling, loading).

`verl.retrieval.encoder_packed` is the faster network that stands in for this one on a CPU wherever it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from verl.errors import ConfigError
from verl.retrieval.encoder_spec import EncoderSpec, Pooling

_PAD_TO = 8
_MIN_TOKENS = 32
_ROWS_PER_THREAD = 4


class Network(Protocol):
    """Turns texts, as token ids, into vectors.

    Attributes:
        width: numbers of a vector, D.
        equal_lengths: whether the texts of a call must have one length.
    """

    width: int
    equal_lengths: bool

    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return (texts, D) float32. No text is empty, and the vector of one does not depend on the others."""
        ...


@dataclass(frozen=True, slots=True)
class Head:
    """What comes after the last hidden states; see `EncoderSpec`."""

    pooling: Pooling
    normalize: bool

    @classmethod
    def of(cls, spec: EncoderSpec) -> Head:
        """Return the head of an encoder."""
        return cls(spec.pooling, spec.normalize)

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Pool hidden states (B, S, D) to (B, D); `lengths` (B,) says how many tokens are the text's, all when None."""
        if self.pooling == "cls":
            return hidden[:, 0]
        if lengths is None:
            if self.pooling == "last":
                return hidden[:, -1]
            return hidden.mean(dim=1) if self.pooling == "mean" else hidden.amax(dim=1)
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths.unsqueeze(1)
        if self.pooling == "mean":
            return hidden.masked_fill(padding.unsqueeze(-1), 0.0).sum(dim=1) / lengths.unsqueeze(1)
        return hidden.masked_fill(padding.unsqueeze(-1), -torch.inf).amax(dim=1)

    def finish(self, pooled: torch.Tensor) -> np.ndarray:
        """Scale pooled vectors (B, D) where the encoder wants it, and hand them over as float32."""
        return (nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled).cpu().numpy()


class TransformersNetwork:
    """Any encoder that transformers loads, on any device; see `Network`.

    On a CPU the texts of a call have one length, so there is no padding, and a text's vector does not depend on its
    batch, measured not even in the last bit. On a GPU texts are padded, and vectors agree up to the rounding of the
    model's dtype.
    """

    def __init__(self, model: PreTrainedModel, head: Head) -> None:
        self._model = model
        self._head = head
        self._device = model.device
        self._longest = positions(model)
        self.width: int = model.config.hidden_size
        self.equal_lengths = self._device.type == "cpu"

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Network.__call__`."""
        if self.equal_lengths:
            return self._head.finish(self._head.pool(self._equal(texts))[: len(texts)])
        lengths = torch.tensor([len(text) for text in texts])
        width = -(-int(lengths.max()) // _PAD_TO) * _PAD_TO
        width = width if self._longest is None else min(width, self._longest)
        tokens = torch.zeros(len(texts), width, dtype=torch.long)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        hidden = self._hidden(tokens, mask)
        return self._head.finish(self._head.pool(hidden, lengths.to(self._device)))

    def _equal(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        # MKL takes another kernel, with other rounding, for a few rows of a matrix: repeat a small batch instead.
        wanted = max(_MIN_TOKENS, _ROWS_PER_THREAD * torch.get_num_threads())
        repeats = -(-wanted // (len(texts[0]) * len(texts)))
        tokens = torch.tensor(list(texts) * repeats)
        return self._hidden(tokens, torch.ones_like(tokens))

    def _hidden(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """tokens, mask: (B, S) int64. Returns (B, S, D) float32."""
        output = self._model(input_ids=tokens.to(self._device), attention_mask=mask.to(self._device))
        return output.last_hidden_state.float()


def positions(model: PreTrainedModel) -> int | None:
    """Return the longest text in tokens that a model has positions for; None where it knows no limit."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding):
        # RoBERTa and its kin number positions from the padding token's id + 1.
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None)


def load_model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model without running code of its own.

    Args:
        source: a local folder or a Hugging Face name.

    Raises:
        ConfigError: it is not there, damaged, no encoder, or its file lacks weights that would be random then.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        loader = _loader(config, source)
        model, report = loader.from_pretrained(source, trust_remote_code=False, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model {source!r} cannot be loaded ({reason}); pass --retriever_model with a local folder or a Hugging "
            "Face name that this machine can reach"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if ".pooler." not in f".{name}")
    if missing:
        raise ConfigError(
            f"model {source!r} lacks {len(missing)} weights of a {type(model).__name__} (the first is {missing[0]}); "
            "they would be random; pass the folder of a complete encoder"
        )
    model.config.use_cache = False  # a decoder would keep keys and values that nobody asks for again
    return _body(model, source).eval()


def _loader(config: PretrainedConfig, source: str) -> type:
    """Return the class that loads the model of `config`."""
    if config.is_encoder_decoder:
        raise ConfigError(f"model {source!r} is a {config.model_type}, an encoder with a decoder; expected an encoder")
    if config.model_type != "dpr":
        return AutoModel
    # AutoModel takes every DPR model for a question encoder and would leave the passage encoder's weights random.
    from transformers import DPRContextEncoder, DPRQuestionEncoder

    known = {"DPRContextEncoder": DPRContextEncoder, "DPRQuestionEncoder": DPRQuestionEncoder}
    found = [name for name in config.architectures or () if name in known]
    if not found or config.projection_dim:
        raise ConfigError(
            f"model {source!r} is a DPR model of architecture {config.architectures} with projection_dim="
            f"{config.projection_dim}; expected {' or '.join(known)} with projection_dim=0"
        )
    return known[found[0]]


def _body(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """Return the part that gives hidden states: DPR wraps a BERT, whose first hidden state is its vector."""
    body = model
    for name in ("question_encoder", "ctx_encoder", "bert_model"):
        body = getattr(body, name, body)
    if not hasattr(body.config, "hidden_size"):
        raise ConfigError(f"model {source!r} is a {type(body).__name__} without hidden_size; expected a text encoder")
    return body
