"""Text to vectors with a transformers encoder, as `verl.retrieval.settings` says each family wants it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from verl.errors import ConfigError
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig, EncoderSpec

logger = logging.getLogger(__name__)

_PAD_TO = 8
_MIN_TOKENS = 32


class Encoder:
    """A loaded encoder.

    A text is padded to a length that depends on that text alone (a multiple of 8 tokens) and only meets texts
    of that length, so its vector does not depend on the texts around it: on a CPU, measured, not even in the last bit.
    That is also why batches hold hardly any padding.

    Attributes:
        truncated: how many texts were cut at `spec.max_length` so far.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, spec: EncoderSpec, config: EncoderConfig
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self.spec = spec
        self.width: int = model.config.hidden_size
        self.truncated = 0

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Return the vectors of `queries`, (queries, D) float32."""
        return self._encode([self.spec.query_prefix + query for query in queries], "query")

    def encode_passages(self, passages: Sequence[str]) -> np.ndarray:
        """Return the vectors of `passages`, (passages, D) float32."""
        return self._encode([self.spec.passage_prefix + passage for passage in passages], "passage")

    def _encode(self, texts: Sequence[str], kind: str) -> np.ndarray:
        ids = self._token_ids(texts, kind)
        vectors = np.empty((len(ids), self.width), dtype=np.float32)
        for rows in self._batches([len(row) for row in ids]):
            vectors[rows] = self._forward([ids[row] for row in rows])
        return vectors

    def _token_ids(self, texts: Sequence[str], kind: str) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self.spec.max_length)
        cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings or [])
        if cut and not self.truncated:
            logger.warning("a %s is longer than %d tokens; read up to there and counted", kind, self.spec.max_length)
        self.truncated += cut
        return encoded["input_ids"]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield row numbers in groups of equal padded length, the longest first, so that memory peaks at once."""
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(_padded(length), []).append(row)
        for width in sorted(groups, reverse=True):
            rows = groups[width]
            for start in range(0, len(rows), self._config.batch_size):
                yield rows[start : start + self._config.batch_size]

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        """Encode texts of one padded length; returns (texts, D) float32."""
        width = _padded(len(ids[0]))
        # Matrix libraries take another kernel, with other rounding, for very few rows: repeat a small batch instead.
        repeated = ids * max(1, -(-_MIN_TOKENS // (width * len(ids))))
        padding = self._tokenizer.pad_token_id or 0
        tokens = torch.tensor([row + [padding] * (width - len(row)) for row in repeated], device=self._model.device)
        lengths = torch.tensor([len(row) for row in repeated], device=self._model.device)
        mask = (torch.arange(width, device=self._model.device) < lengths.unsqueeze(1)).long()
        hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        vectors = _pool(hidden, mask, self.spec)
        return vectors[: len(ids)].cpu().numpy()


def load_encoder(name: str, model: str | None = None, config: EncoderConfig | None = None) -> Encoder:
    """Load an encoder.

    Args:
        name: a key of `verl.retrieval.settings.ENCODERS`; says how the model is used.
        model: path or Hugging Face name; the spec's own model when None.

    Raises:
        ConfigError: unknown name, a device that is not there, or a model that cannot be loaded.
    """
    if name not in ENCODERS:
        raise ConfigError(f"encoder {name!r} is unknown; expected one of {', '.join(ENCODERS)}")
    spec, config = ENCODERS[name], config or EncoderConfig()
    source = model or default_model(spec)
    device = _device(config)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        network = AutoModel.from_pretrained(source, trust_remote_code=False, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"encoder {name}: model {source!r} cannot be loaded ({reason}); pass --retriever_model with a local "
            "folder or a Hugging Face name that this machine can reach"
        ) from error
    positions = getattr(network.config, "max_position_embeddings", 2 * spec.max_length)
    spec = replace(spec, max_length=_max_length(spec, positions))
    return Encoder(network.to(device).eval(), tokenizer, spec, config)


def _device(config: EncoderConfig) -> torch.device:
    """Return the configured device, once it is certain that something can be put there."""
    if config.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=config.device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"encoder device={config.device!r} is not there ({reason}); pass cpu, or cuda:N") from error


def default_model(spec: EncoderSpec) -> str:
    """Return the folder of the spec's model inside its package where that is installed, else its Hugging Face name."""
    found = importlib.util.find_spec(spec.package) if spec.package else None
    for location in (found.submodule_search_locations or []) if found else []:
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return str(folder)
    return spec.model


def _padded(length: int) -> int:
    """Return the multiple of 8 above `length`: never `length` itself, so that attention always runs with a mask."""
    return (length // _PAD_TO + 1) * _PAD_TO


def _max_length(spec: EncoderSpec, positions: int) -> int:
    """Return the longest text in tokens whose padded length the model has positions for."""
    return min(spec.max_length, positions // _PAD_TO * _PAD_TO - 1)


def _pool(hidden: torch.Tensor, mask: torch.Tensor, spec: EncoderSpec) -> torch.Tensor:
    """hidden: (B, S, D) float32; mask: (B, S), 1 on the text's tokens. Returns (B, D)."""
    if spec.pooling == "cls":
        pooled = hidden[:, 0]
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.nn.functional.normalize(pooled, dim=-1) if spec.normalize else pooled
