"""A corpus of passages: files as published, converted once to a memory-mapped Arrow file.

`verl.retrieval.corpus_formats` says which formats are read. A corpus is known by its fingerprint, the sha256 of its
documents in order, so the same documents in any format, zipped or not, have the same one, and an index can tell which
corpus it belongs to.
"""

from __future__ import annotations

import array
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from verl.errors import ConfigError, DataError
from verl.retrieval.corpus_formats import Fault, read_corpus, source_files, where
from verl.retrieval.corpus_store import ArrowStore, StoreWriter
from verl.typed import Decoder
from verl.types import Document

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]

_CACHE_FORMAT = 2
_FAULTS_SHOWN = 5
_TEMPORARY = ".converting-"
_LOCK = ".lock"


class Corpus:
    """Random access to the documents of a corpus by row; resident memory does not grow with the corpus.

    Use `Corpus.open`. Rows are the order of the files, starting at 0. Any number of threads may read.

    Attributes:
        fingerprint: sha256 of the documents in order.
        path: what was opened.
        skipped: how many bad lines are left out.
    """

    def __init__(self, store: ArrowStore, fingerprint: str, path: Path, skipped: int) -> None:
        self._store = store
        self._rows = store.documents
        self.fingerprint = fingerprint
        self.path = path
        self.skipped = skipped

    @classmethod
    def open(cls, path: str | Path, cache_dir: str | Path | None = None, on_error: OnError = "raise") -> Corpus:
        """Open a corpus, converting it first unless that was done before for these very files.

        Args:
            path: a file, or a folder of jsonl files; see `verl.retrieval.corpus_formats.source_files`.
            cache_dir: where the Arrow file goes; `<path>.cache/` when None. The cache is trusted while the names, the
                sizes and the modification times of the files stay what they were.
            on_error: what to do about a malformed line or an id that was used before: `raise`, or `skip` the line,
                which is counted and logged at every opening.

        Raises:
            ConfigError: `on_error` is something else.
            DataError: no such file, a malformed line (with file, line number and reason), a duplicate id, an empty
                corpus, or a cache folder that cannot be written.
        """
        if on_error not in get_args(OnError):
            raise ConfigError(f"on_error={on_error!r}; expected one of {', '.join(get_args(OnError))}")
        entry = _cache_entry(Path(path), Path(cache_dir) if cache_dir is not None else None)
        manifest, store = entry.load() or entry.convert(on_error)
        if manifest.skipped:
            _report(manifest, entry, on_error)
        return cls(store, manifest.fingerprint, entry.source, manifest.skipped)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Document:
        """Return the document at `row`; negative rows are refused, because -1 is how FAISS says "nothing"."""
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} is outside the corpus's {self._rows} documents (0 to {self._rows - 1})")
        return self._store[row]

    def rows(self, rows: Sequence[int] | np.ndarray) -> list[Document]:
        """Return the documents at `rows`, (n,) int64, in that order."""
        return [self._store[row] for row in self._checked(rows)]

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the ids of the documents at `rows`, (n,) int64, without reading their texts."""
        return [self._store.id(row) for row in self._checked(rows)]

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Yield the documents of rows `start` to `stop` (exclusive; the end when None), reading a block at a time."""
        stop = self._rows if stop is None else min(stop, self._rows)
        return self._store.scan(start, stop) if start < stop else iter(())

    def _checked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        numbers: list[int] = np.asarray(rows, dtype=np.int64).tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < self._rows:
            bad = next(row for row in numbers if not 0 <= row < self._rows)
            raise IndexError(f"row {bad} is outside the corpus's {self._rows} documents (0 to {self._rows - 1})")
        return numbers


@dataclass(frozen=True, slots=True)
class _FileState:
    """What a source file looked like when it was converted; `name` is relative to the corpus."""

    name: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class _Manifest:
    """Which Arrow file stands for which state of the source files, and which of their lines it leaves out.

    Attributes:
        store_bytes: size of the Arrow file.
        faults: the first few of the `skipped` lines, with their reasons.
    """

    fingerprint: str
    documents: int
    store_bytes: int
    sources: tuple[_FileState, ...]
    skipped: int
    faults: tuple[str, ...]
    format: int = _CACHE_FORMAT


def _states(source: Path, files: Sequence[Path]) -> tuple[_FileState, ...]:
    def state(file: Path) -> _FileState:
        found = file.stat()
        return _FileState(str(file.relative_to(source)) if file != source else "", found.st_size, found.st_mtime_ns)

    return tuple(state(file) for file in files)


def _report(manifest: _Manifest, entry: _CacheEntry, on_error: OnError) -> None:
    """Say what the store leaves out; refuse it where nothing may be left out."""
    if on_error == "raise":
        raise DataError(
            f"{manifest.faults[0]} ({manifest.skipped} bad lines were skipped when {entry.source} was converted); mend "
            "them, or pass --on_error=skip"
        )
    logger.warning("corpus %s: %d bad lines are left out; the first ones:", entry.source, manifest.skipped)
    for fault in manifest.faults:
        logger.warning("%s", fault)


@dataclass(frozen=True, slots=True)
class _CacheEntry:
    """A corpus and where its converted form is kept."""

    source: Path
    files: tuple[Path, ...]
    folder: Path
    manifest_path: Path
    states: tuple[_FileState, ...]

    def load(self) -> tuple[_Manifest, ArrowStore] | None:
        """Return what the cache holds for these files, None when it holds nothing, something outdated or damaged."""
        try:
            manifest = Decoder(error=DataError).decode(_Manifest, json.loads(self.manifest_path.read_text("utf-8")))
        except (OSError, ValueError, DataError):
            return None
        if (manifest.sources, manifest.format) != (self.states, _CACHE_FORMAT):
            return None
        path = self._store_path(manifest)
        try:
            if path.stat().st_size != manifest.store_bytes:
                raise ValueError(f"{path.stat().st_size} bytes, expected {manifest.store_bytes}")
            return manifest, ArrowStore(path, manifest.documents)
        except (OSError, ValueError) as error:
            logger.warning("corpus cache %s cannot be read (%s); converting the corpus again", path, error)
            return None

    def convert(self, on_error: OnError) -> tuple[_Manifest, ArrowStore]:
        """Write the Arrow file and its manifest; both appear under their final names only when complete."""
        try:
            with self._locked():
                loaded = self.load()  # another process may have done it while this one waited
                if loaded is not None:
                    return loaded
                with tempfile.TemporaryDirectory(dir=self.folder, prefix=_TEMPORARY) as folder:
                    self._write(Path(folder), on_error)
        except OSError as error:
            raise DataError(
                f"corpus {self.source}: cannot convert it into {self.folder} ({error}); free some space there, or "
                "choose another cache folder with --corpus_cache"
            ) from error
        loaded = self.load()
        if loaded is None:
            raise DataError(f"corpus cache {self.folder} changed while it was written; delete it and start again")
        return loaded

    def _write(self, folder: Path, on_error: OnError) -> None:
        conversion = _Conversion(self.files, on_error)
        store = conversion.write(folder)
        if not conversion.documents:
            first = f" ({conversion.skipped} bad lines; {conversion.faults[0]})" if conversion.skipped else ""
            raise DataError(f"corpus {self.source} holds no document{first}; expected one per line")
        manifest = _Manifest(
            conversion.fingerprint,
            conversion.documents,
            store.stat().st_size,
            self.states,
            conversion.skipped,
            tuple(str(fault) for fault in conversion.faults),
        )
        manifest_file = folder / "manifest.json"
        manifest_file.write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
        with store.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(store, self._store_path(manifest))
        os.replace(manifest_file, self.manifest_path)
        logger.info("converted %s: %d documents, fingerprint %s", self.source, manifest.documents, manifest.fingerprint)

    def _store_path(self, manifest: _Manifest) -> Path:
        return self.folder / f"{manifest.fingerprint}.arrow"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Convert in one process at a time, and sweep up after those that were killed at it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                # Some network file systems have no locks; without one, conversions at the same time only cost more.
                logger.warning("cannot lock %s (%s); going on without", self.folder, error)
            else:
                for abandoned in self.folder.glob(f"{_TEMPORARY}*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
            yield


def _cache_entry(source: Path, cache: Path | None) -> _CacheEntry:
    try:
        files = source_files(source)
        states = _states(source, files)
    except OSError as error:
        raise DataError(f"corpus {source} cannot be read ({error})") from error
    named = source if source.name.strip(".") else source.resolve()
    cache = cache or named.with_name(f"{named.name}.cache")
    return _CacheEntry(source, files, cache, cache / f"{named.name}.json", states)


class _Conversion:
    """One reading of the source files into an Arrow file.

    Attributes:
        skipped: bad lines and repeated ids that were left out.
        faults: the first few of them.
    """

    def __init__(self, files: Sequence[Path], on_error: OnError) -> None:
        self.fingerprint = ""
        self.documents = 0
        self.skipped = 0
        self.faults: list[Fault] = []
        self._files = files
        self._on_error = on_error

    def write(self, folder: Path) -> Path:
        """Write the documents into `folder`; returns the Arrow file.

        Raises:
            DataError: a bad line or a repeated id, unless they are skipped.
        """
        target = folder / "corpus.arrow"
        places, hashes = array.array("q"), array.array("q")
        with StoreWriter(target) as writer:
            for place, entry in read_corpus(self._files):
                if isinstance(entry, Fault):
                    self._meet(entry)
                    continue
                writer.add(entry)
                places.append(place)
                hashes.append(hash(entry.id))
        self.fingerprint, self.documents = writer.fingerprint(), writer.documents
        repeated = self._repeated(ArrowStore(target, writer.documents), places, hashes) if places else []
        return self._without(target, repeated, folder / "unique.arrow") if repeated else target

    def _meet(self, fault: Fault) -> None:
        if self._on_error == "raise":
            raise DataError(str(fault))
        self.skipped += 1
        if len(self.faults) < _FAULTS_SHOWN:
            self.faults.append(fault)

    def _repeated(self, store: ArrowStore, places: array.array, hashes: array.array) -> list[int]:
        """Return the rows whose id was used on a row before, ascending.

        Ids are compared only where their 64-bit hashes meet: 16 bytes a document instead of a dictionary of all ids.
        """
        values = np.frombuffer(hashes, dtype=np.int64)
        ordered = np.sort(values)
        meeting = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        first: dict[str, int] = {}
        repeated: list[int] = []
        for row in np.flatnonzero(np.isin(values, meeting)).tolist() if len(meeting) else ():
            id = store.id(row)
            if first.setdefault(id, row) == row:
                continue
            file, line = where(self._files, places[row])
            earlier_file, earlier_line = where(self._files, places[first[id]])
            of_file = f" of {earlier_file}" if earlier_file != file else ""
            self._meet(Fault(file, line, f"id {id!r} was used on line {earlier_line}{of_file}; ids must be unique"))
            repeated.append(row)
        return repeated

    def _without(self, source: Path, dropped: Sequence[int], target: Path) -> Path:
        """Write the store again without some of its rows, given in ascending order."""
        documents = ArrowStore(source, self.documents).scan(0, self.documents)
        with StoreWriter(target) as writer:
            start = 0
            for row in (*dropped, self.documents):
                for document in islice(documents, row - start):
                    writer.add(document)
                next(documents, None)
                start = row + 1
        self.fingerprint, self.documents = writer.fingerprint(), writer.documents
        return target
