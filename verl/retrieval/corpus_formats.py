"""How corpora are published, and how a line of each becomes a document.

- jsonl with `id` and `contents` (wiki-18); the first line of `contents` is the title, with or without quotes;
- jsonl with `id`, `title`, `content` and `contents` (MedCorp, whose `contents` is title and text on one line);
- jsonl with `id` or `_id`, `title` and `text` (BEIR among others);
- tsv with a header that names `id`, `text` and `title` (DPR).

Each plain or gzipped, as one file or as a folder of files. Other keys and columns are ignored.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import orjson
from tqdm import tqdm

from verl.errors import DataError
from verl.types import Document

_GZIP_MAGIC = b"\x1f\x8b"
_BEIR_NAMES = ("corpus.jsonl", "corpus.jsonl.gz")
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
_TSV_SUFFIXES = (".tsv", ".tsv.gz")
_COLUMNS = ("id", "text", "title")
_WANTED = "id and contents, or id, title and text"
_LINE_BITS = 40


@dataclass(frozen=True, slots=True)
class Fault:
    """A line that holds no document, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


def source_files(path: Path) -> tuple[Path, ...]:
    """Return the files of a corpus in the order in which they are read.

    A file stands for itself. A folder that holds `corpus.jsonl` (or `corpus.jsonl.gz`) is a BEIR data set and stands
    for that file; any other folder stands for all its jsonl files, those of its folders included, by name.

    Raises:
        DataError: nothing there, or a folder without a jsonl file.
    """
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise DataError(f"corpus {path}: no such file or folder; pass the jsonl, jsonl.gz or tsv file of the corpus")
    for name in _BEIR_NAMES:
        if (path / name).is_file():
            return (path / name,)
    found = (file for suffix in _JSONL_SUFFIXES for file in path.rglob(f"*{suffix}") if file.is_file())
    files = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise DataError(f"corpus {path}: the folder holds no jsonl file; pass the file of the corpus")
    return tuple(files)


def read_corpus(files: Sequence[Path]) -> Iterator[tuple[int, Document | Fault]]:
    """Yield every document of `files`, or the fault of its line, with its place; blank lines are passed over.

    `where` turns a place into file and line.

    Raises:
        DataError: a file that cannot be read to its end (a broken gzip), or a tsv without the header of DPR's.
    """
    size = sum(file.stat().st_size for file in files)
    with tqdm(
        total=size, desc=f"reading {files[0].name}", unit="B", unit_scale=True, delay=2, mininterval=1
    ) as progress:
        for at, file in enumerate(files):
            before = progress.n
            for number, entry, position in _read_file(file):
                if number % 1024 == 0:
                    progress.update(before + position() - progress.n)
                yield (at << _LINE_BITS) + number, entry
            progress.update(before + file.stat().st_size - progress.n)


def where(files: Sequence[Path], place: int) -> tuple[Path, int]:
    """Return the file and the line, counted from 1, of a place that `read_corpus` gave."""
    return files[place >> _LINE_BITS], place & ((1 << _LINE_BITS) - 1)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, plain or gzipped, that are not blank, with their numbers from 1.

    Raises:
        DataError: no such file, not UTF-8, or a broken gzip.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            for number, line in enumerate(_lines(raw), start=1):
                if line.strip():
                    yield number, _decoded(line).rstrip("\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: broken gzip after line {number} ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    except ValueError as error:
        raise DataError(f"{path}, line {number}: {error}") from error


def parse_document(line: bytes) -> Document:
    """Read one jsonl line.

    Raises:
        ValueError: the line is not a document; the message is the reason, without file and line number.
    """
    try:
        # Several times as fast; what it refuses is read again below, where the reason is told.
        return _document(orjson.loads(line))
    except ValueError:
        document = _document(_object(line))
    try:
        f"{document.id}{document.title}{document.text}".encode()
    except UnicodeEncodeError as error:
        raise ValueError("an unpaired surrogate (\\ud800 to \\udfff), which is no character; remove it") from error
    return document


def _read_file(path: Path) -> Iterator[tuple[int, Document | Fault, Callable[[], int]]]:
    """Yield line numbers from 1, what the line holds, and how to ask for the bytes of `path` that are read by then."""
    number = 0
    parse: Callable[[bytes], Document] | None = None
    try:
        with path.open("rb") as raw:
            for number, line in enumerate(_lines(raw), start=1):
                if not line.strip():
                    continue
                if parse is None:
                    columns = _header(path, line)
                    parse = columns.parse if columns else parse_document
                    if columns:
                        continue
                try:
                    yield number, parse(line), raw.tell
                except ValueError as error:
                    yield number, Fault(path, number, str(error)), raw.tell
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip after line {number} ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read after line {number} ({error})") from error


def _lines(raw: BinaryIO) -> Iterator[bytes]:
    zipped = raw.read(2) == _GZIP_MAGIC
    raw.seek(0)
    stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if zipped else raw
    for position, line in enumerate(stream):
        yield line.removeprefix(b"\xef\xbb\xbf") if position == 0 else line


csv.field_size_limit(2**31 - 1)  # a passage may be longer than csv's own limit of 128 KiB


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a tsv has its id, text and title. One line is one row; fields may be quoted as in csv, as DPR's are."""

    width: int
    id: int
    text: int
    title: int

    def parse(self, line: bytes) -> Document:
        """Read one row; raises what `parse_document` raises."""
        try:
            row = next(csv.reader([_decoded(line)], delimiter="\t", strict=True))
        except csv.Error as error:
            raise ValueError(f"not a row of a tsv ({error}); expected fields quoted as in csv") from error
        if len(row) != self.width:
            raise ValueError(f"{len(row)} columns; expected {self.width}, as in the header")
        return _from_fields(row[self.id], row[self.title], row[self.text])


def _header(path: Path, line: bytes) -> _Columns | None:
    """Return the columns that the first line names, None for a file whose first line is already a document."""
    names = [name.strip().strip('"').lower() for name in line.decode("utf-8", "replace").split("\t")]
    if all(name in names for name in _COLUMNS):
        return _Columns(len(names), *(names.index(name) for name in _COLUMNS))
    if path.name.endswith(_TSV_SUFFIXES) and not line.lstrip().startswith(b"{"):
        found = ", ".join(names)[:80]
        raise DataError(
            f"{path}: the first line has the columns {found!r}; expected a header with {', '.join(_COLUMNS)}"
        )
    return None


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; expected a UTF-8 file") from error


def _object(line: bytes) -> object:
    text = _decoded(line)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply; expected a flat JSON object") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); expected one JSON object per line") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _document(row: object) -> Document:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; expected an object with {_WANTED}")
    id = row.get("id", row.get("_id"))
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise ValueError(f"id={id!r}; expected a non-empty string or an integer")
    if "contents" not in row:
        return _from_fields(str(id), _string(row, "title"), _string(row, "text"))
    contents = _string(row, "contents")
    if "\n" not in contents and isinstance(row.get("title"), str) and isinstance(row.get("content"), str):
        return _from_fields(str(id), row["title"], row["content"])
    return _checked(Document.from_contents(str(id), contents))


def _from_fields(id: str, title: str, text: str) -> Document:
    # A title over several lines would not survive the one-string form, where the first line is the title.
    return _checked(Document(id, " ".join(title.split()), text.strip()))


def _checked(document: Document) -> Document:
    if not document.id.strip():
        raise ValueError(f"id={document.id!r}; expected a non-empty string or an integer")
    if not document.title and not document.text:
        raise ValueError(f"document {document.id!r} is blank; expected some title or text")
    return document


def _string(row: dict[str, object], key: str) -> str:
    if key not in row:
        found = ", ".join(sorted(map(str, row))) or "no key"
        raise ValueError(f"no {key!r} (found {found}); expected {_WANTED}")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is a {type(value).__name__}; expected a string")
    return value
