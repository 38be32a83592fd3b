"""Service processes: health, errors with the log's end, and that nothing survives, whoever dies how."""

from __future__ import annotations

import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from verl.errors import ServiceError
from verl.services import (
    Service,
    free_port,
    free_ports,
    generator_service,
    retriever_service,
    running,
    vllm_cpu_env,
)

SERVER = textwrap.dedent(
    """
    import http.server, os, pathlib, signal, subprocess, sys
    port, folder, stubborn = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:] == ["stubborn"]
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("serving", os.environ.get("GREETING"), flush=True)
    (folder / "pids").write_text(f"{os.getpid()} {helper.pid}")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/crash":
                print("cannot go on", flush=True)
                os._exit(3)
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
)


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("server") / "server.py"
    path.write_text(SERVER)
    return path


def service(script: Path, folder: Path, *extra: str, path: str = "/health", **options: float) -> Service:
    port = free_port()
    command = [sys.executable, str(script), str(port), str(folder), *extra]
    url = f"http://127.0.0.1:{port}{path}"
    env = {"GREETING": "hello"}
    return Service("toy", command, url, folder / "logs" / "toy.log", env, **({"startup_timeout": 60.0} | options))


def pids(folder: Path) -> list[int]:
    return [int(word) for word in (folder / "pids").read_text().split()]


def exists(pid: int) -> bool:
    """Whether a process runs (a zombie that nobody has reaped yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def holds(condition: Callable[[], bool], patience: float = 30.0) -> bool:
    deadline = time.monotonic() + patience
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def all_end(folder: Path) -> bool:
    return holds(lambda: not any(exists(pid) for pid in pids(folder)))


def test_a_service_is_healthy_inside_and_gone_after(script: Path, tmp_path: Path) -> None:
    with service(script, tmp_path) as toy:
        assert toy.alive
        with urllib.request.urlopen(toy.url + "/health") as answer:
            assert answer.status == 200
        assert [exists(pid) for pid in pids(tmp_path)] == [True, True]
        assert "serving hello" in toy.log_tail()
    assert not toy.alive
    assert all_end(tmp_path)


def test_a_service_can_be_started_again(script: Path, tmp_path: Path) -> None:
    toy = service(script, tmp_path)
    for _ in range(2):
        with toy:
            toy.check()
            with pytest.raises(ServiceError, match="has been started already"):
                toy.start()
    with pytest.raises(ServiceError, match="toy is not running"):
        toy.check()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_stops_the_service(script: Path, tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), service(script, tmp_path):
        raise error
    assert all_end(tmp_path)


def test_a_service_that_ignores_sigterm_is_killed(script: Path, tmp_path: Path) -> None:
    with service(script, tmp_path, "stubborn", grace=0.5):
        pass
    assert all_end(tmp_path)


def test_a_service_that_ends_at_start_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such index'); sys.exit(4)"]
    broken = Service("broken", command, f"http://127.0.0.1:{free_port()}/health", tmp_path / "broken.log")
    with (
        pytest.raises(ServiceError, match=r"broken ended with exit code 4; its log ends with:\n.*\nno such index"),
        broken,
    ):
        pass


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    absent = Service("absent", ["no-such-program"], f"http://127.0.0.1:{free_port()}/health", tmp_path / "log")
    with pytest.raises(ServiceError, match="No such file or directory: 'no-such-program'"), absent:
        pass


def test_a_service_killed_by_a_signal_reports_it(script: Path, tmp_path: Path) -> None:
    with service(script, tmp_path) as toy:
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        assert holds(lambda: not toy.alive)
        with pytest.raises(ServiceError, match="exit code 137"):
            toy.check()


def test_a_service_that_never_gets_healthy_times_out_and_is_stopped(script: Path, tmp_path: Path) -> None:
    slow = service(script, tmp_path, path="/nowhere", startup_timeout=2.0)
    with pytest.raises(ServiceError, match=r"did not answer http://.*/nowhere within 2 s; raise startup_timeout"), slow:
        pass
    assert not slow.alive


def test_a_service_that_dies_while_in_use_is_noted_on_the_error(script: Path, tmp_path: Path) -> None:
    with pytest.raises(http.client.RemoteDisconnected) as caught, service(script, tmp_path) as toy:
        urllib.request.urlopen(toy.url + "/crash")
    (note,) = caught.value.__notes__
    assert note.startswith("toy had ended by itself")
    assert note.endswith("cannot go on")


def test_an_error_of_the_caller_is_not_blamed_on_a_healthy_service(script: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine") as caught, service(script, tmp_path):
        raise ValueError("mine")
    assert not hasattr(caught.value, "__notes__")


def test_a_port_in_use_is_refused_before_anything_starts(script: Path, tmp_path: Path) -> None:
    toy = service(script, tmp_path)
    port = int(toy.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ServiceError, match=f"port {port} is in use"):
        toy.start()
    assert not toy.alive
    assert not toy.log_path.exists()


def test_running_starts_all_and_stops_all(script: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = service(script, tmp_path / "a"), service(script, tmp_path / "b")
    with running(first, second):
        assert first.alive and second.alive
    assert all_end(tmp_path / "a") and all_end(tmp_path / "b")


def test_one_failing_service_stops_the_others(script: Path, tmp_path: Path) -> None:
    good = service(script, tmp_path)
    bad = Service(
        "bad", [sys.executable, "-c", "raise SystemExit(1)"], f"http://127.0.0.1:{free_port()}/", tmp_path / "bad"
    )
    with pytest.raises(ServiceError, match="bad ended with exit code 1"), running(good, bad):
        pass
    assert not good.alive and not bad.alive


OWNER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from verl.services import Service
    port, folder, script = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    command = [sys.executable, script, str(port), str(folder)]
    with Service("toy", command, f"http://127.0.0.1:{port}/health", folder / "toy.log", startup_timeout=60):
        print("ready", flush=True)
        time.sleep(600)
    """
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_survives_the_owners_death(script: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", OWNER, str(free_port()), str(tmp_path), str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout.readline() == b"ready\n"
        assert [exists(pid) for pid in pids(tmp_path)] == [True, True]
        owner.send_signal(number)
    assert all_end(tmp_path)


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass


@pytest.fixture
def unhealthy() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_service_that_answers_503_is_not_ready(unhealthy: int, tmp_path: Path) -> None:
    idle = Service(
        "idle",
        [sys.executable, "-c", "import time; time.sleep(600)"],
        f"http://127.0.0.1:{free_port()}/health",
        tmp_path / "idle.log",
        startup_timeout=0.5,
    )
    idle.start()
    idle.health_url = f"http://127.0.0.1:{unhealthy}/health"
    with pytest.raises(ServiceError, match=r"did not answer .* within 0\.5 s"):
        idle.wait_ready()
    idle.stop()


def test_retriever_command(tmp_path: Path) -> None:
    made = retriever_service(tmp_path / "i", tmp_path / "c.jsonl", "e5", 8, 3000, tmp_path / "log", "some/model")
    assert made.url == "http://127.0.0.1:3000"
    assert made.health_url == "http://127.0.0.1:3000/health"
    flags = dict(zip(made.command[3::2], made.command[4::2], strict=True))
    assert list(made.command[:3]) == [sys.executable, "-m", "verl.retrieval.server"]
    assert flags == {
        "--host": "127.0.0.1",
        "--port": "3000",
        "--index_path": str(tmp_path / "i"),
        "--corpus_path": str(tmp_path / "c.jsonl"),
        "--retriever_name": "e5",
        "--topk": "8",
        "--retriever_model": "some/model",
    }
    plain = retriever_service(tmp_path / "i", tmp_path / "c.jsonl", "bm25", 8, 3000, tmp_path / "log")
    assert "--retriever_model" not in plain.command


def test_a_retriever_may_fuse_several_indexes(tmp_path: Path) -> None:
    paths = [tmp_path / "bm25", tmp_path / "dense"]
    command = list(retriever_service(paths, tmp_path / "c", "hybrid", 8, 4000, tmp_path / "log").command)
    at = command.index("--index_path")
    assert command[at + 1 : at + 4] == [str(paths[0]), str(paths[1]), "--corpus_path"]


def test_generator_command_on_cpu_and_gpu(tmp_path: Path) -> None:
    local = generator_service(str(tmp_path), 8000, tmp_path / "log", 2048, "cpu", dtype="float32", threads=2)
    assert "--enforce-eager" in local.command
    assert local.env == vllm_cpu_env(2) | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    hub = generator_service("org/name", 8000, tmp_path / "log", 8192, "gpu", tensor_parallel_size=2)
    assert "--enforce-eager" not in hub.command
    assert hub.env == {"VLLM_NO_USAGE_STATS": "1"}
    assert hub.command[hub.command.index("--tensor-parallel-size") + 1] == "2"
    named = generator_service("org/name", 8000, tmp_path / "log", 8192, "gpu", served_model_name="frozen")
    assert named.command[-2:] == ["--served-model-name", "frozen"]
