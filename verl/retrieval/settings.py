"""The retrievers by name and how each is used; plain data, so that a name or a default costs no torch import."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from verl.errors import ConfigError
from verl.retrieval.encoder_spec import ENCODERS

LuceneStemmer = Literal["porter", "krovetz", "none"]
LuceneStopwords = Literal["english", "none"]
QuerySyntax = Literal["bag_of_words", "boolean"]
OnSyntaxError = Literal["error", "bag_of_words"]


@dataclass(frozen=True, slots=True)
class BM25Config:
    """BM25 parameters and text analysis; the defaults are those of Anserini and Pyserini for English.

    Attributes:
        k1: saturation of the term frequency.
        b: weight of the document length, 0 to 1.
        stopwords: `english` drops Lucene's 33 English stop words; `none` keeps every word; otherwise the words to
            drop, separated by commas (`der,die,das`).
        stemmer: a Snowball algorithm of PyStemmer (`porter` is Lucene's for English), or `none`.
    """

    k1: float = 0.9
    b: float = 0.4
    stopwords: str = "english"
    stemmer: str = "porter"

    def __post_init__(self) -> None:
        _check_bm25("bm25", self.k1, self.b)
        if self.stopwords not in ("english", "none") and not self.stopword_list:
            raise ConfigError(
                f"bm25 stopwords={self.stopwords!r}; expected english, none, or words separated by commas"
            )

    @property
    def stopword_list(self) -> tuple[str, ...]:
        """The words that `stopwords` itself lists, lower case."""
        words = [word.strip().lower() for word in self.stopwords.split(",")]
        return tuple(word for word in words if word) if len(words) > 1 else ()


@dataclass(frozen=True, slots=True)
class LuceneConfig:
    """How Lucene indexes and searches; the defaults are those of Anserini and Pyserini for English.

    `stopwords`, `stemmer` and `store_documents` are fixed when an index is built. The others are settings of the
    search: what an index was built with is only their default.

    Attributes:
        k1: saturation of the term frequency.
        b: weight of the document length, 0 to 1.
        stopwords: `english` drops Lucene's 33 English stop words; `none` keeps every word.
        stemmer: Lucene's stemmer for English, or `none`.
        store_documents: keep the documents in the index, which can then be searched without their corpus.
        query_syntax: `bag_of_words` ignores operators; `boolean` obeys AND, OR, NOT, quotes and parentheses, see
            `verl.retrieval.lucene_query`.
        on_syntax_error: what a malformed Boolean query gets: an `error`, or the results of its `bag_of_words`.
    """

    k1: float = 0.9
    b: float = 0.4
    stopwords: LuceneStopwords = "english"
    stemmer: LuceneStemmer = "porter"
    store_documents: bool = True
    query_syntax: QuerySyntax = "bag_of_words"
    on_syntax_error: OnSyntaxError = "error"

    def __post_init__(self) -> None:
        _check_bm25("lucene", self.k1, self.b)
        for name, options in (
            ("stopwords", LuceneStopwords),
            ("stemmer", LuceneStemmer),
            ("query_syntax", QuerySyntax),
            ("on_syntax_error", OnSyntaxError),
        ):
            if getattr(self, name) not in get_args(options):
                raise ConfigError(f"lucene {name}={getattr(self, name)!r}; expected {' or '.join(get_args(options))}")


@dataclass(frozen=True, slots=True)
class LuceneSearch:
    """Settings of a search in place of those that a Lucene index was built with; None leaves one as it is."""

    k1: float | None = None
    b: float | None = None
    query_syntax: QuerySyntax | None = None
    on_syntax_error: OnSyntaxError | None = None

    def over(self, config: LuceneConfig) -> LuceneConfig:
        """Return `config` with these settings.

        Raises:
            ConfigError: one of them is not allowed.
        """
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(config, **{name: value for name, value in given.items() if value is not None})


def _check_bm25(engine: str, k1: float, b: float) -> None:
    if not (0 <= k1 < math.inf and 0 <= b <= 1):
        raise ConfigError(f"{engine} k1={k1}, b={b}; expected a finite k1 of at least 0 and b between 0 and 1")


RETRIEVERS: tuple[str, ...] = ("bm25", *ENCODERS, "lucene")


def check_retriever(name: str) -> None:
    """Refuse a retriever that does not exist.

    Raises:
        ConfigError: lists the names that do.
    """
    if name not in RETRIEVERS:
        raise ConfigError(f"retriever_name={name!r} is unknown; expected one of {', '.join(RETRIEVERS)}")
