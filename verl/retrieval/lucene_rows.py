"""From the ids of documents to their rows in a corpus, without holding the ids in memory."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from verl.errors import DataError
from verl.retrieval.corpus import Corpus
from verl.types import Document

logger = logging.getLogger(__name__)

_BLOCK = 65536


class RowFinder:
    """Finds documents by id.

    Ids that are row numbers, as those of wiki-18 are, need no table. For others the sorted 64-bit hashes of all ids
    are made once, 16 bytes a document, and memory-mapped; an id that was found is compared with the corpus's, so two
    ids with one hash are told apart.

    Args:
        corpus: where the documents are.
        folder: where the table is kept; if it cannot be written to, the table stays in memory.
    """

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        self._corpus = corpus
        self._path = folder / f"rows-{corpus.fingerprint[:16]}.npy"
        self._table: np.ndarray | None = None
        self._lock = threading.Lock()

    def documents(self, ids: Sequence[str]) -> list[Document]:
        """Return the documents with these ids, in order.

        Raises:
            DataError: the corpus lacks one of them.
        """
        rows = self._numbers(ids)
        return self._corpus.rows(self._look_up(ids) if rows is None else rows)

    def _numbers(self, ids: Sequence[str]) -> list[int] | None:
        """Return the ids as rows if every one is the number of its row."""
        rows = [int(id) if id.isdecimal() and id.isascii() and len(id) < 18 else -1 for id in ids]
        if not all(0 <= row < len(self._corpus) for row in rows):
            return None
        return rows if self._corpus.ids(rows) == list(ids) else None

    def _look_up(self, ids: Sequence[str]) -> list[int]:
        with self._lock:
            if self._table is None:
                self._table = _open_table(self._path, self._corpus)
        hashes, rows = self._table
        wanted = np.array([_hash(id) for id in ids], np.uint64)
        first, last = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
        return [self._same(id, rows[start:stop]) for id, start, stop in zip(ids, first, last, strict=True)]

    def _same(self, id: str, rows: np.ndarray) -> int:
        """Return the row, among those whose ids have the same hash, with this id."""
        for row in rows.tolist():
            if self._corpus.ids([row]) == [id]:
                return row
        raise DataError(
            f"the index holds document {id!r}, which corpus {self._corpus.path} lacks; pass the corpus that was indexed"
        )


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def _open_table(path: Path, corpus: Corpus) -> np.ndarray:
    """Return the (2, documents) uint64 hashes, rising, and rows; make and keep them unless that was done before."""
    try:
        table = np.load(path, mmap_mode="r")
        if table.shape == (2, len(corpus)) and table.dtype == np.uint64:
            return np.asarray(table)
    except (OSError, ValueError):
        pass  # not there, or of a run that was killed: made again
    logger.info("sorting the ids of the %d documents of %s", len(corpus), corpus.path)
    table = _sorted_hashes(corpus)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, table)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the ids are sorted again at every start", path, error)
        temporary.unlink(missing_ok=True)
    return table


def _sorted_hashes(corpus: Corpus) -> np.ndarray:
    hashes = np.empty(len(corpus), np.uint64)
    for first in range(0, len(corpus), _BLOCK):
        rows = range(first, min(first + _BLOCK, len(corpus)))
        hashes[rows.start : rows.stop] = [_hash(id) for id in corpus.ids(rows)]
    order = np.argsort(hashes, kind="stable")
    return np.stack([hashes[order], order.astype(np.uint64)])
