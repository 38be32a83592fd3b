"""The real thing: index and server as processes, a client over the network."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from tests.retrieval.support import PASSAGES, FakeEngine, free_port, open_corpus, write_corpus
from verl.errors import RetrieverError
from verl.retrieval.app import create_app
from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig, search_sync
from verl.retrieval.engine import open_index
from verl.retrieval.server_config import ServerConfig

pytestmark = pytest.mark.integration


SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@contextlib.contextmanager
def running(
    *arguments: object, module: str = "verl.retrieval.server", script: str | None = None, **variables: object
) -> Iterator[subprocess.Popen[str]]:
    """A server process, of a module or of a script with variables, that ends with the test."""
    start = (sys.executable, "-m", module) if script is None else ("bash", SCRIPTS / script)
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}}
    process = subprocess.Popen(list(map(str, (*start, *arguments))), env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def client_config(port: int, retry_window_s: float = 60.0) -> RetrieverClientConfig:
    url = f"http://127.0.0.1:{port}/retrieve"
    return RetrieverClientConfig(url=url, retry_window_s=retry_window_s, backoff_s=0.1, max_backoff_s=0.2)


@pytest.fixture
def served(tmp_path: Path) -> tuple[object, ...]:
    """Command line of a server over a BM25 index, less the port."""
    corpus = open_corpus(tmp_path)
    build_index(corpus, "bm25", tmp_path / "index")
    return "--index_path", tmp_path / "index", "--corpus_path", corpus.path, "--retriever_name", "bm25", "--topk", 2


def test_build_and_serve_by_the_scripts(tmp_path: Path) -> None:
    folder, port = tmp_path / "index", free_port()
    what = {"RETRIEVER_NAME": "minilm", "CORPUS_PATH": write_corpus(tmp_path / "corpus.jsonl")}
    with running("--device", "cpu", script="index_build/build_index.sh", SAVE_DIR=folder, **what) as build:
        assert build.wait(timeout=200) == 0
    where = {"INDEX_PATH": folder / "minilm_Flat.index", "PORT": port}
    flags, script = ("--threads", 1, "--device", "cpu", "--topk", 3), "deploy_retriever/retrieval_launch.sh"
    with running(*flags, script=script, **where, **what) as process:
        until(lambda: process.poll() is not None or status(port, "/ready") == 200, 200.0)
        queries = ["which metal melts easily", "what is the seat of the German government"]
        results = search_sync(client_config(port), queries, 3)
        assert [result.documents[0].id for result in results] == ["d4", "d1"]
        assert all(len(result.documents) == 3 for result in results)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


async def test_killed_and_restarted_within_the_retry_window_nothing_is_lost(served: tuple[object, ...]) -> None:
    port = free_port()
    async with RetrieverClient(client_config(port)) as client:
        with running(*served, "--port", port):
            before = await client(["river"], 2)
        calls = [asyncio.create_task(client([query], 2)) for query in ("river", "capital", "planet")]
        await asyncio.sleep(0.3)
        assert not any(call.done() for call in calls)
        with running(*served, "--port", port):
            after = await asyncio.gather(*calls)
    assert after[0] == before
    assert [result.documents[0].id for (result,) in after] == ["d2", "d0", "d3"]


def test_sigterm_answers_what_is_in_flight(tmp_path: Path) -> None:
    engine = FakeEngine(open_corpus(tmp_path), gate=threading.Event())
    server = uvicorn.Server(uvicorn.Config(create_app(engine, ServerConfig()), log_config=None))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    answers: list[httpx.Response] = []
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve"
    caller = threading.Thread(target=lambda: answers.append(httpx.post(url, json={"queries": ["q"]}, timeout=20)))
    caller.start()
    assert engine.started.wait(20)
    server.handle_exit(signal.SIGTERM, None)
    caller.join(0.3)
    assert caller.is_alive(), "the request must still wait for its answer"
    engine.gate.set()
    caller.join(20)
    thread.join(20)
    assert not thread.is_alive()
    assert answers[0].status_code == 200 and len(answers[0].json()["result"][0]) == 3


def test_a_port_in_use_is_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        nothing = ("--index_path", tmp_path / "no", "--corpus_path", tmp_path / "no", "--retriever_name", "bm25")
        with running(*nothing, "--port", port) as process:
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: cannot listen on 127.0.0.1:{port}") and "pass another --port" in line


def test_an_index_of_another_corpus_is_one_line(served: tuple[object, ...], tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other.jsonl", PASSAGES[:4])
    arguments = [other if argument == tmp_path / "corpus.jsonl" else argument for argument in served]
    with running(*arguments, "--port", 0) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: index") and "was built for another corpus" in last
    assert "Traceback" not in errors


def exchange(port: int, *parts: bytes) -> bytes:
    """Send raw bytes, close our side, return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
        return answer


def test_raw_connections_cannot_hurt_the_service(served: tuple[object, ...]) -> None:
    port = free_port()
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\n"
    with running(*served, "--port", port) as process:
        good = search_sync(client_config(port), ["river"], 2)
        megabyte = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        assert b" 413 " in exchange(port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[megabyte] * 9)
        exchange(port, head + b"Content-Length: 100\r\n\r\n{}")
        exchange(port, b"\x00\xff\x16\x03 no http at all\r\n\r\n")
        exchange(port, head + b"Content-Length: -1\r\n\r\n")
        exchange(port, head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n")
        exchange(port, b"")
        assert search_sync(client_config(port), ["river"], 2) == good
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in log


def test_results_are_the_engines_however_they_are_asked_for(served: tuple[object, ...], tmp_path: Path) -> None:
    engine = open_index(tmp_path / "index", open_corpus(tmp_path), "bm25")
    queries = [text for _, _, text in PASSAGES] + ["river", "zzz", "planet sun"]
    expected = engine.search(queries, 5)
    port = free_port()
    with running(*served, "--port", port):
        assert search_sync(client_config(port), queries, 5) == expected
        assert [search_sync(client_config(port), [query], 5)[0] for query in queries] == expected
        bare = httpx.post(f"http://127.0.0.1:{port}/retrieve", json={"queries": ["river"]}).json()
        assert [hit["id"] for hit in bare["result"][0]] == ["d2", "d0"]
        health = httpx.get(f"http://127.0.0.1:{port}/health").json()
    assert (health["retriever"], health["documents"]) == ("bm25", 8)
    with pytest.raises(RetrieverError):
        search_sync(client_config(port, retry_window_s=0.0), ["river"], 1)


@contextlib.contextmanager
def toy(port: int, **behaviour: Any) -> Iterator[subprocess.Popen[str]]:
    """A server that loads and searches as slowly as it is told."""
    with running(port, json.dumps(behaviour), module="tests.retrieval.toy_server") as process:
        yield process


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def status(port: int, path: str) -> int:
    """Return the status of a GET, 0 where nothing answers."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=20).status_code
    except httpx.TransportError:
        return 0


def test_the_port_answers_while_the_index_is_loaded() -> None:
    port = free_port()
    with toy(port, load_s=3.0) as process:
        until(lambda: status(port, "/ready") != 0)
        assert httpx.get(f"http://127.0.0.1:{port}/ready").json() == {"status": "loading"}
        assert status(port, "/ready") == status(port, "/health") == 503
        asked = httpx.post(f"http://127.0.0.1:{port}/retrieve", json={"queries": ["q"]})
        assert asked.status_code == 503 and asked.headers["retry-after"]
        assert search_sync(client_config(port), ["q"], 1)[0].documents[0].id == "q"
        assert status(port, "/ready") == status(port, "/health") == 200
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0 and "engine closed" in log and "Traceback" not in log


def test_a_server_that_is_still_loading_stops_at_once() -> None:
    port = free_port()
    with toy(port, load_s=600.0) as process:
        until(lambda: status(port, "/ready") == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_an_index_that_cannot_be_loaded_ends_the_server_with_the_reason() -> None:
    port = free_port()
    with toy(port, load_s=0.5, fail="the disk is gone") as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1 and log.strip().splitlines()[-1] == "error: the disk is gone"
    assert "Traceback" not in log


@pytest.mark.parametrize("drain_s", [0.0, 1.5])
def test_sigterm_to_the_process_answers_what_is_in_flight(drain_s: float) -> None:
    port = free_port()
    with toy(port, search_s=1.0, config={"drain_s": drain_s}) as process:
        until(lambda: status(port, "/ready") == 200)
        with ThreadPoolExecutor(8) as threads:
            asked = [threads.submit(search_sync, client_config(port, 0.0), [f"q{n}"], 1) for n in range(6)]
            until(lambda: counted(port, "retriever_queries_total") == 6)
            process.send_signal(signal.SIGTERM)
            if drain_s:
                until(lambda: status(port, "/ready") == 503)
                late = search_sync(client_config(port, 0.0), ["late"], 1)
                assert late[0].documents[0].id == "late"
            assert [future.result()[0].documents[0].id for future in asked] == [f"q{n}" for n in range(6)]
        assert process.wait(timeout=30) == 0
    assert status(port, "/ready") == 0


def test_a_search_that_does_not_end_does_not_keep_the_server(tmp_path: Path) -> None:
    port = free_port()
    with toy(port, search_s=600.0, config={"shutdown_timeout_s": 1.0}) as process:
        until(lambda: status(port, "/ready") == 200)
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(search_sync, client_config(port, 0.0), ["q"], 1)
            until(lambda: counted(port, "retriever_queries_total") == 1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
            with pytest.raises(RetrieverError, match="gave no answer"):
                asked.result()


def test_answers_are_the_same_from_one_worker_and_from_four(served: tuple[object, ...]) -> None:
    queries = [text for _, _, text in PASSAGES] + ["river", "zzz", "planet sun", "capital", "twin lighthouses"]
    answers = []
    for workers in (1, 4):
        port = free_port()
        with running(*served, "--port", port, "--workers", workers, "--cache_mb", 0) as process:
            until(lambda port=port: status(port, "/ready") == 200)
            url = f"http://127.0.0.1:{port}/retrieve"
            body = {"queries": queries, "topk": 5, "return_scores": True}
            answers += [httpx.post(url, json=body).json() for _ in range(8)]  # each over a connection of its own
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in log
    assert all(answer == answers[0] for answer in answers)


def children(process: subprocess.Popen[str]) -> set[int]:
    """Return the server processes that a process has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = map(int, path.read_text().split())
    return {pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def counted(port: int, name: str) -> float:
    """Return a counter of the service."""
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_workers_share_a_port_a_cache_and_their_counters_and_are_replaced(
    served: tuple[object, ...], tmp_path: Path
) -> None:
    port = free_port()
    flags = ("--port", port, "--workers", 2, "--cache_mb", 0, "--cache_file", tmp_path / "results.sqlite")
    with running(*served, *flags) as process:
        until(lambda: status(port, "/ready") == 200 and counted(port, "retriever_ready") == 2)
        before = search_sync(client_config(port), ["river"], 2)
        for _ in range(19):
            assert search_sync(client_config(port), ["river"], 2) == before
        assert counted(port, "retriever_queries_total") == 20
        assert counted(port, "retriever_searched_queries_total") == 1
        with running(*served, "--port", port, "--workers", 2) as second:
            _, errors = second.communicate(timeout=60)
            assert second.returncode == 1 and f"cannot listen on 127.0.0.1:{port}" in errors
        (victim, _) = workers = sorted(children(process))
        os.kill(victim, signal.SIGKILL)
        assert search_sync(client_config(port), ["river"], 2) == before
        until(lambda: len(children(process) - {victim}) == 2 and counted(port, "retriever_ready") == 2)
        assert search_sync(client_config(port), ["river"], 2) == before
        assert counted(port, "retriever_queries_total") >= 22
        process.kill()
        process.wait()
        until(lambda: status(port, "/ready") == 0)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_workers_that_cannot_start_are_one_line(served: tuple[object, ...], tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other.jsonl", PASSAGES[:4])
    arguments = [other if argument == tmp_path / "corpus.jsonl" else argument for argument in served]
    with running(*arguments, "--port", 0, "--workers", 3) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    *_, cause, end = errors.strip().splitlines()
    assert cause.startswith("error: index") and "was built for another corpus" in cause
    assert end.startswith("error: worker 0 ended with exit code 1 before it was ready")


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_port_for_all_without_a_token_is_warned_about(served: tuple[object, ...], host: str, warned: bool) -> None:
    port = free_port()
    with running(*served, "--host", host, "--port", port) as process:
        until(lambda: status(port, "/ready") == 200)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert ("no token is asked for" in log) == warned


def test_help_names_the_published_flags() -> None:
    done = subprocess.run([sys.executable, "-m", "verl.retrieval.server", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    published = ("--index_path", "--corpus_path", "--topk", "--retriever_name", "--retriever_model", "--port")
    assert all(flag in done.stdout for flag in published)
