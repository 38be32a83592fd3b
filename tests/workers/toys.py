"""Tiny random models and batches for the training workers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from verl.batch import TrainBatch

VOCABULARY = 97
KINDS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def tiny_config(kind: str = "qwen2", tied: bool = False) -> PreTrainedConfig:
    """Two layers of width 64; vLLM's CPU kernels want heads of width 32 at least."""
    extra = {"head_dim": 32} if kind == "qwen3" else {}
    return KINDS[kind](
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )


def save_model(folder: Path, kind: str = "qwen2", tied: bool = False, seed: int = 0) -> PreTrainedModel:
    """Write a random model with a tokenizer; its weights are large enough that its distributions are not flat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, tied), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))).save_pretrained(folder)
    return model


def toy_batch(rows: int = 7, width: int = 20, seed: int = 0) -> TrainBatch:
    """Random sequences of different lengths with several runs of action tokens and everything an update can need."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, width + 1, (rows,), generator=generator)
    lengths[0] = width
    attention = torch.arange(width) < lengths[:, None]
    action = attention & (torch.rand(rows, width, generator=generator) < 0.5)
    action[:, :3] = False
    action[:, 4] = True

    def noise(scale: float, centre: float = 0.0) -> torch.Tensor:
        return (centre + scale * torch.randn(rows, width, generator=generator)).masked_fill(~action, 0.0)

    return TrainBatch(
        input_ids=torch.randint(3, VOCABULARY, (rows, width), generator=generator).masked_fill(~attention, 0),
        attention_mask=attention,
        action_mask=action,
        position_ids=torch.arange(width).expand(rows, width).masked_fill(~attention, 0),
        rollout_logprobs=noise(0.3, -4.0),
        group_ids=torch.arange(rows) // 2,
        old_logprobs=noise(0.3, -4.0),
        ref_logprobs=noise(0.3, -4.0),
        values=noise(0.1),
        advantages=noise(1.0),
        returns=noise(1.0),
    )
