"""BM25 over bm25s, with the analysis and the parameters of Lucene's English default, memory-mapped."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import bm25s
import numpy as np

from verl.errors import DataError
from verl.retrieval import bm25_build
from verl.retrieval.bm25_analysis import Analyzer
from verl.retrieval.bm25_search import Postings
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import IndexInfo, check_topk, engine_info
from verl.retrieval.index_marks import check_marks, marks
from verl.retrieval.ranking import best_first
from verl.retrieval.settings import BM25Config
from verl.typed import Decoder
from verl.types import SearchResult

_FILES = "bm25"
_VOCABULARY = "vocab.index.json"


class BM25Engine:
    """Searches a BM25 index.

    A document is a hit only if it shares a term with the query: a query without any indexed term gets no documents,
    and one that matches fewer than `topk` gets those that match, rather than arbitrary ones with score 0. A term that
    occurs twice in a query counts twice, as in Lucene's bag of words. Each query is scored by itself, so its result
    does not depend on the batch it comes in.
    """

    def __init__(self, info: IndexInfo, index: bm25s.BM25, analyzer: Analyzer, corpus: Corpus) -> None:
        self.info = engine_info(info)
        self.corpus = corpus
        self._analyzer = analyzer
        self._vocabulary: Mapping[str, int] = index.vocab_dict
        # Plain views of the mapped files: slicing an np.memmap runs Python code, slicing an array does not.
        starts, rows, scores = (np.asarray(index.scores[name]) for name in ("indptr", "indices", "data"))
        self._postings = Postings(starts, rows, scores, len(corpus))

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """See `verl.retrieval.engine.Engine.search`."""
        check_topk(topk, self.info)
        return [self._search(query, topk) for query in queries]

    def _search(self, query: str, topk: int) -> SearchResult:
        terms = [self._vocabulary[term] for term in self._analyzer(query) if term in self._vocabulary]
        if not terms:
            return SearchResult(query, (), ())
        rows, scores = self._postings.best(terms, topk)
        return best_first(self.corpus, query, rows, scores, topk)

    def close(self) -> None:
        """See `verl.retrieval.engine.Engine.close`."""


def write_index(corpus: Corpus, folder: Path, config: BM25Config, workers: int | None = None) -> IndexInfo:
    """Index `corpus` into `folder`.

    Args:
        workers: processes that analyse the documents; chosen by the CPUs and the size of the corpus when None.

    Raises:
        DataError: no document of the corpus holds an indexable word.
    """
    _quiet_bm25s()
    bm25_build.build(corpus, folder / _FILES, config, workers)
    return replace(index_info(corpus, config), files=marks(folder, (folder / _FILES).iterdir()))


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
    check_marks(folder, info)
    try:
        # bm25s would also keep a set of all ids of terms, which is as large as the vocabulary.
        index = bm25s.BM25.load(str(folder / _FILES), mmap=True, load_vocab=False)
        index.vocab_dict = json.loads((folder / _FILES / _VOCABULARY).read_text("utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"index {folder} is damaged ({error}); build it again with --overwrite") from error
    _check(folder, index, len(corpus))
    return BM25Engine(info, index, Analyzer(config), corpus)


def _check(folder: Path, index: bm25s.BM25, documents: int) -> None:
    """Refuse files that do not fit together; a truncated one is found by `load`, since its header says its length."""
    starts, entries = index.scores["indptr"], {len(index.scores["indices"]), len(index.scores["data"])}
    found = (index.scores["num_docs"], len(starts) - 1)
    if found != (documents, len(index.vocab_dict)) or entries != {int(starts[-1])}:
        raise DataError(
            f"index {folder} is damaged: it holds {found[0]} documents, {found[1]} terms and {sorted(entries)} scores; "
            f"expected {documents}, {len(index.vocab_dict)} and {int(starts[-1])}; build it again with --overwrite"
        )


def _quiet_bm25s() -> None:
    """bm25s sets its logger to DEBUG when imported, which would put its inner workings into our logs."""
    logging.getLogger("bm25s").setLevel(logging.WARNING)
