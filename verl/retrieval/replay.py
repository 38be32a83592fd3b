"""Answers of services that change, kept in a file, so that a run can be repeated offline bit for bit.

The file is an SQLite database that any number of processes of one machine may use at the same time. An entry is found
by everything that decides an answer: the engine, the query, how many results were asked for and the other parameters.
Keys and passwords are none of these; callers never hand them over.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import quote

from verl.errors import ConfigError, DataError, RetrieverError

ReplayMode = Literal["record", "replay", "off", "refresh"]
"""`record` asks the service only for what the file lacks; `replay` never asks it, and what the file lacks is an error;
`refresh` asks for everything once more and replaces it; `off` uses no file."""

_FORMAT = 1
_BUSY_S = 60.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, engine TEXT NOT NULL, query TEXT NOT NULL, topk INTEGER NOT NULL, parameters TEXT NOT NULL,
    answered_at REAL NOT NULL, body BLOB NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """What was asked; two equal requests have one answer.

    Attributes:
        engine: the service, for example `"serper"`.
        topk: how many results were asked for.
        parameters: whatever else decides the answer, without any key.
    """

    engine: str
    query: str
    topk: int
    parameters: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A JSON list of all of it; characters that are none (unpaired surrogates) are escaped."""
        return json.dumps([self.engine, self.query, self.topk, self.parameters], sort_keys=True)


class ReplayCache:
    """The answers in one file; use from any thread.

    Attributes:
        path: the file.
        mode: see `ReplayMode`.
        found: answers taken from the file so far.
        stored: answers written to it so far.
    """

    def __init__(self, path: str | Path | None, mode: ReplayMode, clock: Callable[[], float] = time.time) -> None:
        """Open the file, creating it (not in mode `replay`).

        Args:
            path: None only with mode `off`.
            clock: seconds since 1970; `refresh` replaces what was answered before this moment.

        Raises:
            ConfigError: unknown mode, or no path where the mode needs one.
            DataError: the file is missing in mode `replay`, is not ours, is damaged, or cannot be written.
        """
        if mode not in get_args(ReplayMode):
            raise ConfigError(f"cache mode {mode!r} is unknown; expected one of {', '.join(get_args(ReplayMode))}")
        if path is None and mode != "off":
            raise ConfigError(f"cache mode {mode!r} needs a file; name one, or use mode off")
        self.path = Path(path) if path is not None else None
        self.mode: ReplayMode = mode
        self.found = 0
        self.stored = 0
        self._clock = clock
        self._opened_at = clock()
        self._lock = threading.Lock()
        self._database = _open(self.path, mode) if self.path is not None and mode != "off" else None

    def find(self, request: ReplayRequest) -> bytes | None:
        """Return the stored answer, or None when the service has to be asked.

        Raises:
            RetrieverError: mode is `replay` and the file has no such answer, or the file cannot be read.
        """
        if self._database is None:
            return None
        since = self._opened_at if self.mode == "refresh" else 0.0
        with self._using() as database:
            row = database.execute(
                "SELECT body FROM answers WHERE key = ? AND answered_at >= ?", (request.key, since)
            ).fetchone()
            self.found += row is not None
        if row is not None:
            return self._unpacked(row[0])
        if self.mode == "replay":
            raise RetrieverError(
                f"replay cache {self.path} has no answer of {request.engine} to {request.query[:80]!a} (topk="
                f"{request.topk}, {json.dumps(dict(request.parameters), sort_keys=True)}); record it first, with cache "
                "mode record"
            )
        return None

    def store(self, request: ReplayRequest, body: bytes) -> bytes:
        """Keep an answer and return the one that counts: another process may have been first.

        Raises:
            RetrieverError: the file cannot be written, or the mode is `replay`.
        """
        if self._database is None:
            return body
        if self.mode == "replay":
            raise RetrieverError(f"replay cache {self.path} is read-only in mode replay; use mode record")
        since = self._opened_at if self.mode == "refresh" else 0.0
        parameters = json.dumps(dict(request.parameters), sort_keys=True)
        # The query column is for people who read the file; the key decides, and holds what UTF-8 cannot.
        query = request.query.encode("utf-8", "replace").decode("utf-8")
        row = (request.key, request.engine, query, request.topk, parameters, self._clock(), zlib.compress(body))
        with self._using() as database:
            database.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET"
                " answered_at = excluded.answered_at, body = excluded.body WHERE answered_at < ?",
                (*row, since),
            )
            stored = database.execute("SELECT body FROM answers WHERE key = ?", (request.key,)).fetchone()
            self.stored += 1
        return self._unpacked(stored[0])

    def __len__(self) -> int:
        """Number of answers in the file."""
        if self._database is None:
            return 0
        with self._using() as database:
            return int(database.execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file; the cache cannot be used afterwards."""
        if self._database is not None:
            with self._lock:
                self._database.close()

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """Hold the connection; its faults become errors of ours."""
        assert self._database is not None
        with self._lock:
            try:
                yield self._database
            except sqlite3.Error as error:
                raise RetrieverError(f"replay cache {self.path}: {error}; check the file and the disk") from error

    def _unpacked(self, body: bytes) -> bytes:
        try:
            return zlib.decompress(body)
        except zlib.error as error:
            raise RetrieverError(
                f"replay cache {self.path} holds a damaged answer ({error}); ask again with cache mode refresh"
            ) from error


def _open(path: Path, mode: ReplayMode) -> sqlite3.Connection:
    if mode == "replay" and not path.is_file():
        raise DataError(f"replay cache {path}: no such file; record it first, with cache mode record")
    try:
        if mode != "replay":
            path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(
            _address(path, mode), uri=True, timeout=_BUSY_S, check_same_thread=False, isolation_level=None
        )
    except (OSError, sqlite3.Error) as error:
        raise DataError(f"replay cache {path} cannot be opened ({error}); name a file that can be written") from error
    try:
        _prepare(database, path, mode)
    except sqlite3.Error as error:
        database.close()
        raise DataError(f"replay cache {path} cannot be used ({error}); name another file") from error
    except DataError:
        database.close()
        raise
    return database


def _address(path: Path, mode: ReplayMode) -> str:
    """Return the SQLite URI. A file in a folder that cannot be written is opened as one that nobody changes."""
    name = f"file:{quote(str(path.absolute()))}"
    if mode != "replay":
        return name
    return f"{name}?mode=ro" if os.access(path.parent, os.W_OK) else f"{name}?immutable=1"


def _prepare(database: sqlite3.Connection, path: Path, mode: ReplayMode) -> None:
    if mode == "replay":
        _check_format(database, path, new=False)
        return
    # One transaction: another process that opens the same new file sees it empty or complete.
    database.execute("BEGIN IMMEDIATE")
    _check_format(database, path, new=True)
    database.execute(_SCHEMA)
    database.execute(f"PRAGMA user_version = {_FORMAT}")
    database.execute("COMMIT")
    # Write-ahead logging lets readers go on while another process writes; a crash loses the last answers at most.
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")


def _check_format(database: sqlite3.Connection, path: Path, new: bool) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if version != _FORMAT and not (new and version == tables == 0):
        raise DataError(f"{path} is no replay cache of format {_FORMAT}; name another file")
