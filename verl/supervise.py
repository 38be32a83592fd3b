"""Run one command as a process group that never outlives the process which asked for it.

Usage: `python supervise.py GRACE_SECONDS COMMAND...`, with a pipe as stdin. When the other end of the pipe closes (on
purpose, or because its owner ended in any way, `kill -9` included) the command gets SIGTERM, so that it can stop its
own children in order; once it has ended, or after the grace, SIGKILL ends whatever is left of the group. Only the
standard library is imported, and the file is run by its path, so that it starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress


def main(grace: float, command: list[str]) -> int:
    """Run `command` until it ends or stdin closes; return its exit code, 128 + n if signal n ended it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    threading.Thread(target=_stop_at_end_of_input, args=(child, grace), daemon=True).start()
    code = child.wait()
    _kill_group(child.pid)
    return code if code >= 0 else 128 - code


def _stop_at_end_of_input(child: subprocess.Popen[bytes], grace: float) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    child.terminate()
    time.sleep(grace)
    _kill_group(child.pid)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
