"""Results that need no search: in memory, least recently used first out, and in a file that workers share.

A result is kept under its query with the `topk` it was searched for. Because the result for a smaller `topk` is the
head of the one for a larger (see `Engine`), it answers every `topk` up to its own, and any at all when the search
found fewer documents than it was asked for.
"""

from __future__ import annotations

import array
import hashlib
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from verl.errors import ConfigError
from verl.retrieval.wire import Rendered

logger = logging.getLogger(__name__)

_ENTRY_BYTES = 500
_HIT_BYTES = 100
_APPLICATION_ID = 0x52455452
_FORMAT = 1
_KEYS_PER_SELECT = 500
_BUSY_S = 2.0
_TRIM_EVERY_BYTES = 4 * 1024 * 1024
_SCHEMA = (
    "CREATE TABLE results (number INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, topk INTEGER NOT NULL, "
    "lengths BLOB NOT NULL, scores BLOB NOT NULL, documents BLOB NOT NULL)"
)


class _Kept(NamedTuple):
    topk: int
    hits: Rendered

    def answer(self, topk: int) -> Rendered | None:
        complete = len(self.hits.documents) < self.topk
        return self.hits.head(topk) if topk <= self.topk or complete else None


class MemoryCache:
    """The most recently used results of one engine, bounded by their bytes. Not for several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, query: str, topk: int) -> Rendered | None:
        """Return the result if it is known, and note that it was used."""
        kept = self._kept.get(query)
        hits = kept.answer(topk) if kept is not None else None
        if hits is not None:
            self._kept.move_to_end(query)
        return hits

    def put(self, query: str, topk: int, hits: Rendered) -> None:
        """Keep a result, unless a fuller one is kept already or it would fill a quarter of the cache."""
        size = _size(query, hits)
        if 4 * size > self._max_bytes or self.get(query, topk) is not None:
            return
        previous = self._kept.pop(query, None)
        if previous is not None:
            self.bytes -= _size(query, previous.hits)
        self._kept[query] = _Kept(topk, hits)
        self.bytes += size
        while self.bytes > self._max_bytes:
            oldest, dropped = self._kept.popitem(last=False)
            self.bytes -= _size(oldest, dropped.hits)


class DiskCache:
    """Results in a sqlite file that several processes may use at once, keyed by engine fingerprint and query.

    A fault of the file or the disk costs the cache and never a request: it is logged once, and from then on nothing
    is found or kept. Not for several threads at once.
    """

    def __init__(self, path: Path, fingerprint: str, max_bytes: int) -> None:
        """Open the file, or create it.

        Raises:
            ConfigError: it cannot be opened or created, or is some other file.
        """
        self._path = path
        self._fingerprint = fingerprint.encode()
        self._max_bytes = max_bytes
        self._written = 0
        try:
            self._db: sqlite3.Connection | None = _connect(path)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"cache_file {path} cannot be used ({error}); pass another --cache_file") from error

    def get_many(self, wanted: Mapping[str, int]) -> dict[str, Rendered]:
        """Return what is known of the results for queries, each with the `topk` it is wanted for."""
        keys = {self._key(query): query for query in wanted}
        found: dict[str, Rendered] = {}
        try:
            for key, at, lengths, scores, documents in self._rows(list(keys)):
                kept = _Kept(at, _unpacked(lengths, scores, documents))
                hits = kept.answer(wanted[keys[key]])
                if hits is not None:
                    found[keys[key]] = hits
        except (sqlite3.Error, ValueError, TypeError) as error:
            self._give_up(error)
        return found

    def put_many(self, results: Iterable[tuple[str, Rendered]], topk: int) -> None:
        """Keep results that were searched for with `topk`, each in place of one for a smaller `topk`."""
        if self._db is None:
            return
        rows = [(self._key(query), topk, *_packed(hits)) for query, hits in results]
        try:
            with _transaction(self._db) as db:
                db.executemany(
                    "INSERT INTO results (key, topk, lengths, scores, documents) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET topk = excluded.topk, lengths = excluded.lengths, "
                    "scores = excluded.scores, documents = excluded.documents WHERE excluded.topk > topk",
                    rows,
                )
            self._written += sum(len(row[4]) for row in rows)
            if self._written >= min(_TRIM_EVERY_BYTES, self._max_bytes / 8):
                self._written = 0
                self._trim(self._db)
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _key(self, query: str) -> bytes:
        return hashlib.sha256(self._fingerprint + b"\0" + query.encode()).digest()

    def _rows(self, keys: list[bytes]) -> Iterator[tuple[bytes, int, bytes, bytes, bytes]]:
        if self._db is None:
            return
        for start in range(0, len(keys), _KEYS_PER_SELECT):
            some = keys[start : start + _KEYS_PER_SELECT]
            marks = ", ".join("?" * len(some))
            yield from self._db.execute(
                f"SELECT key, topk, lengths, scores, documents FROM results WHERE key IN ({marks})", some
            )

    def _trim(self, db: sqlite3.Connection) -> None:
        """Drop the oldest tenth of the results as long as the file holds more than it may."""
        while _used_bytes(db) > self._max_bytes:
            with _transaction(db):
                (count,) = db.execute("SELECT count(*) FROM results").fetchone()
                db.execute(
                    "DELETE FROM results WHERE number IN (SELECT number FROM results ORDER BY number LIMIT ?)",
                    (max(1, count // 10),),
                )
            if not count:
                return

    def _give_up(self, error: Exception) -> None:
        logger.error("cache file %s is used no longer (%s); delete it, or free some space", self._path, error)
        self.close()


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        with _transaction(db):  # several workers may create the file at once
            mine = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.execute(_SCHEMA)
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {_FORMAT}")
            elif mine != [_APPLICATION_ID, _FORMAT]:
                raise sqlite3.DatabaseError("it holds something else than cached results of this version")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
    except BaseException:
        if db.in_transaction:  # sqlite itself may have rolled back, for example on a full disk
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _used_bytes(db: sqlite3.Connection) -> int:
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _size(query: str, hits: Rendered) -> int:
    """Estimate what an entry occupies in memory, Python's own part included."""
    return _ENTRY_BYTES + 2 * len(query) + _HIT_BYTES * len(hits.documents) + sum(map(len, hits.documents))


def _packed(hits: Rendered) -> tuple[bytes, bytes, bytes]:
    lengths = array.array("I", map(len, hits.documents))
    return lengths.tobytes(), b",".join(hits.scores), b"".join(hits.documents)


def _unpacked(lengths: bytes, scores: bytes, documents: bytes) -> Rendered:
    """Inverse of `_packed`; raises ValueError for what cannot have come from it."""
    sizes = array.array("I", lengths)
    pieces = scores.split(b",") if scores else []
    if sum(sizes) != len(documents) or len(pieces) != len(sizes):
        raise ValueError("an entry's parts do not fit together")
    found, at = [], 0
    for size in sizes:
        found.append(documents[at : at + size])
        at += size
    return Rendered(tuple(found), tuple(pieces))
