"""How BM25 turns text into index terms, for a query and for blocks of documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from verl.errors import ConfigError
from verl.retrieval.settings import BM25Config

_WORD = re.compile(r"\w+")
_POSSESSIVE = re.compile(r"['’]s\b")


class Analyzer:
    """Turns text into index terms: lower case, no possessive, words, no stop words, stems.

    Raises:
        ConfigError: PyStemmer has no such stemmer.
    """

    def __init__(self, config: BM25Config) -> None:
        if config.stemmer != "none" and config.stemmer not in Stemmer.algorithms():
            known = ", ".join(["none", *Stemmer.algorithms()])
            raise ConfigError(f"bm25 stemmer={config.stemmer!r} is unknown; expected one of {known}")
        listed = STOPWORDS_EN if config.stopwords == "english" else config.stopword_list
        self._stopwords = frozenset(listed)
        self._stem: Callable[[list[str]], list[str]] = (
            list if config.stemmer == "none" else Stemmer.Stemmer(config.stemmer).stemWords
        )

    def __call__(self, text: str) -> list[str]:
        """Return the terms of `text`, in order, repeated ones included."""
        return self._stem([word for word in words(text) if word not in self._stopwords])

    def term(self, word: str) -> str | None:
        """Return the term of one word, None for a stop word."""
        return None if word in self._stopwords else self._stem([word])[0]

    def count(self, texts: Sequence[str]) -> TermCounts:
        """Count the terms of several texts; the same terms as one call per text, but each word is stemmed once."""
        known = _TermIds(self)
        ids: list[int] = []
        lengths = np.empty(len(texts), np.int64)
        for at, text in enumerate(texts):
            before = len(ids)
            ids.extend(map(known.__getitem__, words(text)))
            lengths[at] = len(ids) - before
        terms = np.array(ids, np.int64)
        documents = np.repeat(np.arange(len(texts)), lengths)[terms >= 0]
        width = max(len(known.terms), 1)
        pairs, counts = np.unique(documents * width + terms[terms >= 0], return_counts=True)
        return TermCounts(
            vocabulary=list(known.terms),
            terms=(pairs % width).astype(np.int32),
            counts=counts.astype(np.int32),
            distinct=np.bincount(pairs // width, minlength=len(texts)).astype(np.int32),
            lengths=np.bincount(documents, minlength=len(texts)).astype(np.int32),
        )


@dataclass(frozen=True, slots=True)
class TermCounts:
    """The terms of a block of documents; documents in order, each with its distinct terms in rising order.

    Attributes:
        vocabulary: the terms of the block in the order in which they first occur.
        terms: (entries,) int32, positions in `vocabulary`.
        counts: (entries,) int32, how often the document holds the term.
        distinct: (documents,) int32, how many entries are the document's.
        lengths: (documents,) int32, terms of the document, repeated ones included.
    """

    vocabulary: list[str]
    terms: np.ndarray
    counts: np.ndarray
    distinct: np.ndarray
    lengths: np.ndarray


class _TermIds(dict[str, int]):
    """Maps words to the ids of their terms, -1 for stop words; a word that was not seen before is analysed."""

    def __init__(self, analyzer: Analyzer) -> None:
        super().__init__()
        self._analyzer = analyzer
        self.terms: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        term = self._analyzer.term(word)
        self[word] = -1 if term is None else self.terms.setdefault(term, len(self.terms))
        return self[word]


def words(text: str) -> list[str]:
    """Return the words of `text`, lower case, without possessive endings."""
    return _WORD.findall(_POSSESSIVE.sub("", text.lower()))
