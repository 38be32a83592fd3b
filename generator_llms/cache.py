"""Replies on disk, in one sqlite file that any number of processes may read and write at once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generator_llms.cache_schema import connect, open_read_only, prepare
from generator_llms.replies import ServedModel
from verl.errors import ConfigError, GeneratorError

_TOUCH_S = 3600.0
"""How much older than now the stored time of last use may be: reads would all be writes if it were exact."""
_TOUCHED_AT_ONCE = 256
_PRUNED_AT_ONCE = 200
_DELETE_OLDEST = f"DELETE FROM replies WHERE key IN (SELECT key FROM replies ORDER BY used LIMIT {_PRUNED_AT_ONCE})"
_PRUNE_EVERY = 32
_KEPT_SHARE = 0.9
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def cache_key(request: Mapping[str, Any]) -> str:
    """Return the sha256 of a request (model identity, parameters, messages), whatever the order of its keys."""
    return hashlib.sha256(_CANONICAL.encode(request).encode("ascii")).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored reply; `created` and `used` (last use, to the hour) are seconds since 1970."""

    key: str
    model: str
    reply: str
    created: float
    used: float


class ReplyCache:
    """A persistent mapping from request key to reply.

    The file is in write-ahead mode: readers never wait, a writer waits for another one. An entry is on disk or is not,
    also when its process is killed; the first reply stored for a key stays unless it is overwritten on purpose, so a
    repeated run sees the same replies. Reads are microseconds and may run in an event loop; writes may wait and belong
    in a thread. The file must lie on a disk of this machine, because write-ahead mode shares memory between processes,
    and an instance must not be carried over a fork.

    Args:
        max_bytes: size from which on the replies not used for longest are removed, a few at a time; None is no bound.
        read_only: the file must exist, and nothing is written; works in a folder that cannot be written either.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int | None = None,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the file.

        Raises:
            ConfigError: `path` cannot be opened, is no sqlite file, or was written by another version.
        """
        self.path = path
        self._max_bytes = max_bytes
        self._clock = clock
        self._write_lock = threading.Lock()
        self._touched: set[str] = set()
        self._puts = 0
        self._writer: sqlite3.Connection | None = None
        try:
            if read_only:
                self._reader = open_read_only(path)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = connect(path)
                prepare(self._writer, path)
                self._reader = connect(path)
        except ConfigError:
            self._close_writer()
            raise
        except (sqlite3.Error, OSError) as cause:
            self._close_writer()
            raise ConfigError(
                f"cache_path={path} cannot be used: {cause}; expected a sqlite file of ours or a path for a new one "
                "in a folder that can be written"
            ) from cause

    def get(self, key: str) -> str | None:
        """Return the reply stored for `key`, or None.

        Raises:
            GeneratorError: the file is damaged or gone.
        """
        try:
            row = self._reader.execute("SELECT reply, used FROM replies WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as cause:
            raise self._failure("read", cause) from cause
        if row is None:
            return None
        if self._writer is not None and row[1] < self._clock() - _TOUCH_S:
            self._touched.add(key)
        return row[0]

    def put(self, key: str, model: str, reply: str, overwrite: bool = False) -> None:
        """Store a reply unless `key` has one; blocks while other processes write.

        Raises:
            GeneratorError: it could not be written, for example because the disk is full.
        """
        now = self._clock()
        self.put_all([Entry(key, model, reply, now, now)], overwrite)
        self._puts += 1
        if self._max_bytes is not None and self._puts % _PRUNE_EVERY == 0:
            self.prune_to(self._max_bytes)

    def put_all(self, entries: Iterable[Entry], overwrite: bool = False) -> int:
        """Store several replies in one transaction; return how many were new. Raises as `put`."""
        how = "REPLACE" if overwrite else "IGNORE"
        rows = [(entry.key, entry.model, entry.reply, entry.created, entry.used) for entry in entries]
        with self._writing() as writer:
            before = writer.total_changes
            writer.executemany(f"INSERT OR {how} INTO replies VALUES (?, ?, ?, ?, ?)", rows)
            new = writer.total_changes - before
            self._flush_touched(writer)
        return new

    def served(self, endpoint: str) -> ServedModel | None:
        """Return the model that an endpoint served when it was last asked, or None. Raises as `get`."""
        with self._told("read"):
            row = self._reader.execute("SELECT model, max_model_len FROM served WHERE endpoint = ?", (endpoint,))
            return ServedModel(*found) if (found := row.fetchone()) else None

    def all_served(self) -> dict[str, ServedModel]:
        """Return every endpoint that was ever asked. Raises as `get`."""
        with self._told("read"):
            rows = self._reader.execute("SELECT endpoint, model, max_model_len FROM served ORDER BY endpoint")
            return {endpoint: ServedModel(model, length) for endpoint, model, length in rows}

    def put_served(self, endpoint: str, model: ServedModel) -> None:
        """Remember what an endpoint serves. Raises as `put`."""
        with self._writing() as writer:
            writer.execute(
                "INSERT OR REPLACE INTO served VALUES (?, ?, ?)", (endpoint, model.name, model.max_model_len)
            )

    def count(self) -> int:
        """Return the number of stored replies. Raises as `get`."""
        with self._told("read"):
            return self._reader.execute("SELECT count(*) FROM replies").fetchone()[0]

    def entries(self) -> Iterator[Entry]:
        """Yield every reply in the order of keys, all as of one moment. Raises as `get`."""
        with self._told("read"):
            for row in self._reader.execute("SELECT key, model, reply, created, used FROM replies ORDER BY key"):
                yield Entry(*row)

    def size(self) -> int:
        """Return the bytes that the replies and their index take; the file keeps freed ones for new replies."""
        with self._told("read"):
            return _used_bytes(self._reader)

    def prune_to(self, max_bytes: int) -> int:
        """Remove the replies not used for longest until nine tenths of `max_bytes` are kept; return how many.

        Does nothing up to `max_bytes`. Every step is a short transaction of its own, so nobody else waits for long.
        """
        removed, bound = 0, max_bytes
        while True:
            with self._writing() as writer:
                if _used_bytes(writer) <= bound:
                    return removed
                step = writer.execute(_DELETE_OLDEST).rowcount
            if not step:
                return removed
            removed, bound = removed + step, int(_KEPT_SHARE * max_bytes)

    def prune(self, model: str | None = None, unused_since: float | None = None) -> int:
        """Remove the replies of a model, those last used before a time, or both at once; return how many."""
        conditions, values = ["key > ?"], list[Any]()
        if model is not None:
            conditions.append("model = ?")
            values.append(model)
        if unused_since is not None:
            conditions.append("used < ?")
            values.append(unused_since)
        find = f"SELECT key FROM replies WHERE {' AND '.join(conditions)} ORDER BY key LIMIT {_PRUNED_AT_ONCE}"
        removed, last = 0, ""
        while True:
            with self._writing() as writer:
                found = writer.execute(find, (last, *values)).fetchall()
                writer.executemany("DELETE FROM replies WHERE key = ?", found)
            if not found:
                return removed
            removed, last = removed + len(found), found[-1][0]

    def compact(self) -> None:
        """Give freed space back to the file system; everybody else waits meanwhile. Raises as `put`."""
        with self._write_lock, self._told("written"):
            self._writable().execute("VACUUM")

    def close(self) -> None:
        """Close the file; the cache cannot be used afterwards."""
        with suppress(GeneratorError):  # a use that cannot be noted is no loss
            while self._touched:
                self.put_all(())
        with self._write_lock:
            self._close_writer()
            self._reader.close()

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _flush_touched(self, writer: sqlite3.Connection) -> None:
        now = self._clock()
        for _ in range(min(_TOUCHED_AT_ONCE, len(self._touched))):
            writer.execute("UPDATE replies SET used = ? WHERE key = ?", (now, self._touched.pop()))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Hold this process's writer within a transaction, which is taken back if anything goes wrong."""
        with self._write_lock, self._told("written"):
            writer = self._writable()
            writer.execute("BEGIN IMMEDIATE")
            try:
                yield writer
                writer.execute("COMMIT")
            except BaseException:
                if writer.in_transaction:  # a full disk may have ended it already
                    writer.execute("ROLLBACK")
                raise

    def _writable(self) -> sqlite3.Connection:
        if self._writer is None:
            raise GeneratorError(f"cache_path={self.path} is open for reading only; nothing can be stored in it")
        return self._writer

    @contextmanager
    def _told(self, action: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as cause:
            raise self._failure(action, cause) from cause

    def _failure(self, action: str, cause: sqlite3.Error) -> GeneratorError:
        return GeneratorError(
            f"cache_path={self.path} cannot be {action}: {cause}; see that the disk is not full and the file is "
            "there, or delete a damaged file"
        )


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages, free, page = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * page
