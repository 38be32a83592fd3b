"""The real thing: index and server as processes, a client over the network."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from tests.retrieval.support import PASSAGES, FakeEngine, free_port, open_corpus, write_corpus
from verl.errors import RetrieverError
from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig, search_sync
from verl.retrieval.engine import open_index
from verl.retrieval.server import ServerConfig, create_app

pytestmark = pytest.mark.integration


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A server process that ends with the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "verl.retrieval.server", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
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


def test_build_and_serve_from_the_command_line(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    build = [sys.executable, "-m", "verl.retrieval.build", "--retriever_name", "minilm", "--corpus_path", corpus]
    subprocess.run([*build, "--save_dir", tmp_path / "index", "--device", "cpu"], check=True, capture_output=True)
    port = free_port()
    index = tmp_path / "index" / "minilm_Flat.index"
    paths = ("--index_path", index, "--corpus_path", corpus, "--retriever_name", "minilm", "--port", port)
    with running(*paths, "--threads", 1) as process:
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


def test_help_names_the_published_flags() -> None:
    done = subprocess.run([sys.executable, "-m", "verl.retrieval.server", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    published = ("--index_path", "--corpus_path", "--topk", "--retriever_name", "--retriever_model", "--port")
    assert all(flag in done.stdout for flag in published)
