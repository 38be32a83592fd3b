"""A corpus of passages: jsonl as published, converted once to a memory-mapped Arrow file.

Two line formats are read, plain or gzipped: `{"id", "contents"}` (wiki-18, MedCorp; the first line of `contents` is
the title, with or without quotes) and `{"id", "title", "text"}`. Other keys of a line are ignored. A corpus is known
by its fingerprint, the sha256 of its documents in order, so the same documents in either format, zipped or not, have
the same one, and an index can tell which corpus it belongs to.
"""

from __future__ import annotations

import array
import gzip
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from verl.errors import DataError
from verl.typed import Decoder
from verl.types import Document

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
_ROWS_PER_BATCH = 4096
_CACHE_FORMAT = 1
_GZIP_MAGIC = b"\x1f\x8b"


class Corpus:
    """Random access to the documents of a corpus by row; resident memory does not grow with the corpus.

    Use `Corpus.open`. Rows are the order of the file, starting at 0.
    """

    def __init__(self, table: pa.Table, fingerprint: str, path: Path) -> None:
        self._ids, self._titles, self._texts = (table.column(name) for name in _SCHEMA.names)
        self._rows = table.num_rows
        self.fingerprint = fingerprint
        self.path = path

    @classmethod
    def open(cls, path: str | Path, cache_dir: str | Path | None = None) -> Corpus:
        """Open a jsonl corpus, converting it first unless that was done before for this very file.

        Args:
            path: the jsonl file; gzip is recognised by its content, not by the name.
            cache_dir: where the Arrow file goes; `<path>.cache/` when None. The cache is trusted while the size and
                modification time of the jsonl file stay what they were.

        Raises:
            DataError: no such file, a malformed line (with file, line number and reason), a duplicate id, an empty
                corpus, or a cache folder that cannot be written.
        """
        source = Path(path)
        if not source.is_file():
            raise DataError(f"corpus {source}: no such file; pass the jsonl (or jsonl.gz) file of the corpus")
        cache = Path(cache_dir) if cache_dir is not None else source.with_name(source.name + ".cache")
        manifest_path = cache / f"{source.name}.json"
        manifest = _read_manifest(manifest_path, source)
        table = _map_arrow(cache / f"{manifest.fingerprint}.arrow", manifest.documents) if manifest else None
        if manifest is None or table is None:
            manifest = _convert(source, cache, manifest_path)
            table = _map_arrow(cache / f"{manifest.fingerprint}.arrow", manifest.documents)
        if table is None:
            raise DataError(f"corpus cache {cache} changed while it was being read; delete the folder and start again")
        return cls(table, manifest.fingerprint, source)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Document:
        """Return the document at `row`; negative rows are refused, because -1 is how FAISS says "nothing"."""
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} is outside the corpus's {self._rows} documents (0 to {self._rows - 1})")
        return Document(self._ids[row].as_py(), self._titles[row].as_py(), self._texts[row].as_py())

    def ids(self, rows: np.ndarray) -> list[str]:
        """Return the ids of the documents at `rows`, (n,) int64, without reading their texts."""
        return self._ids.take(pa.array(rows)).to_pylist()

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Yield the documents of rows `start` to `stop` (exclusive; the end when None), reading a block at a time."""
        stop = self._rows if stop is None else min(stop, self._rows)
        for first in range(start, stop, _ROWS_PER_BATCH):
            count = min(_ROWS_PER_BATCH, stop - first)
            columns = (column.slice(first, count).to_pylist() for column in (self._ids, self._titles, self._texts))
            for id, title, text in zip(*columns, strict=True):
                yield Document(id, title, text)


def parse_document(line: bytes) -> Document:
    """Read one jsonl line.

    Raises:
        ValueError: the line is not a document; the message is the reason, without file and line number.
    """
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; expected a UTF-8 file") from error
    except RecursionError as error:
        raise ValueError("nested too deeply; expected a flat JSON object") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); expected one JSON object per line") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; expected an object with id and contents, or id, title and text")
    document = _document(row)
    try:
        f"{document.id}{document.title}{document.text}".encode()
    except UnicodeEncodeError as error:
        raise ValueError("an unpaired surrogate (\\ud800 to \\udfff), which is no character; remove it") from error
    return document


def read_documents(path: Path) -> Iterator[tuple[int, Document]]:
    """Yield `(line number, document)` of a jsonl corpus; line numbers start at 1 and blank lines are passed over.

    Raises:
        DataError: names the file, the line and the reason of the first malformed line, or says how the gzip is broken.
    """
    number = 0
    progress = tqdm(total=path.stat().st_size, desc=f"reading {path.name}", unit="B", unit_scale=True, delay=2)
    with path.open("rb") as raw, progress:
        zipped = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        try:
            for number, line in enumerate(_lines(raw, zipped), start=1):
                if number % 1024 == 0:
                    progress.update(raw.tell() - progress.n)
                if line.strip():
                    yield number, parse_document(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: broken gzip after line {number} ({error}); fetch the file again") from error


@dataclass(frozen=True, slots=True)
class _Manifest:
    """Which Arrow file stands for which state of the jsonl file."""

    fingerprint: str
    documents: int
    source_bytes: int
    source_mtime_ns: int
    format: int = _CACHE_FORMAT


def _lines(raw: BinaryIO, zipped: bool) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=raw) if zipped else raw
    for position, line in enumerate(stream):
        yield line.removeprefix(b"\xef\xbb\xbf") if position == 0 else line


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _document(row: dict[str, object]) -> Document:
    id = row.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int) or not str(id).strip():
        raise ValueError(f"id={id!r}; expected a non-empty string or an integer")
    if "contents" in row:
        document = Document.from_contents(str(id), _string(row, "contents"))
    else:
        # A title over several lines would not survive the one-string form, where the first line is the title.
        document = Document(str(id), " ".join(_string(row, "title").split()), _string(row, "text").strip())
    if not document.title and not document.text:
        raise ValueError(f"document {document.id!r} is blank; expected some title or text")
    return document


def _string(row: dict[str, object], key: str) -> str:
    if key not in row:
        found = ", ".join(sorted(map(str, row))) or "no key"
        raise ValueError(f"no {key!r} (found {found}); expected id and contents, or id, title and text")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is a {type(value).__name__}; expected a string")
    return value


def _read_manifest(path: Path, source: Path) -> _Manifest | None:
    """Return what the cache holds for `source`, or None when it holds nothing or something outdated."""
    try:
        manifest = Decoder(error=DataError).decode(_Manifest, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, DataError):
        return None
    state = source.stat()
    current = (state.st_size, state.st_mtime_ns, _CACHE_FORMAT)
    return manifest if (manifest.source_bytes, manifest.source_mtime_ns, manifest.format) == current else None


def _map_arrow(path: Path, documents: int) -> pa.Table | None:
    """Memory-map an Arrow file; None when it is missing, damaged or of another length, so that it is made again."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        logger.warning("corpus cache %s cannot be read (%s); converting the corpus again", path, error)
        return None
    return table if table.schema.equals(_SCHEMA) and table.num_rows == documents else None


def _convert(source: Path, cache: Path, manifest_path: Path) -> _Manifest:
    """Write the Arrow file and its manifest; both appear under their final names only when complete."""
    state = source.stat()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="tmp-") as folder:
            arrow, manifest_file = Path(folder) / "corpus.arrow", Path(folder) / "manifest.json"
            fingerprint, documents = _write_arrow(source, arrow)
            manifest = _Manifest(fingerprint, documents, state.st_size, state.st_mtime_ns)
            manifest_file.write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
            os.replace(arrow, cache / f"{fingerprint}.arrow")
            os.replace(manifest_file, manifest_path)
    except OSError as error:
        raise DataError(f"corpus {source}: cannot convert it into {cache} ({error}); choose another cache folder "
                        "with --corpus_cache") from error  # fmt: skip
    logger.info("converted %s: %d documents, fingerprint %s", source, documents, fingerprint)
    return manifest


def _write_arrow(source: Path, target: Path) -> tuple[str, int]:
    """Write the documents of `source` as an Arrow IPC file.

    Returns:
        Their fingerprint and their number.
    """
    digest = hashlib.sha256()
    lines, hashes = array.array("q"), array.array("q")
    block: list[Document] = []
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for number, document in read_documents(source):
            digest.update(json.dumps([document.id, document.title, document.text]).encode() + b"\n")
            lines.append(number)
            hashes.append(hash(document.id))
            block.append(document)
            if len(block) == _ROWS_PER_BATCH:
                writer.write_batch(_record_batch(block))
                block.clear()
        if block:
            writer.write_batch(_record_batch(block))
    if not lines:
        raise DataError(f"corpus {source} holds no document; expected one JSON object per line")
    _refuse_duplicates(source, target, lines, hashes)
    return digest.hexdigest(), len(lines)


def _record_batch(block: Sequence[Document]) -> pa.RecordBatch:
    columns = [[doc.id for doc in block], [doc.title for doc in block], [doc.text for doc in block]]
    return pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=_SCHEMA)


def _refuse_duplicates(source: Path, arrow: Path, lines: array.array, hashes: array.array) -> None:
    """Compare ids only where their 64-bit hashes meet: 16 bytes a document instead of a dictionary of all ids."""
    values = np.frombuffer(hashes, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    meeting = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(meeting):
        return
    ids = pa.ipc.open_file(pa.memory_map(str(arrow), "r")).read_all().column("id")
    seen: dict[str, int] = {}
    for row in np.flatnonzero(np.isin(values, meeting)):
        id = ids[int(row)].as_py()
        if id in seen:
            first, again = lines[seen[id]], lines[int(row)]
            raise DataError(f"{source}, line {again}: id {id!r} was used on line {first}; ids must be unique")
        seen[id] = int(row)
