"""The Arrow file of a corpus: written once in the order of the rows, then memory-mapped.

Every record batch but the last holds the same number of rows, so a row is found by division, and only the batches that
are asked for are ever looked at.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from verl.errors import DataError
from verl.types import Document

SCHEMA = pa.schema([("id", pa.large_string()), ("title", pa.large_string()), ("text", pa.large_string())])
"""Large strings, because the texts of one batch may exceed the 2 GiB that the offsets of plain ones can address."""

_ROWS_PER_BATCH = 4096
_OPEN_BATCHES = 8192
"""Batches whose headers stay parsed, about 2 KiB each; bounded so that memory does not grow with the corpus."""

_MAPPED_BYTES = 256 << 20
_FETCHES_KEPT = 2048
"""A file of more than so many bytes gives its mapped pages back after so many fetches. A fetch maps up to half a MiB,
as the kernel maps the neighbours of a page that it has in memory: without this the whole file would become resident."""


class StoreWriter:
    """Writes documents to an Arrow file, a batch at a time, and computes their fingerprint.

    Use as a context manager; the file is complete when it is left without an exception.

    Attributes:
        documents: how many were added so far.
    """

    def __init__(self, path: Path) -> None:
        self.documents = 0
        self._path = path
        self._digest = hashlib.sha256()
        self._block: list[Document] = []

    def __enter__(self) -> Self:
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._writer.close()
        finally:
            self._sink.close()

    def add(self, document: Document) -> None:
        """Append a document; its row is the number of documents before it."""
        self._block.append(document)
        self.documents += 1
        if len(self._block) == _ROWS_PER_BATCH:
            self._flush()

    def fingerprint(self) -> str:
        """Return the sha256 over the documents in order, each as a JSON array and a newline; the file is complete."""
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if not self._block:
            return
        columns = (
            [document.id for document in self._block],
            [document.title for document in self._block],
            [document.text for document in self._block],
        )
        # What json.dumps of the three strings gives, at a third of its cost.
        lines = (
            f"[{_quoted(id)}, {_quoted(title)}, {_quoted(text)}]\n" for id, title, text in zip(*columns, strict=True)
        )
        self._digest.update("".join(lines).encode())
        self._writer.write_batch(pa.record_batch([pa.array(c, pa.large_string()) for c in columns], schema=SCHEMA))
        self._block.clear()


class ArrowStore:
    """Random access by row to an Arrow file that `StoreWriter` wrote.

    Opening reads the footer alone. A fetch touches the pages of its own document; they belong to the page cache, so
    the machine takes them back when it needs memory.
    """

    def __init__(self, path: Path, documents: int) -> None:
        """Map the file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such file, or not one of so many documents.
        """
        self.documents = documents
        self._path = path
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._fetches_left = _FETCHES_KEPT if len(self._mapped) > _MAPPED_BYTES else sys.maxsize
        self._mapped.madvise(mmap.MADV_RANDOM)  # one document here, one there: reading ahead would be in vain
        self._reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapped)))
        if not self._reader.schema.equals(SCHEMA):
            raise ValueError(f"columns {self._reader.schema.names}, expected {SCHEMA.names}")
        batches = -(-documents // _ROWS_PER_BATCH)
        if self._reader.num_record_batches != batches:
            raise ValueError(f"{self._reader.num_record_batches} batches, expected {batches}")
        self._columns = functools.lru_cache(_OPEN_BATCHES)(self._read_columns)
        self._lock = threading.Lock()  # Arrow does not promise that a reader may be used by several threads

    def __getitem__(self, row: int) -> Document:
        """Return the document at `row`, 0 to `documents` - 1."""
        ids, titles, texts = self._columns(row // _ROWS_PER_BATCH)
        at = row % _ROWS_PER_BATCH
        self._count_fetch()
        return Document(ids[at], titles[at], texts[at])

    def id(self, row: int) -> str:
        """Return the id of the document at `row`, without reading its text."""
        self._count_fetch()
        return self._columns(row // _ROWS_PER_BATCH)[0][row % _ROWS_PER_BATCH]

    def scan(self, start: int, stop: int) -> Iterator[Document]:
        """Yield the documents of rows `start` to `stop` (exclusive), reading a batch at a time into memory.

        The file is read, not mapped: the kernel reads ahead, and no page of it stays with this process.

        Raises:
            DataError: the file is not there any more.
        """
        with _opened(self._path) as file:
            reader = pa.ipc.open_file(file)
            for batch in range(start // _ROWS_PER_BATCH, -(-stop // _ROWS_PER_BATCH)):
                first = batch * _ROWS_PER_BATCH
                rows = reader.get_batch(batch).slice(max(start - first, 0))
                rows = rows.slice(0, stop - max(start, first))
                for id, title, text in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                    yield Document(id, title, text)

    def _count_fetch(self) -> None:
        """Unmap the pages that were touched, now and then; their contents stay in the page cache."""
        self._fetches_left -= 1
        if self._fetches_left <= 0:
            self._mapped.madvise(mmap.MADV_DONTNEED)
            self._fetches_left = _FETCHES_KEPT

    def _read_columns(self, batch: int) -> Sequence[_Column]:
        with self._lock:
            return [_Column(column) for column in self._reader.get_batch(batch).columns]


class _Column:
    """The strings of one column of one batch: a view of its buffers, a third faster than Arrow's scalars."""

    __slots__ = ("_offsets", "_text")

    def __init__(self, column: pa.LargeStringArray) -> None:
        _, offsets, text = column.buffers()
        self._offsets = memoryview(offsets).cast("q")[column.offset :]
        self._text = memoryview(text if text is not None else b"")

    def __getitem__(self, at: int) -> str:
        return str(self._text[self._offsets[at] : self._offsets[at + 1]], "utf-8")


def _opened(path: Path) -> pa.NativeFile:
    try:
        return pa.OSFile(str(path))
    except OSError as error:
        raise DataError(f"corpus cache {path} is gone or cannot be read ({error}); open the corpus again") from error
