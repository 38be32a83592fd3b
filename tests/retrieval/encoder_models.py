"""Tiny encoders of several families with random weights, saved as their real kin are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from tests.retrieval.support import write_tiny_bert

TEXTS = ["the river", "capital of the planet is 42, or so they say", "x", "", "a longer text: " + "word " * 8]
WIDTH = 64
"""Makes heads of 16 numbers: below that, where no real encoder is, the rounding of attention depends on the threads."""
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


def reference(
    model: PreTrainedModel, source: Path, text: str | tuple[str, str], pooling: str, length: int
) -> np.ndarray:
    """One text, no padding, no batch, all segments 0: the textbook way to use such a model, not normalised."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    parts = text if isinstance(text, tuple) else (text,)
    ids = tokenizer(*parts, return_tensors="pt", truncation=True, max_length=length)["input_ids"]
    with torch.no_grad():
        hidden = model.eval()(input_ids=ids).last_hidden_state[0]
    picked = {"mean": hidden.mean(dim=0), "cls": hidden[0], "max": hidden.max(dim=0).values, "last": hidden[-1]}
    return picked[pooling].numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def write_distilbert(folder: Path) -> Path:
    """A BERT with other layer names and no segments, which the packed network leaves to transformers."""
    write_tiny_bert(folder)
    torch.manual_seed(1)
    config = DistilBertConfig(
        vocab_size=_words(folder), dim=WIDTH, hidden_dim=2 * WIDTH, n_layers=2, n_heads=4, initializer_range=0.3
    )
    return _save(DistilBertModel(config), folder)


def write_xlm_roberta(folder: Path, kind: str = "xlm-roberta") -> Path:
    """XLM-RoBERTa or MPNet: positions are numbered from the padding token's id, and 34 make 32 tokens."""
    folder.mkdir(parents=True)
    words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789.,:!?"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(2)
    sizes = {"vocab_size": len(words), "max_position_embeddings": 34, "pad_token_id": 1, **SHAPE}
    if kind == "mpnet":
        return _save(MPNetModel(MPNetConfig(**sizes)), folder)
    return _save(XLMRobertaModel(XLMRobertaConfig(**sizes, type_vocab_size=1)), folder)


def write_dpr(folder: Path) -> tuple[Path, Path]:
    """A question encoder and a passage encoder with weights of their own."""
    folders = folder / "question", folder / "passage"
    for seed, (target, kind) in enumerate(zip(folders, (DPRQuestionEncoder, DPRContextEncoder), strict=True)):
        write_tiny_bert(target)
        torch.manual_seed(seed)
        _save(kind(DPRConfig(vocab_size=_words(target), max_position_embeddings=128, **SHAPE)), target)
    return folders


def describe(model: Path, folder: Path, files: dict[str, object]) -> Path:
    """Copy a model and put JSON files beside it."""
    shutil.copytree(model, folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), "utf-8")
    return folder


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _words(folder: Path) -> int:
    return len((folder / "vocab.txt").read_text("utf-8").splitlines())
