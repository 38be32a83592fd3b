"""What the worker processes of `test_worker_pool` do; imported by them, so nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

Ready = Callable[[], None]


def _note(folder: Path) -> None:
    (folder / f"{os.getpid()}").touch()


def work(ready: Ready, folder: Path) -> None:
    """Be ready, and run until stopped."""
    _note(folder)
    ready()
    while True:
        time.sleep(0.05)


def work_deaf(ready: Ready, folder: Path) -> None:
    """Be ready, and not to be stopped."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    work(ready, folder)


def fail(ready: Ready, folder: Path) -> None:
    """End before being ready."""
    _note(folder)
    raise SystemExit(3)


def fail_once_there_is_another(ready: Ready, folder: Path) -> None:
    """Be ready if this is the first worker, else end."""
    if any(folder.iterdir()):
        fail(ready, folder)
    work(ready, folder)
