from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.retrieval import pool_targets
from verl.errors import ServiceError
from verl.retrieval.metrics import SHARED_FOLDER
from verl.retrieval.worker_pool import Target, WorkerPool

PATIENCE_S = 240.0
"""For up to three interpreters, started one after the other on a machine that is busy with something else."""


@contextmanager
def running(target: Target, folder: Path, count: int = 2, stop_timeout_s: float = 10.0) -> Iterator[Future[None]]:
    """Run a pool; an error that ends it ends the test."""
    pool = WorkerPool(target, (folder,), count, stop_timeout_s)
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(pool.run)
        try:
            yield run
        finally:
            pool.stop()
        run.result()


def until(condition: Callable[[], bool], run: Future[None] | None = None) -> None:
    """Wait for a condition, as long as the pool runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert run is None or not run.done(), f"the pool has ended: {run.exception()}"
        time.sleep(0.02)


def started(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir()}


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_a_worker_that_dies_is_replaced_and_all_end_with_the_pool(tmp_path: Path) -> None:
    with running(pool_targets.work, tmp_path) as run:
        until(lambda: len(started(tmp_path)) == 2, run)
        victim = min(started(tmp_path))
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(started(tmp_path)) == 3, run)
        assert sum(map(alive, started(tmp_path))) == 2 and not alive(victim)
    assert not any(map(alive, started(tmp_path)))
    assert SHARED_FOLDER not in os.environ


def test_a_pool_that_cannot_start_says_so_and_starts_no_second_worker(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="worker 0 ended with exit code 3 before it was ready"):
        WorkerPool(pool_targets.fail, (tmp_path,), 3, 10.0).run()
    assert len(started(tmp_path)) == 1


def test_a_worker_that_fails_beside_a_good_one_is_tried_again(tmp_path: Path) -> None:
    with running(pool_targets.fail_once_there_is_another, tmp_path) as run:
        until(lambda: len(started(tmp_path)) >= 3, run)
        assert sum(map(alive, started(tmp_path))) >= 1


class LastWords:
    """Stands for a worker that says "ready" and ends, both just after it was first asked about itself."""

    number, pid, may_start, ready, asked, gone = 0, 0, False, False, 0, False

    def check_ready(self) -> bool:
        self.ready, self.asked = self.asked > 0, self.asked + 1
        return self.ready

    def exit_code(self) -> int | None:
        code, self.asked = (4 if self.asked else None), self.asked + 1
        return code

    def forget(self) -> float:
        self.gone = True
        return 0.0


def test_a_worker_that_ends_just_after_it_was_ready_does_not_end_the_pool(tmp_path: Path) -> None:
    pool, worker = WorkerPool(pool_targets.work, (tmp_path,), 1, 1.0), LastWords()
    pool._workers = [worker]  # type: ignore[list-item]
    pool._tend(str(tmp_path))
    pool._tend(str(tmp_path))
    assert worker.gone


def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    with running(pool_targets.work_deaf, tmp_path, count=1, stop_timeout_s=0.5) as run:
        until(lambda: len(started(tmp_path)) == 1, run)
    assert not any(map(alive, started(tmp_path)))


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from tests.retrieval import pool_targets\n"
        "from verl.retrieval.worker_pool import WorkerPool\n"
        f"if __name__ == '__main__': WorkerPool(pool_targets.work, (Path({str(tmp_path)!r}),), 2, 5.0).run()\n"
    )
    script = tmp_path.parent / f"{tmp_path.name}.py"
    script.write_text(code)
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": root})
    try:
        until(lambda: len(started(tmp_path)) == 2)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(map(alive, started(tmp_path))))
