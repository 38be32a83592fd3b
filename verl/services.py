"""Start the retriever and the frozen generator as child processes, wait for their health, and always stop them.

A service runs under `verl/supervise.py`, connected to us by a pipe: leaving the context stops its whole process
group, and so does our own death in any way (Ctrl-C, SIGTERM, `kill -9`), because that closes the pipe.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

from verl.errors import ServiceError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_SUPERVISOR = Path(__file__).with_name("supervise.py")
_POLL_SECONDS = 0.2
_PROBE_TIMEOUT = 2.0
_SETTLE_SECONDS = 0.5
_TAIL_LINES = 25
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Service:
    """One child process that answers HTTP; use as a context manager, or several at once with `running`.

    Attributes:
        command: program and arguments.
        health_url: a GET on it answers 200 once the service is ready.
        log_path: receives stdout and stderr, overwritten at every start.
        env: variables on top of our own environment.
        startup_timeout: seconds until an unhealthy service is given up.
        grace: seconds between SIGTERM and SIGKILL.
    """

    name: str
    command: Sequence[str]
    health_url: str
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    startup_timeout: float = 120.0
    grace: float = 10.0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        parts = urlsplit(self.health_url)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def alive(self) -> bool:
        """Whether the process has been started and still runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process without waiting for its health.

        Raises:
            ServiceError: something else listens on the port already, or this service has been started before.
        """
        if self._process is not None:
            raise ServiceError(f"{self.name} has been started already; stop it first")
        parts = urlsplit(self.health_url)
        if _listens(parts.hostname or HOST, parts.port or 80):
            raise ServiceError(f"{self.name}: port {parts.port} is in use by another process; choose a free port")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        supervised = [sys.executable, "-S", "-P", str(_SUPERVISOR), str(self.grace), *map(str, self.command)]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                supervised,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.env},
                start_new_session=True,
            )
        logger.info("started %s at %s, log in %s", self.name, self.url, self.log_path)

    def wait_ready(self) -> None:
        """Block until the service is healthy.

        Raises:
            ServiceError: it ended or was not healthy within `startup_timeout`; carries the end of its log.
        """
        started = time.monotonic()
        while time.monotonic() - started < self.startup_timeout:
            self.check()
            if _healthy(self.health_url):
                logger.info("%s is ready after %.1f s", self.name, time.monotonic() - started)
                return
            time.sleep(_POLL_SECONDS)
        raise ServiceError(
            f"{self.name} did not answer {self.health_url} within {self.startup_timeout:g} s; raise startup_timeout "
            f"or see its log:\n{self.log_tail()}"
        )

    def check(self) -> None:
        """Do nothing if the process runs.

        Raises:
            ServiceError: it has not been started, or it ended; carries the exit code and the end of its log.
        """
        if self._process is None:
            raise ServiceError(f"{self.name} is not running; start it first")
        code = self._process.poll()
        if code is not None:
            raise ServiceError(f"{self.name} ended with exit code {code}; its log ends with:\n{self.log_tail()}")

    def stop(self) -> None:
        """Stop the process (SIGTERM, SIGKILL after the grace) and what it started; do nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None  # it was created with a pipe
        process.stdin.close()
        try:
            process.wait(timeout=self.grace + 5.0)
        except subprocess.TimeoutExpired:
            logger.error(
                "%s survives SIGKILL, probably blocked in the kernel; its supervisor is %d", self.name, process.pid
            )

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines of the log with its path."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""
        return "\n".join([f"[{self.log_path}]", *text.splitlines()[-lines:]])

    def __enter__(self) -> Service:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._has_ended():
            error.add_note(f"{self.name} had ended by itself; its log ends with:\n{self.log_tail()}")
        self.stop()

    def _has_ended(self) -> bool:
        """Whether the process ended by itself; a client may see the broken connection a moment before we can."""
        if self._process is None:
            return False
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_SETTLE_SECONDS)
        return not self.alive


@contextmanager
def running(*services: Service) -> Iterator[None]:
    """Start services side by side, wait until all are healthy, and stop all of them on the way out.

    Raises:
        ServiceError: one of them did not start; the others are stopped.
    """
    with ExitStack() as stack:
        for service in services:
            service.start()
            stack.push(service)
        for service in services:
            service.wait_ready()
        yield


def free_ports(count: int, host: str = HOST) -> list[int]:
    """Return `count` different TCP ports that nothing listens on at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((host, 0))
        return [sock.getsockname()[1] for sock in sockets]


def free_port(host: str = HOST) -> int:
    """Return a TCP port that nothing listens on at the moment."""
    return free_ports(1, host)[0]


def retriever_service(
    index_path: Path | Sequence[Path],
    corpus_path: Path,
    retriever_name: str,
    topk: int,
    port: int,
    log_path: Path,
    retriever_model: str | None = None,
    startup_timeout: float = 120.0,
) -> Service:
    """Describe a retriever: `verl.retrieval.server` over one index, or over those that it is to fuse."""
    indexes = [index_path] if isinstance(index_path, Path) else index_path
    command = [sys.executable, "-m", "verl.retrieval.server", "--host", HOST, "--port", str(port)]
    command += ["--index_path", *map(str, indexes), "--corpus_path", str(corpus_path)]
    command += ["--retriever_name", retriever_name, "--topk", str(topk)]
    if retriever_model is not None:
        command += ["--retriever_model", retriever_model]
    return Service(
        name=f"retriever ({retriever_name})",
        command=command,
        health_url=f"http://{HOST}:{port}/health",
        log_path=log_path,
        startup_timeout=startup_timeout,
    )


def generator_service(
    model: str,
    port: int,
    log_path: Path,
    max_model_len: int,
    device: Literal["cpu", "gpu"],
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    threads: int = 1,
    served_model_name: str | None = None,
    startup_timeout: float = 300.0,
) -> Service:
    """Describe a frozen generator: vLLM's OpenAI-compatible server.

    Args:
        model: directory of a checkpoint (then no hub is ever asked), or a hub name.
        threads: OpenMP threads on the CPU; unused on a GPU.
        served_model_name: the name that clients send as `model`; `model` itself if None.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)]
    command += ["--model", model, "--dtype", dtype, "--max-model-len", str(max_model_len)]
    command += ["--tensor-parallel-size", str(tensor_parallel_size)]
    if served_model_name is not None:
        command += ["--served-model-name", served_model_name]
    if device == "cpu":
        command += ["--enforce-eager"]
    env = vllm_cpu_env(threads) if device == "cpu" else {}
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return Service(
        name=f"generator ({served_model_name or model})",
        command=command,
        health_url=f"http://{HOST}:{port}/health",
        log_path=log_path,
        env=env | offline | {"VLLM_NO_USAGE_STATS": "1"},
        startup_timeout=startup_timeout,
    )


def vllm_cpu_env(threads: int = 1, kv_cache_gib: int = 1) -> dict[str, str]:
    """Return the environment for a vLLM CPU engine that shares the machine with other engines.

    vLLM's default binding ("auto") reserves the last physical core for its scheduler and pins the OpenMP threads to
    the first ones, the same ones in every process: two engines on two cores would both compute on core 0. So binding is
    off, the number of threads is stated, and the kernel spreads the processes.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }


def _healthy(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=_PROBE_TIMEOUT) as answer:
            return answer.status == 200
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def _listens(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=_PROBE_TIMEOUT):
        return True
    return False
