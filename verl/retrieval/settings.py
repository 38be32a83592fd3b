"""The retrievers by name and how each is used; plain data, so that a name or a default costs no torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from verl.errors import ConfigError
from verl.retrieval.encoder_spec import ENCODERS

Stopwords = Literal["english", "none"]


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
