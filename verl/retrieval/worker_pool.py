"""Several processes that do the same work, kept alive by their parent and never outliving it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from verl.errors import ServiceError
from verl.retrieval.metrics import SHARED_FOLDER

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_HEALTHY_S = 60.0
_SPAWN = multiprocessing.get_context("spawn")  # a fork would share the threads' locks, but not the threads

Target = Callable[..., None]
"""Does the work: called with a function that says "ready", and with the pool's arguments."""


class WorkerPool:
    """Starts workers, the first one alone so that a fault or a conversion shows once, and starts anew those that end.

    A worker that ends before it is ready while no other one is ready ends the pool.
    """

    def __init__(self, target: Target, arguments: tuple[Any, ...], count: int, stop_timeout_s: float) -> None:
        """Prepare a pool.

        Args:
            target: importable by its name, as are the classes of the arguments.
            stop_timeout_s: how long a worker may take to end after SIGTERM until it is killed.
        """
        self._workers = [_Worker(target, arguments, number) for number in range(count)]
        self._stop_timeout_s = stop_timeout_s
        self._stopping = False

    def stop(self) -> None:
        """Have `run` return soon; may be called from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Keep the workers alive until `stop`.

        Raises:
            ServiceError: none of them could be started.
        """
        with tempfile.TemporaryDirectory(prefix="retriever-metrics-") as folder:
            os.environ[SHARED_FOLDER] = folder
            try:
                while not self._stopping:
                    self._tend(folder)
                    time.sleep(_POLL_S)
            finally:
                self._stop_all()
                del os.environ[SHARED_FOLDER]

    def _tend(self, folder: str) -> None:
        # In this order: whoever has ended by now has said all that it had to say, and may have been ready before.
        codes = [worker.exit_code() for worker in self._workers]
        any_ready = any([worker.check_ready() for worker in self._workers])  # every one is to be asked
        for worker, code in zip(self._workers, codes, strict=True):
            if code is not None:
                self._ended(worker, code, folder)
            if worker.may_start and (any_ready or worker is self._workers[0]):
                worker.start()

    def _ended(self, worker: _Worker, code: int, folder: str) -> None:
        mark_process_dead(worker.pid, folder)
        was_ready = worker.ready
        pause = worker.forget()
        if not was_ready and not any(other.ready for other in self._workers):
            raise ServiceError(f"worker {worker.number} ended with exit code {code} before it was ready; see above")
        logger.error("worker %d ended with exit code %d; starting it again in %.1f s", worker.number, code, pause)

    def _stop_all(self) -> None:
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + self._stop_timeout_s
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))


class _Worker:
    """A place in the pool and the process that fills it, if there is one."""

    def __init__(self, target: Target, arguments: tuple[Any, ...], number: int) -> None:
        self._target = target
        self._arguments = arguments
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._start_at = 0.0
        self._started = 0.0
        self._failures = 0
        self.number = number
        self.pid = 0
        self.ready = False

    @property
    def may_start(self) -> bool:
        """Whether there is no process and its pause is over."""
        return self._process is None and time.monotonic() >= self._start_at

    def start(self) -> None:
        """Start the process."""
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_run, args=(theirs, self._target, self._arguments))
        self._process.start()
        theirs.close()
        self._started = time.monotonic()
        self.pid = self._process.pid or 0

    def check_ready(self) -> bool:
        """Whether the process has said that it is ready."""
        if not self.ready and self._connection is not None and self._connection.poll():
            try:
                self.ready = self._connection.recv()
            except EOFError:  # it ended; `exit_code` tells
                return False
        return self.ready

    def exit_code(self) -> int | None:
        """Return the code with which the process ended, None while it runs or where there is none."""
        return self._process.exitcode if self._process is not None else None

    def forget(self) -> float:
        """Make room for a new process; return the seconds until it may start."""
        assert self._process is not None and self._connection is not None  # it was started
        self._connection.close()
        self._process.close()
        lived_well = self.ready and time.monotonic() - self._started > _HEALTHY_S
        self._failures = 0 if lived_well else self._failures + 1
        pause = min(_FIRST_PAUSE_S * 2 ** min(self._failures, 10), _LONGEST_PAUSE_S)
        self._start_at = time.monotonic() + pause
        self._process, self._connection, self.ready = None, None, False
        return pause

    def terminate(self) -> None:
        """Ask the process to end."""
        if self._process is not None:
            self._process.terminate()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the process, and kill it after that."""
        if self._process is None:
            return
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            logger.error("worker %d did not end within its time; killing it", self.number)
            self._process.kill()
            self._process.join()


def _run(connection: Connection, target: Target, arguments: tuple[Any, ...]) -> None:
    """Be a worker process: do the work, and end when the parent has ended in any way."""
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    target(lambda: connection.send(True), *arguments)


def _end_with_parent(connection: Connection) -> None:
    try:
        connection.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
