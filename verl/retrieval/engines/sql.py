"""SQL of a policy against SQLite databases, in worker processes that can be killed; every outcome is data.

`SqlEngine` is the tool `sql` of the rewards: `await engine(question, sql)`. See `verl.retrieval.engines.sql_worker` for
what keeps a statement from doing harm. Here its process is killed when it does not answer in time, a new one is started
when one has died, and the results of gold statements are kept.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from verl.errors import RetrieverError
from verl.retrieval.engines import sql_worker
from verl.retrieval.engines.sql_files import find_database
from verl.retrieval.engines.sql_worker import HEADER, MIB, Limits, encoded
from verl.types import Question, SqlResult

logger = logging.getLogger(__name__)

_GRACE_S = 1.0
"""How long after its time a worker may still answer by itself."""
_START_S = 30.0
_READ_BYTES = 1 << 20
_TRIES = 2
_REPLY_BYTES_PER_BYTE = 8
"""A character of a result takes at most six in JSON."""

Key = tuple[Path, str]


class SqlSettings(Protocol):
    """What the engine is told; `verl.rewards.sql_config.SqlConfig` says what each means."""

    @property
    def databases(self) -> Path: ...

    @property
    def timeout_s(self) -> float: ...

    @property
    def max_rows(self) -> int: ...

    @property
    def max_mb(self) -> int: ...

    @property
    def memory_mb(self) -> int: ...

    @property
    def max_chars(self) -> int: ...

    @property
    def workers(self) -> int: ...

    @property
    def cache_mb(self) -> int: ...


class SqlEngine:
    """Runs statements, as many at once as there are workers; close it with `aclose` or `close`.

    Processes start when they are needed. An engine may be used from any event loop and from several.
    """

    def __init__(self, settings: SqlSettings) -> None:
        self.settings = settings
        self._limits = Limits(
            settings.timeout_s,
            settings.max_rows,
            settings.max_mb * MIB,
            settings.memory_mb * MIB,
            settings.max_chars,
        )
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="sql")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._closed = False
        self._found: dict[tuple[str, str], Path] = {}
        self._kept = _Kept(settings.cache_mb * MIB)

    async def __call__(self, question: Question, sql: str, keep: bool = False) -> SqlResult:
        """Run a statement against the database of a question (`extra.db_id`, `extra.db_path`).

        Args:
            keep: answer from what was kept of the same statement before, and keep the result, unless it is an error.

        Raises:
            RetrieverError: no process can be started, or the engine is closed.
        """
        database = self.database(question)
        if database is None:
            name = question.extra.get("db_id") or question.extra.get("db_path", "")
            return SqlResult(error="missing_database", message=f"there is no database {name[:80]!r}")
        return await self.run(database, sql, keep)

    async def run(self, database: Path, sql: str, keep: bool = False) -> SqlResult:
        """Run a statement against a database; arguments and errors as of a call."""
        if not keep:
            return await asyncio.wrap_future(self._submit(database, sql))
        # Shielded: others may wait for the same result.
        return await asyncio.shield(asyncio.wrap_future(self._kept.get((database, sql), self._submit)))

    def database(self, question: Question) -> Path | None:
        """Return the file of a question's database, None if there is none in the folder of databases."""
        asked = (question.extra.get("db_id", ""), question.extra.get("db_path", ""))
        if asked not in self._found:
            found = find_database(self.settings.databases, *asked)
            if found is None:  # it may still come
                return None
            self._found[asked] = found
        return self._found[asked]

    async def aclose(self) -> None:
        """End all processes; what runs ends as an error."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End all processes; what runs ends as an error."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _submit(self, database: Path, sql: str) -> Future[SqlResult]:
        try:
            return self._threads.submit(self._run, database, sql)
        except RuntimeError as cause:
            raise RetrieverError("the SQL engine is closed") from cause

    def _run(self, database: Path, sql: str) -> SqlResult:
        """Run one statement in this thread's worker; once more in a new one if it died."""
        for _ in range(_TRIES):
            worker = self._worker()
            result = worker.ask(database, sql)
            if result is not None and result.error != "memory" and worker.alive:
                return result
            self._discard(worker)
            if result is not None:
                return result
        return SqlResult(error="crash", message=f"its process died, {_TRIES} times")

    def _worker(self) -> _Worker:
        worker = getattr(self._own, "worker", None)
        if worker is None:
            worker = _Worker(self._limits)
            with self._lock:
                if self._closed:
                    worker.kill()
                    raise RetrieverError("the SQL engine is closed")
                self._workers.add(worker)
            self._own.worker = worker
        return worker

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._own.worker = None
        with self._lock:
            self._workers.discard(worker)


class _Worker:
    """One process, asked by one thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._fresh = True
        self.alive = True
        # Isolated and without site-packages: it starts in milliseconds, and sees neither paths nor keys of ours.
        command = [sys.executable, "-I", "-S", sql_worker.__file__, json.dumps(asdict(limits))]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
        except OSError as cause:
            raise RetrieverError(f"no process for SQL can be started: {cause}; free memory or processes") from cause

    def ask(self, database: Path, sql: str) -> SqlResult | None:
        """Return what came of a statement; None if the process died of it or without a cause."""
        deadline = time.monotonic() + self._limits.timeout_s + _GRACE_S + (_START_S if self._fresh else 0.0)
        self._fresh = False
        try:
            self._send(encoded({"database": str(database), "sql": sql}), deadline)
            (length,) = HEADER.unpack(self._receive(HEADER.size, deadline))
            if length > _REPLY_BYTES_PER_BYTE * self._limits.max_bytes:
                return None
            reply = json.loads(self._receive(length, deadline))
        except TimeoutError:
            self.kill()
            return SqlResult(error="timeout", message="its process was killed")
        except (OSError, EOFError, ValueError):
            return None
        return _result(reply, length)

    def kill(self) -> None:
        """End the process at once."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not sent is lost
                    continue

    def _send(self, data: bytes, deadline: float) -> None:
        assert self._process.stdin is not None
        target = self._process.stdin.fileno()
        view = memoryview(data)
        while view:
            _wait(target, select.POLLOUT, deadline)
            # A pipe that is ready takes this much without blocking.
            view = view[os.write(target, view[: select.PIPE_BUF]) :]

    def _receive(self, count: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        parts: list[bytes] = []
        while count:
            _wait(source, select.POLLIN, deadline)
            part = os.read(source, min(count, _READ_BYTES))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Wait until a pipe is ready; TimeoutError at the deadline."""
    poll = select.poll()
    poll.register(descriptor, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(1000 * left):
        raise TimeoutError


def _result(reply: dict[str, Any], size: int) -> SqlResult:
    if "error" in reply:
        return SqlResult(error=reply["error"], message=reply["message"])
    rows = tuple(tuple(bytes.fromhex(c["x"]) if isinstance(c, dict) else c for c in row) for row in reply["rows"])
    return SqlResult(rows, columns=reply["columns"], size=size)


class _Kept:
    """Results by database and statement, those used last up to a number of bytes; each is made once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.RLock()
        self._futures: OrderedDict[Key, Future[SqlResult]] = OrderedDict()

    def get(self, key: Key, make: Any) -> Future[SqlResult]:
        """Return the result that is there or under way, or have it made."""
        with self._lock:
            if key in self._futures:
                self._futures.move_to_end(key)
                return self._futures[key]
            future = self._futures[key] = make(*key)
        future.add_done_callback(lambda done: self._done(key, done))
        return future

    def _done(self, key: Key, future: Future[SqlResult]) -> None:
        failed = future.cancelled() or future.exception() is not None or future.result().error
        with self._lock:
            if failed:
                self._futures.pop(key, None)
                return
            self._bytes += future.result().size
            for old, kept in list(self._futures.items()):
                if self._bytes <= self._max_bytes:
                    return
                if kept.done():
                    self._bytes -= kept.result().size
                    del self._futures[old]
