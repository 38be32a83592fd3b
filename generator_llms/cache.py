"""Replies on disk, in one sqlite file that any number of processes may read and write at once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl.errors import ConfigError

_SCHEMA_VERSION = 1
_BUSY_S = 60.0
_OPEN_PAUSE_S = 0.05
_TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, reply TEXT NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""


def cache_key(request: Mapping[str, Any]) -> str:
    """Return the sha256 of a request (model identity, parameters, messages), whatever the order of its keys."""
    canonical = json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


class ReplyCache:
    """A persistent mapping from request key to reply.

    The file is in write-ahead mode: readers never wait, a writer waits for another one. An entry is on disk or is not,
    also when its process is killed; the first reply stored for a key stays, so a repeated run sees the same replies.
    Reads are microseconds and may run in an event loop; writes may wait and belong in a thread. An instance must not
    be carried over a fork.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            ConfigError: `path` cannot be opened, is no sqlite file, or was written by another version.
        """
        self.path = path
        self._write_lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = _connect(path)
            _prepare(self._writer, path)
            self._reader = _connect(path)
        except (sqlite3.Error, OSError) as cause:
            raise ConfigError(
                f"cache_path={path} cannot be used: {cause}; expected a sqlite file of ours or a path for a new one"
            ) from cause

    def get(self, key: str) -> str | None:
        """Return the reply stored for `key`, or None."""
        row = self._reader.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, model: str, reply: str) -> None:
        """Store a reply unless `key` has one; blocks while other processes write."""
        with self._write_lock:
            self._writer.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", (key, model, reply, time.time()))

    def count(self) -> int:
        """Return the number of stored replies."""
        return self._reader.execute("SELECT count(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Close the file; the cache cannot be used afterwards."""
        with self._write_lock:
            self._writer.close()
            self._reader.close()


def _connect(path: Path) -> sqlite3.Connection:
    # Autocommit, so that every entry is its own transaction; used from the loop's thread and from writer threads.
    return sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    _enter_wal(connection)
    connection.execute("PRAGMA synchronous=NORMAL")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _SCHEMA_VERSION):
        raise ConfigError(
            f"cache_path={path} has schema {version}, expected {_SCHEMA_VERSION}; delete the file or name another"
        )
    connection.execute(_TABLE)
    connection.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead mode; sqlite does not wait by itself when several processes switch a new file at once."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_OPEN_PAUSE_S)
