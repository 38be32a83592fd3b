"""The cache's tables: how a file is opened, created, and brought from version 1 to the present one."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from verl.errors import ConfigError

SCHEMA_VERSION = 2
_BUSY_S = 60.0
_OPEN_PAUSE_S = 0.05
_TABLES = (
    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, model TEXT NOT NULL, reply TEXT NOT NULL,"
    " created REAL NOT NULL, used REAL NOT NULL DEFAULT 0) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS served (endpoint TEXT PRIMARY KEY, model TEXT NOT NULL, max_model_len INTEGER)",
)
_INDEX = "CREATE INDEX IF NOT EXISTS replies_by_use ON replies (used)"
_FROM_1 = ("ALTER TABLE replies ADD COLUMN used REAL NOT NULL DEFAULT 0", "UPDATE replies SET used = created")


def connect(path: Path) -> sqlite3.Connection:
    """Open or create a file; in autocommit, for use from the event loop's thread and from writer threads."""
    return sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open a file that exists and check its version.

    Raises:
        ConfigError: it is of another version.
        sqlite3.Error: it is missing or no sqlite file.
    """
    plain = f"{path.resolve().as_uri()}?mode=ro"
    # Without its write-ahead log, sqlite would want to create one; where it cannot, nobody else writes either.
    for uri in (plain, f"{plain}&immutable=1"):
        connection = sqlite3.connect(uri, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, uri=True)
        try:
            version = _version(connection)
            break
        except sqlite3.OperationalError:
            connection.close()
            if uri != plain or not path.is_file() or path.with_name(path.name + "-wal").exists():
                raise
    if version != SCHEMA_VERSION:
        connection.close()
        raise ConfigError(
            f"cache_path={path} has schema {version}, expected {SCHEMA_VERSION}; open it once with cache_mode=use, "
            "which brings version 1 up to date"
        )
    return connection


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Create the tables in a new file and bring an old one up to date.

    Raises:
        ConfigError: the file was written by a later version.
        sqlite3.Error: it is no sqlite file, or cannot be written.
    """
    version = _version(connection)
    if version not in (0, 1, SCHEMA_VERSION):
        raise ConfigError(f"cache_path={path} has schema {version}, expected {SCHEMA_VERSION} or older; use another")
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version == 0 and tables - {"replies", "served"}:
        raise ConfigError(f"cache_path={path} is the database of something else ({', '.join(sorted(tables))})")
    _patiently(lambda: connection.execute("PRAGMA journal_mode=WAL"))
    connection.execute("PRAGMA synchronous=NORMAL")
    if version == SCHEMA_VERSION:
        return
    _patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
    try:
        # Looked up within the transaction: another process may have been quicker.
        columns = [name for (name,) in connection.execute("SELECT name FROM pragma_table_info('replies')")]
        for statement in (*(_FROM_1 if columns and "used" not in columns else ()), *_TABLES, _INDEX):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _patiently(action: Callable[[], object]) -> None:
    """Repeat what sqlite refuses while several processes open a new file at once, without waiting by itself."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            action()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_OPEN_PAUSE_S)
