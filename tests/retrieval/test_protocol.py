"""Connections that want to hold the service up, over raw sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.retrieval.support import FakeEngine, live, open_corpus
from verl.retrieval.app import create_app
from verl.retrieval.server_config import CacheConfig, ServerConfig
from verl.types import Document, SearchResult

CONFIG = ServerConfig(
    topk=2,
    header_timeout_s=1.0,
    body_timeout_s=1.0,
    write_timeout_s=1.0,
    keep_alive_s=3.0,
    cache=CacheConfig(memory_mb=0),
)
BODY = json.dumps({"queries": ["good"], "topk": 1}).encode()
HEAD = b"POST /retrieve HTTP/1.1\r\nHost: x\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(open_corpus(tmp_path))


@contextmanager
def serving(engine: FakeEngine, config: ServerConfig = CONFIG) -> Iterator[int]:
    with live(create_app(engine, config), config) as port:
        yield port


def connect(port: int, *parts: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    for part in parts:
        connection.sendall(part)
    return connection


def rest(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes; fails when it does not."""
    answer = b""
    with connection, suppress(ConnectionError):
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def sends_until_closed(connection: socket.socket, parts: Iterator[bytes], pause_s: float = 0.0) -> int:
    """Send until the other side refuses; return how many parts were sent."""
    sent = 0
    with suppress(ConnectionError):
        for part in parts:
            connection.sendall(part)
            sent += 1
            time.sleep(pause_s)
    return sent


def is_well(port: int, times: int = 20) -> bool:
    with httpx.Client(timeout=20) as http:
        url = f"http://127.0.0.1:{port}/retrieve"
        return all(http.post(url, content=BODY).status_code == 200 for _ in range(times))


SLOW = {
    "silent": (),
    "part of a head": (HEAD + b"Content-Le",),
    "blank lines": (b"\r\n\r\n\r\n",),
    "a second head": (REQUEST, HEAD),
    "no body": (HEAD + b"Content-Length: 100\r\n\r\n",),
    "part of a body": (HEAD + b"Content-Length: 100\r\n\r\n{",),
    "part of a chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n100\r\n{",),
}


@pytest.mark.parametrize("parts", SLOW.values(), ids=SLOW)
def test_a_slow_request_is_given_up(engine: FakeEngine, parts: Sequence[bytes]) -> None:
    with serving(engine) as port:
        answer = rest(connect(port, *parts))
    assert answer.count(b"HTTP/1.1 200") == (REQUEST in parts)
    assert (b"HTTP/1.1 408" in answer) == (b"Length: 100" in b"".join(parts) or b"chunked" in b"".join(parts))


def test_many_slow_connections_do_not_hold_up_the_good_ones(engine: FakeEngine) -> None:
    with serving(engine) as port, ExitStack() as stack:
        slow = [stack.enter_context(connect(port, *parts)) for parts in SLOW.values() for _ in range(60)]
        for connection in slow[::7]:
            connection.shutdown(socket.SHUT_WR)
        for connection in slow[::11]:
            connection.close()
        assert is_well(port)
        for connection in slow:
            if connection.fileno() >= 0:
                rest(connection)
        assert is_well(port, times=1)


def test_bytes_that_drip_do_not_keep_a_connection(engine: FakeEngine) -> None:
    with serving(engine) as port, connect(port, b"POST /retr") as connection:
        assert sends_until_closed(connection, (b"x" for _ in range(400)), pause_s=0.05) < 400


def test_a_head_without_end_is_cut_off(engine: FakeEngine) -> None:
    with serving(engine) as port, connect(port, HEAD) as connection:
        header = b"X-Header: " + b"x" * 1000 + b"\r\n"
        assert sends_until_closed(connection, (header for _ in range(10**5))) < 10**5
        assert is_well(port, times=1)


def test_above_the_limit_the_longest_silent_connection_gives_way(engine: FakeEngine) -> None:
    config = replace(CONFIG, max_connections=10, header_timeout_s=60.0)
    with serving(engine, config) as port, ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for _ in range(30)]
        assert is_well(port, times=1)
        connections[-1].sendall(REQUEST)
        assert connections[-1].recv(65536).startswith(b"HTTP/1.1 200")
        assert all(rest(connection) == b"" for connection in connections[:20])


def test_requests_that_come_together_are_answered_in_order(engine: FakeEngine) -> None:
    bodies = [json.dumps({"queries": ["q" * n], "topk": 1, "return_scores": True}).encode() for n in range(1, 6)]
    sent = b"".join(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies)
    with serving(engine) as port:
        answer = rest(connect(port, sent))
    scores = [
        json.loads(b"{" + part.partition(b"{")[2])["result"][0][0]["score"] for part in answer.split(b"HTTP/")[1:]
    ]
    assert scores == [1.0, 2.0, 3.0, 4.0, 5.0]


class Slow(FakeEngine):
    """Takes its time."""

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        time.sleep(0.2)
        return super().search(queries, topk)


def test_the_queries_of_clients_that_left_are_not_searched(tmp_path: Path) -> None:
    engine = Slow(open_corpus(tmp_path))
    bodies = [json.dumps({"queries": [f"q{n}"], "topk": 1}).encode() for n in range(20)]
    requests = [HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
    with serving(engine, replace(CONFIG, batch_queries=1)) as port, ExitStack() as stack:
        assert is_well(port, times=2)
        asking = [stack.enter_context(connect(port, request)) for request in requests]
        time.sleep(0.3)
        for connection in asking[12:]:
            connection.close()
        for connection in asking[:12]:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert is_well(port, times=1)
    asked = {query for queries, _ in engine.calls for query in queries}
    assert {f"q{n}" for n in range(12)} <= asked
    assert len(asked & {f"q{n}" for n in range(12, 20)}) <= 1


class Heavy(FakeEngine):
    """Returns documents of a megabyte."""

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        document = Document("1", "T", "x" * 1_000_000)
        return [SearchResult(query, (document,) * topk, (1.0,) * topk) for query in queries]


def test_a_client_that_takes_nothing_of_its_answer_is_dropped_and_a_slow_one_is_not(tmp_path: Path) -> None:
    body = json.dumps({"queries": ["a", "b"], "topk": 8}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with serving(Heavy(open_corpus(tmp_path))) as port, connect(port, request) as never, connect(port, request) as slow:
        received = reads = 0
        while received < 32_000_000:
            received += len(slow.recv(400_000))
            reads += 1
            time.sleep(0.02 if reads < 100 else 0.0)
        time.sleep(0.5)
        assert len(rest(never)) < 32_000_000
        assert is_well(port, times=1)
