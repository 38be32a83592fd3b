"""Lucene indexes of Anserini's layout: how they are written, opened, queried and read."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from verl.errors import DataError
from verl.retrieval.corpus import Corpus
from verl.retrieval.lucene_jvm import JavaObject, Lucene, lucene
from verl.retrieval.lucene_query import Clauses, Node, Phrase, QuerySyntaxError, Words, parse
from verl.retrieval.settings import LuceneConfig

logger = logging.getLogger(__name__)

_FIELD = "contents"
_SAMPLE = 32
_DOCUMENTS_PER_TASK = 1000
_BUFFER_MIB = 256.0
_ID_VALUES = {"BINARY": "STRING_VAL", "SORTED": "STRING"}
"""Kinds of values that Anserini has kept of ids over the years, and how Lucene sorts by them."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that matches a query; `number` is Lucene's own."""

    number: int
    id: str
    score: float


class LuceneIndex:
    """An open Lucene index of Anserini's layout: `id` with doc values, `contents`, and `raw` if documents are stored.

    Attributes:
        folder: where it is.
        documents: how many it holds.
        has_positions: whether quotes can be obeyed.
        stores_documents: whether their texts can be read from it.
        analyzer: how it cuts text into terms.

    Raises:
        ConfigError: Java or the extra packages are missing.
        DataError: there is no such index, or it is damaged.
    """

    def __init__(self, folder: Path, config: LuceneConfig) -> None:
        self._java = java = lucene()
        self.folder = folder
        try:
            self._reader = java.DirectoryReader.open(java.FSDirectory.open(java.Paths.get(str(folder))))
        except java.Error as error:
            raise DataError(
                f"index {folder} is no Lucene index that can be read ({error}); pass the folder that holds segments_N, "
                "or build it again"
            ) from error
        fields = java.FieldInfos.getMergedFieldInfos(self._reader)
        ids, contents = fields.fieldInfo("id"), fields.fieldInfo(_FIELD)
        kind = "NONE" if ids is None else str(ids.getDocValuesType())
        if kind not in _ID_VALUES or contents is None:
            self._reader.close()
            raise DataError(
                f"index {folder} has no field {_FIELD!r}, or keeps no values of its field 'id'; build it with Anserini "
                "or pyserini"
            )
        self.documents = int(self._reader.numDocs())
        self.has_positions = "POSITIONS" in str(contents.getIndexOptions())
        self.stores_documents = fields.fieldInfo("raw") is not None
        self.analyzer = _analyzer(java, config)
        self._searcher = java.IndexSearcher(self._reader)
        self._searcher.setSimilarity(java.BM25(config.k1, config.b))
        # Lucene compares ids as UTF-8, which is the order of Python's strings.
        by_id = java.SortField("id", getattr(java.SortType, _ID_VALUES[kind]))
        self._order = java.Sort(java.SortField.FIELD_SCORE, by_id)

    def search(self, query: JavaObject, topk: int) -> list[Hit]:
        """Return the best documents, equal scores in the order of ids."""
        hits = self._searcher.search(query, topk, self._order, True).scoreDocs
        return [Hit(int(hit.doc), str(hit.fields[1].utf8ToString()), float(hit.score)) for hit in hits]

    def stored(self, number: int) -> tuple[str, str | None]:
        """Return the id of a document, and the JSON it was made from if that is stored."""
        document = self._searcher.doc(number)
        raw = document.get("raw")
        return str(document.get("id")), None if raw is None else str(raw)

    def sample(self) -> list[tuple[str, str | None]]:
        """Return what is stored of some documents."""
        numbers = np.linspace(0, int(self._reader.maxDoc()) - 1, _SAMPLE, dtype=np.int64)
        return [self.stored(int(number)) for number in np.unique(numbers)]

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


class QueryBuilder:
    """Makes Lucene's queries from text."""

    def __init__(self, java: Lucene, index: LuceneIndex) -> None:
        self._java = java
        self._analyzer = index.analyzer
        self._has_positions = index.has_positions
        self._words = java.QueryBuilder(index.analyzer)
        self._bag = java.BagOfWords()

    def bag_of_words(self, text: str) -> JavaObject:
        """Return Anserini's default query: any of the words, a repeated one counting as often as it occurs."""
        return self._bag.buildQuery(_FIELD, self._analyzer, text)

    def boolean(self, text: str) -> JavaObject | None:
        """Return the query that `text` says; None if only stop words are left of it.

        Raises:
            QuerySyntaxError: it is malformed, or quotes several words and the index has no positions.
        """
        return self._node(parse(text))

    def _node(self, node: Node) -> JavaObject | None:
        if isinstance(node, Words):
            return self._words.createBooleanQuery(_FIELD, node.text)
        if isinstance(node, Phrase):
            return self._phrase(node.text)
        return self._clauses(node)

    def _phrase(self, text: str) -> JavaObject | None:
        query = self._words.createPhraseQuery(_FIELD, text)
        if isinstance(query, self._java.PhraseQuery) and not self._has_positions:
            raise QuerySyntaxError(
                f'the index was built without positions, which "{text}" needs; join the words with AND'
            )
        return query

    def _clauses(self, clauses: Clauses) -> JavaObject | None:
        """A part without a word of the index's language, such as a stop word, is no condition."""
        builder, found = self._java.BooleanBuilder(), 0
        occur = self._java.Occur
        for nodes, how in ((clauses.must, occur.MUST), (clauses.should, occur.SHOULD)):
            for query in filter(lambda query: query is not None, map(self._node, nodes)):
                builder.add(query, how)
                found += 1
        for query in filter(lambda query: query is not None, map(self._node, clauses.must_not)):
            builder.add(query, occur.MUST_NOT)
        return builder.build() if found else None


def write(corpus: Corpus, folder: Path, config: LuceneConfig, threads: int) -> None:
    """Index `corpus` into `folder` as Anserini indexes a JsonCollection, with positions.

    Raises:
        ConfigError: Java or the extra packages are missing.
        DataError: Lucene refuses a document, or Java has too little memory.
        OSError: `folder` cannot be written.
    """
    java = lucene()
    settings = java.IndexWriterConfig(_analyzer(java, config))
    settings.setRAMBufferSizeMB(_BUFFER_MIB)
    settings.setUseCompoundFile(False)
    try:
        writer = java.IndexWriter(java.FSDirectory.open(java.Paths.get(str(folder))), settings)
        try:
            _add(java, writer, corpus, config, threads)
            writer.commit()
        except BaseException:
            writer.rollback()
            raise
        writer.close()
    except java.IOError as error:
        raise OSError(str(error)) from error
    except java.Error as error:
        raise DataError(
            f"Lucene cannot index {corpus.path} ({error}); for more memory set JAVA_TOOL_OPTIONS=-Xmx8g or the like"
        ) from error


def _add(java: Lucene, writer: JavaObject, corpus: Corpus, config: LuceneConfig, threads: int) -> None:
    args = java.GeneratorArgs()
    args.storePositions, args.storeRaw = True, config.store_documents
    generator = java.DocumentGenerator(args)

    def add(first: int) -> int:
        documents = list(corpus.documents(first, first + _DOCUMENTS_PER_TASK))
        for document in documents:
            source = java.JsonDocument.fromFields(document.id, document.contents)
            writer.addDocument(generator.createDocument(source))
        return len(documents)

    progress = tqdm(total=len(corpus), desc="indexing", unit="doc", delay=2)
    with ThreadPoolExecutor(threads) as pool, progress:
        for count in pool.map(add, range(0, len(corpus), _DOCUMENTS_PER_TASK)):
            progress.update(count)


def _analyzer(java: Lucene, config: LuceneConfig) -> JavaObject:
    return java.EnglishAnalyzer.fromArguments(config.stemmer, config.stopwords == "none", None)
