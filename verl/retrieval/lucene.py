"""BM25 by Lucene: indexes that pyserini wrote, or that are written here as pyserini would, and Boolean queries."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path

from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.corpus import Corpus
from verl.retrieval.corpus_formats import parse_document
from verl.retrieval.engine import IndexInfo, check_topk, engine_info
from verl.retrieval.index_marks import check_marks, marks
from verl.retrieval.lucene_index import Hit, LuceneIndex, QueryBuilder, write
from verl.retrieval.lucene_jvm import JavaObject, anserini_version, lucene
from verl.retrieval.lucene_query import QuerySyntaxError
from verl.retrieval.lucene_rows import RowFinder
from verl.retrieval.settings import LuceneConfig, LuceneSearch
from verl.typed import Decoder
from verl.types import Document, SearchResult

logger = logging.getLogger(__name__)

_FILES = "lucene"


class LuceneEngine:
    """Searches a Lucene index with several threads.

    Equal scores are in the order of ids, so a query's result depends neither on its batch nor on how the index is cut
    into segments. A document is a hit only if it matches the query.

    Attributes:
        syntax_errors: how many Boolean queries were malformed so far.
    """

    def __init__(
        self, info: IndexInfo, index: LuceneIndex, config: LuceneConfig, rows: RowFinder | None, threads: int
    ) -> None:
        self._java = lucene()
        self.info = engine_info(info, **asdict(config), positions=index.has_positions)
        self.syntax_errors = 0
        self._lock = threading.Lock()
        self._index = index
        self._config = config
        self._queries = QueryBuilder(self._java, index)
        self._rows = rows
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lucene")

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
        """See `verl.retrieval.engine.Engine.search`; a malformed Boolean query has an error in place of a result."""
        check_topk(topk, self.info)
        return list(self._pool.map(self._search, queries, repeat(topk)))

    def _search(self, text: str, topk: int) -> SearchResult | RetrieverError:
        try:
            query = self._query(text)
            hits = [] if query is None else self._index.search(query, topk)
            documents = self._documents(hits)
        except QuerySyntaxError as error:
            return RetrieverError(f"query {_short(text)} is no Boolean query: {error}")
        except (DataError, self._java.Error) as error:
            return RetrieverError(f"query {_short(text)} could not be answered: {error}")
        return SearchResult(text, documents, tuple(hit.score for hit in hits))

    def _query(self, text: str) -> JavaObject | None:
        # A half of a surrogate pair is no character, and Java's strings are made from UTF-8.
        clean = text.encode("utf-8", "replace").decode()
        if self._config.query_syntax == "bag_of_words":
            return self._queries.bag_of_words(clean)
        try:
            return self._queries.boolean(clean)
        except QuerySyntaxError as error:
            with self._lock:
                self.syntax_errors += 1
            if self._config.on_syntax_error == "error":
                raise
            logger.debug("query %s is searched as a bag of words: %s", _short(text), error)
            return self._queries.bag_of_words(clean)

    def _documents(self, hits: Sequence[Hit]) -> tuple[Document, ...]:
        if self._rows is not None:
            return tuple(self._rows.documents([hit.id for hit in hits]))
        return tuple(_document(*self._index.stored(hit.number)) for hit in hits)

    def close(self) -> None:
        """See `verl.retrieval.engine.Engine.close`."""
        self._pool.shutdown()
        self._index.close()


def write_index(corpus: Corpus, folder: Path, config: LuceneConfig, threads: int | None = None) -> IndexInfo:
    """Index `corpus` into `folder`.

    Args:
        threads: that index; as many as the process may use CPUs when None.

    Raises:
        ConfigError: Java or the extra packages are missing.
        DataError: Lucene refuses a document.
        OSError: `folder` cannot be written.
    """
    files = folder / _FILES
    files.mkdir()
    write(corpus, files, config, threads or len(os.sched_getaffinity(0)))
    (files / "write.lock").unlink(missing_ok=True)
    info = replace(index_info(corpus, config), files=marks(folder, files.iterdir()))
    open_engine(folder, corpus, info).close()  # makes the table of rows, and shows that the index can be opened
    return info


def index_info(corpus: Corpus, config: LuceneConfig) -> IndexInfo:
    """Return what `index.json` says about the index of `corpus` under `config`.

    Raises:
        ConfigError: the extra packages are missing.
    """
    built_with = {"anserini": anserini_version()}
    return IndexInfo("lucene", None, corpus.fingerprint, len(corpus), asdict(config), built_with)


def describe(folder: Path, corpus: Corpus | None) -> IndexInfo:
    """Return what is known of an index without `index.json`, such as a published one.

    It is taken to be analysed by Anserini's default for English, and to be the index of `corpus`; `open_engine` checks
    that.

    Raises:
        ConfigError: Java or the extra packages are missing.
        DataError: there is no index.
    """
    index = LuceneIndex(folder, LuceneConfig())
    index.close()
    config = LuceneConfig(store_documents=index.stores_documents)
    fingerprint = "" if corpus is None else corpus.fingerprint
    # Lucene's segments file names every other file with its random id, so it stands for all of them.
    files = marks(folder, folder.glob("segments_*"))
    return IndexInfo("lucene", None, fingerprint, index.documents, asdict(config), files=files)


def open_engine(
    folder: Path,
    corpus: Corpus | None,
    info: IndexInfo,
    search: LuceneSearch | None = None,
    threads: int | None = None,
) -> LuceneEngine:
    """Open the index in `folder`, memory-mapped.

    Args:
        corpus: where the documents are; None if those that the index stores are to be used, which is slower.
        search: settings in place of those that the index was built with.
        threads: that search; as many as the process may use CPUs when None.

    Raises:
        ConfigError: Java or the extra packages are missing, or there is neither a corpus nor stored documents.
        DataError: the index is missing, damaged or of another corpus.
    """
    config = (search or LuceneSearch()).over(Decoder(error=DataError).decode(LuceneConfig, info.settings))
    check_marks(folder, info)
    index = LuceneIndex(folder / _FILES if (folder / _FILES).is_dir() else folder, config)
    try:
        _check_size(index, corpus, info)
        rows = None if corpus is None else _row_finder(index, corpus)
    except (ConfigError, DataError):
        index.close()
        raise
    if config.query_syntax == "boolean" and not index.has_positions:
        logger.warning("index %s was built without positions: Boolean queries may not quote several words", folder)
    return LuceneEngine(info, index, config, rows, threads or len(os.sched_getaffinity(0)))


def _check_size(index: LuceneIndex, corpus: Corpus | None, info: IndexInfo) -> None:
    if index.documents != info.documents:
        raise DataError(
            f"index {index.folder} is damaged: it holds {index.documents} documents, expected {info.documents}; build "
            "it again with --overwrite"
        )
    if corpus is None and not index.stores_documents:
        raise ConfigError(f"index {index.folder} stores no documents; pass its corpus with --corpus_path")
    if corpus is not None and index.documents != len(corpus):
        raise DataError(
            f"index {index.folder} holds {index.documents} documents, but {corpus.path} has {len(corpus)}; pass the "
            "corpus that was indexed"
        )


def _row_finder(index: LuceneIndex, corpus: Corpus) -> RowFinder:
    """Return where documents are looked up; refuse a corpus without some document of the index."""
    finder, sample = RowFinder(corpus, index.folder), index.sample()
    for (id, raw), document in zip(sample, finder.documents([id for id, _ in sample]), strict=True):
        if raw is not None and _document(id, raw) != document:
            raise DataError(
                f"index {index.folder} and corpus {corpus.path} differ in document {id!r}; pass the corpus that was "
                "indexed"
            )
    return finder


def _short(text: str, limit: int = 100) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}…")


def _document(id: str, raw: str | None) -> Document:
    try:
        return parse_document((raw or "").encode())
    except ValueError as error:
        raise DataError(f"the document stored as {id!r} cannot be read: {error}") from error
