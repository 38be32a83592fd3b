"""Rows of a file, whatever it is: jsonl, a JSON list, one JSON object, or parquet; gzipped or not.

What a file is follows from its first bytes, not from its name. A JSON list is read item by item, so its size does not
matter; one JSON object is read whole.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_preprocess.readers.base import Row, shown
from verl.errors import DataError
from verl.retrieval.corpus_formats import text_lines

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_CHUNK = 1 << 20
_PARQUET_ROWS = 512
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Located:
    """A row and where it stands; a row that could not be read is None, with the reason."""

    place: str
    row: Row | None
    reason: str = ""


def read_file(path: Path) -> Iterator[Located]:
    """Yield the rows of a file in order. A file that is one JSON object is one row.

    Raises:
        DataError: no such file, none of these kinds, or broken so that nothing behind the place can be read.
    """
    start = _first_bytes(path)
    if start.startswith(_PARQUET_MAGIC):
        return _parquet_rows(path)
    if start[:1] == b"[":
        return _list_rows(path)
    if start[:1] == b"{":
        return _object_rows(path)
    found = f"starts with {start[:20]!r}" if start else "is empty"
    raise DataError(f"{path} {found}; expected jsonl, a JSON list or object, or parquet")


def _first_bytes(path: Path) -> bytes:
    with _opened(path) as file:
        while start := file.read(_CHUNK):
            if start := start.removeprefix(b"\xef\xbb\xbf").lstrip():
                return start
    return b""


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, through gzip if it is gzipped; what is broken about it becomes a DataError."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            with gzip.open(raw) if zipped else raw as file:
                yield file  # type: ignore[misc]
    except FileNotFoundError as cause:
        raise DataError(f"{path}: no such file") from cause
    except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
        raise DataError(f"{path}: broken gzip ({cause}); fetch the file again") from cause
    except UnicodeDecodeError as cause:
        raise DataError(f"{path} is not UTF-8 ({cause}); convert it") from cause
    except OSError as cause:
        raise DataError(f"{path} cannot be read ({cause})") from cause


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    with _opened(path) as file:
        yield io.TextIOWrapper(file, "utf-8-sig")


def _object_rows(path: Path) -> Iterator[Located]:
    """Tell a jsonl file from one object: the latter's first line is no object, or its only line."""
    lines = text_lines(path)
    first = list(islice(lines, 2))
    if not _is_json(first[0][1]) and not (len(first) > 1 and first[1][1].startswith("{")):
        with _text(path) as file:
            yield _parsed(str(path), file.read())
        return
    for number, line in chain(first, lines):
        yield _parsed(f"{path}:{number}", line)


def _is_json(line: str) -> bool:
    try:
        json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(place: str, text: str) -> Located:
    try:
        return _row(place, json.loads(text.removeprefix("\ufeff")))
    except (ValueError, RecursionError) as cause:
        return Located(place, None, f"not JSON ({cause})")


def _row(place: str, value: Any) -> Located:
    if isinstance(value, dict):
        return Located(place, value)
    return Located(place, None, f"{shown(value)} is no JSON object")


def _list_rows(path: Path) -> Iterator[Located]:
    with _text(path) as file:
        items = _items(file)
        number = 0
        while True:
            try:
                value = next(items)
            except StopIteration:
                return
            except (ValueError, RecursionError) as cause:
                raise DataError(
                    f"{path}, item {number + 1}: broken JSON list ({cause}); fetch the file again"
                ) from cause
            number += 1
            yield _row(f"{path}, item {number}", value)


def _items(file: TextIO) -> Iterator[Any]:
    """Yield the items of a JSON list, holding no more text than about one item and one chunk.

    Raises:
        ValueError: the list is malformed or ends early.
    """
    decoder = json.JSONDecoder()
    buffer = _stripped(file, _stripped(file, "")[1:])  # that it starts with a bracket is known
    mark = buffer[0]
    while mark != "]":
        value, buffer = _item(decoder, file, buffer)
        yield value
        buffer = _stripped(file, buffer)
        mark = buffer[0]
        if mark not in ",]":
            raise ValueError(f"found {buffer[:20]!r}, expected a comma or the end of the list")
        buffer = _stripped(file, buffer[1:]) if mark == "," else buffer
    if rest := (buffer[1:] + file.read(_CHUNK)).strip(_SPACE):
        raise ValueError(f"found {rest[:20]!r} after the end of the list")


def _item(decoder: json.JSONDecoder, file: TextIO, buffer: str) -> tuple[Any, str]:
    """Return the value that `buffer` starts with, read further as far as it goes, and what is left."""
    size = _CHUNK
    while True:
        try:
            value, end = decoder.raw_decode(buffer)
        except ValueError:
            if not (more := file.read(size)):
                raise
            buffer, size = buffer + more, 2 * size
        else:
            return value, buffer[end:]


def _stripped(file: TextIO, buffer: str) -> str:
    """Return the buffer without leading white space, filled where nothing is left of it."""
    while not (buffer := buffer.lstrip(_SPACE)):
        if not (buffer := file.read(_CHUNK)):
            raise ValueError("the file ends inside the list")
    return buffer


def _parquet_rows(path: Path) -> Iterator[Located]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield Located(f"{path}, row {number}", row)
                    number += 1
    except (pa.ArrowException, OSError) as cause:  # damaged pages are an OSError to Arrow
        raise DataError(f"{path} cannot be read as parquet ({cause}); fetch the file again") from cause
