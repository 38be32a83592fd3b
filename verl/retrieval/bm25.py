"""BM25 over bm25s, with the analysis and the parameters of Lucene's English default, memory-mapped."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
from bm25s.stopwords import STOPWORDS_EN
from tqdm import tqdm

from verl.errors import ConfigError, DataError
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import IndexInfo, check_topk, engine_info
from verl.retrieval.ranking import best_first
from verl.retrieval.settings import BM25Config
from verl.typed import Decoder
from verl.types import SearchResult

_FILES = "bm25"
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
        self._stopwords = frozenset(STOPWORDS_EN) if config.stopwords == "english" else frozenset()
        self._stem: Callable[[list[str]], list[str]] = (
            list if config.stemmer == "none" else Stemmer.Stemmer(config.stemmer).stemWords
        )

    def __call__(self, text: str) -> list[str]:
        """Return the terms of `text`, in order, repeated ones included."""
        words = _WORD.findall(_POSSESSIVE.sub("", text.lower()))
        return self._stem([word for word in words if word not in self._stopwords])


class BM25Engine:
    """Searches a BM25 index.

    A document is a hit only if it shares a term with the query: a query without any indexed term gets no documents,
    and one that matches fewer than `topk` gets those that match, rather than arbitrary ones with score 0. A term that
    occurs twice in a query counts twice, as in Lucene's bag of words. Each query is scored by itself, so its result
    does not depend on the batch it comes in.
    """

    def __init__(self, info: IndexInfo, index: bm25s.BM25, analyzer: Analyzer, corpus: Corpus) -> None:
        self.info = engine_info(info)
        self._index = index
        self._vocabulary: Mapping[str, int] = index.vocab_dict
        self._analyzer = analyzer
        self.corpus = corpus

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """See `verl.retrieval.engine.Engine.search`."""
        check_topk(topk, self.info)
        return [self._search(query, topk) for query in queries]

    def _search(self, query: str, topk: int) -> SearchResult:
        terms = [self._vocabulary[term] for term in self._analyzer(query) if term in self._vocabulary]
        if not terms:
            return SearchResult(query, (), ())
        scores = self._index.get_scores_from_ids(terms)
        rows = candidates(scores, topk)
        return best_first(self.corpus, query, rows, scores[rows], topk)

    def close(self) -> None:
        """See `verl.retrieval.engine.Engine.close`."""


def candidates(scores: np.ndarray, topk: int) -> np.ndarray:
    """Return the rows with a positive score of at least the `topk`-th best one, in row order.

    Args:
        scores: (documents,) float32, none negative.

    Returns:
        (at least topk, if so many are positive,) int64
    """
    floor = np.partition(scores, -topk)[-topk]
    return np.flatnonzero(scores >= floor) if floor > 0 else np.flatnonzero(scores > 0)


def write_index(corpus: Corpus, folder: Path, config: BM25Config) -> IndexInfo:
    """Index `corpus` into `folder`.

    Raises:
        DataError: no document of the corpus holds an indexable word.
    """
    _quiet_bm25s()
    vocabulary: dict[str, int] = {}
    documents = [
        [vocabulary.setdefault(term, len(vocabulary)) for term in terms]
        for terms in tqdm(_terms(corpus, Analyzer(config)), total=len(corpus), desc="analysing", unit="doc", delay=2)
    ]
    if not vocabulary:
        raise DataError(f"corpus {corpus.path} holds no indexable word; expected text in a language with words")
    index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
    index.index((documents, vocabulary), create_empty_token=False, show_progress=False)
    index.save(str(folder / _FILES), show_progress=False)
    return index_info(corpus, config)


def index_info(corpus: Corpus, config: BM25Config) -> IndexInfo:
    """Return what `index.json` says about the index of `corpus` under `config`."""
    return IndexInfo("bm25", None, corpus.fingerprint, len(corpus), asdict(config), {"bm25s": bm25s.__version__})


def open_engine(folder: Path, corpus: Corpus, info: IndexInfo) -> BM25Engine:
    """Memory-map the index in `folder`.

    Raises:
        DataError: its files are missing or damaged.
    """
    _quiet_bm25s()
    config = Decoder(error=DataError).decode(BM25Config, info.settings)
    try:
        index = bm25s.BM25.load(str(folder / _FILES), mmap=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"index {folder} is damaged ({error}); build it again with --overwrite") from error
    # Plain views of the mapped files: every slice of an np.memmap runs Python code, every slice of an array does not.
    for name in ("data", "indices", "indptr"):
        index.scores[name] = np.asarray(index.scores[name])
    if index.scores["num_docs"] != len(corpus) or len(index.scores["indptr"]) != len(index.vocab_dict) + 1:
        raise DataError(
            f"index {folder} is damaged: it holds {index.scores['num_docs']} documents and "
            f"{len(index.scores['indptr']) - 1} terms, expected {len(corpus)} and {len(index.vocab_dict)}; build it "
            "again with --overwrite"
        )
    return BM25Engine(info, index, Analyzer(config), corpus)


def _terms(corpus: Corpus, analyzer: Analyzer) -> Iterator[list[str]]:
    for document in corpus.documents():
        yield analyzer(document.contents)


def _quiet_bm25s() -> None:
    """bm25s sets its logger to DEBUG when imported, which would put its inner workings into our logs."""
    logging.getLogger("bm25s").setLevel(logging.WARNING)
