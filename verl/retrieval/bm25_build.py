"""Building a bm25s index in bounded memory.

`bm25s.BM25.index` wants the term ids of all documents as Python lists, tens of gigabytes for 21 M passages. Here the
documents are analysed in blocks, by several processes if there are many, their term counts go to a file, and the score
matrix is filled from that file a block at a time. In memory are the vocabulary, 24 bytes a document and one block; the
matrix itself is memory-mapped. What is saved equals what bm25s would have saved, bit for bit.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import bm25s
import numpy as np
from tqdm import tqdm

from verl.errors import ConfigError, DataError
from verl.retrieval.bm25_analysis import Analyzer, TermCounts
from verl.retrieval.corpus import Corpus
from verl.retrieval.settings import BM25Config

_DOCUMENTS_PER_WORKER = 50_000
"""What one process analyses in a few seconds; less is not worth the start of another one."""


@dataclass(frozen=True, slots=True)
class BlockSize:
    """How much is in memory at a time.

    Attributes:
        documents: documents that are analysed at once.
        entries: pairs of a document and one of its terms that are scored at once, about 100 bytes each.
    """

    documents: int = 8192
    entries: int = 2_000_000


def build(
    corpus: Corpus, folder: Path, config: BM25Config, workers: int | None = None, size: BlockSize | None = None
) -> None:
    """Write the bm25s index of `corpus` into `folder`.

    Args:
        workers: processes that analyse; as many as the process may use CPUs, and the corpus keeps busy, when None.

    Raises:
        ConfigError: `workers` is below 1.
        DataError: no document of the corpus holds an indexable word, or a worker process died.
        OSError: `folder` cannot be written.
    """
    size = size or BlockSize()
    if workers is None:
        workers = max(1, min(len(os.sched_getaffinity(0)), len(corpus) // _DOCUMENTS_PER_WORKER))
    if workers < 1:
        raise ConfigError(f"bm25 workers={workers}; expected at least 1")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        with closing(_blocks(corpus, config, workers, size)) as blocks:
            counts = _count(blocks, len(corpus), Path(scratch) / "counts")
        if not counts.vocabulary:
            raise DataError(f"corpus {corpus.path} holds no indexable word; expected text in a language with words")
        index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
        index.scores = _score(counts, config, Path(scratch), size)
        counts.path.unlink()
        index.vocab_dict = counts.vocabulary
        index.nonoccurrence_array = None
        index.save(str(folder), show_progress=False)


@dataclass(frozen=True, slots=True)
class _Counts:
    """The term counts of a whole corpus.

    Attributes:
        vocabulary: terms to their ids, in the order in which they first occur.
        holders: (terms,) int64, how many documents hold the term.
        lengths: (documents,) int32, terms of the document, repeated ones included.
        distinct: (documents,) int32, different terms of the document.
        path: for each document and each of its terms two int32, the term's id and its count.
    """

    vocabulary: dict[str, int]
    holders: np.ndarray
    lengths: np.ndarray
    distinct: np.ndarray
    path: Path


def _count(blocks: Iterator[TermCounts], documents: int, path: Path) -> _Counts:
    vocabulary: dict[str, int] = {}
    holders = np.zeros(1024, np.int64)
    lengths: list[np.ndarray] = []
    distinct: list[np.ndarray] = []
    progress = tqdm(total=documents, desc="analysing", unit="doc", delay=2)
    with path.open("wb") as file, progress:
        for block in blocks:
            ids = np.array([vocabulary.setdefault(term, len(vocabulary)) for term in block.vocabulary], np.int32)
            if len(vocabulary) > len(holders):
                holders = np.concatenate([holders, np.zeros(max(len(vocabulary), len(holders)), np.int64)])
            holders[ids] += np.bincount(block.terms, minlength=len(ids))
            np.stack([ids[block.terms], block.counts], axis=1).tofile(file)
            lengths.append(block.lengths)
            distinct.append(block.distinct)
            progress.update(len(block.lengths))
    return _Counts(vocabulary, holders[: len(vocabulary)], np.concatenate(lengths), np.concatenate(distinct), path)


def _blocks(corpus: Corpus, config: BM25Config, workers: int, size: BlockSize) -> Generator[TermCounts, None, None]:
    if workers == 1:
        analyzer = Analyzer(config)
        yield from map(analyzer.count, _texts(corpus, size.documents))
        return
    # Spawned, not forked: the libraries of this process may hold threads, and a fork copies their locks.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (config,)) as pool:
        waiting: deque[Future[TermCounts]] = deque()
        try:
            for texts in _texts(corpus, size.documents):
                waiting.append(pool.submit(_count_texts, texts))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that analyses documents died, perhaps for want of memory; build with fewer workers"
            ) from error


def _texts(corpus: Corpus, count: int) -> Iterator[list[str]]:
    for first in range(0, len(corpus), count):
        yield [document.contents for document in corpus.documents(first, first + count)]


_analyzer: Analyzer
"""Of a worker process."""


def _start_worker(config: BM25Config) -> None:
    global _analyzer
    _analyzer = Analyzer(config)


def _count_texts(texts: list[str]) -> TermCounts:
    return _analyzer.count(texts)


def _score(counts: _Counts, config: BM25Config, scratch: Path, size: BlockSize) -> dict[str, np.ndarray | int]:
    """Return the matrix of scores by term as bm25s keeps it: per term the rows that hold it, rising, and their scores.

    A score is computed in the types and the order of operations of bm25s (`method="lucene"`).
    """
    documents, terms = len(counts.lengths), len(counts.holders)
    starts = np.zeros(terms + 1, np.int64)
    np.cumsum(counts.holders, out=starts[1:])
    data = _allocate(scratch / "data", np.float32, int(starts[-1]))
    indices = _allocate(scratch / "indices", np.int32, int(starts[-1]))
    heads, idf = starts[:-1].copy(), _idf(counts.holders, documents)
    norms = config.k1 * ((1 - config.b) + config.b * counts.lengths / counts.lengths.mean())
    with counts.path.open("rb") as file:
        for first, last in _document_blocks(counts.distinct, size.entries):
            rows = np.repeat(np.arange(first, last, dtype=np.int32), counts.distinct[first:last])
            ids, frequencies = _read_pairs(file, len(rows))
            scores = (idf[ids] * (frequencies / (norms[rows] + frequencies))).astype(np.float32)
            order = np.argsort(ids, kind="stable")
            held, sizes = np.unique(ids, return_counts=True)
            places = np.repeat(heads[held] - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(ids))
            data[places] = scores[order]
            indices[places] = rows[order]
            heads[held] += sizes
    return {"data": data, "indices": indices, "indptr": starts, "num_docs": documents}


def _idf(holders: np.ndarray, documents: int) -> np.ndarray:
    """Return Lucene's inverse document frequencies, (terms,) float32.

    Computed with `math.log`, as bm25s does it: `np.log` may differ in the last bit.
    """
    sizes, which = np.unique(holders, return_inverse=True)
    values = [math.log(1 + (documents - size + 0.5) / (size + 0.5)) for size in sizes.tolist()]
    return np.array(values, np.float32)[which]


def _document_blocks(distinct: np.ndarray, entries: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last row (exclusive) of blocks of at most `entries`, or of one document."""
    ends = np.cumsum(distinct, dtype=np.int64)
    first = 0
    while first < len(distinct):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + entries, side="right")))
        yield first, last
        first = last


def _read_pairs(file: BinaryIO, entries: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.fromfile(file, np.int32, 2 * entries).reshape(entries, 2)
    return pairs[:, 0], pairs[:, 1]


def _allocate(path: Path, dtype: type[np.generic], length: int) -> np.ndarray:
    """Map a new file; its blocks are taken at once, since a disk that fills up later would kill the process."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, length * np.dtype(dtype).itemsize)
    return np.asarray(np.memmap(path, dtype, "r+", shape=(length,)))
