"""Engines that ask the web behind the service: every query is answered as soon as it is known."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.retrieval.support import FakeEngine, live
from tests.retrieval.test_rerank import ByLength
from tests.retrieval.web_server import WebServer
from verl.retrieval.app import create_app
from verl.retrieval.colbert_client import ColbertApiConfig
from verl.retrieval.colbert_client import open_engine as open_colbert
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import Engine
from verl.retrieval.fusion import HybridEngine
from verl.retrieval.rerank import RerankEngine
from verl.retrieval.server_config import CacheConfig, ServerConfig
from verl.retrieval.web import WebConfig, WebEngine, open_engine
from verl.retrieval.web_http import FetchConfig
from verl.retrieval.wire import RequestLimits, parse_response
from verl.types import SearchResult

CONFIG = ServerConfig(topk=3, limits=RequestLimits(max_queries=64), max_queued_queries=64)
TIMEOUT_S = 20.0


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server
        for held in server.held.values():
            held.set()


def web(server: WebServer, provider: str = "serper", rate: float = 1000.0, **config: Any) -> WebEngine:
    http = FetchConfig(rate=rate, timeout_s=TIMEOUT_S, backoff_s=0.001)
    return open_engine(WebConfig(provider, server.url, http=http, **config), server.environ)


@asynccontextmanager
async def service(engine: Engine, config: ServerConfig = CONFIG) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service without a network; the service is closed at the end."""
    app = create_app(engine, config)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://retriever", timeout=30) as http:
        yield http
    await app.aclose()


async def ask(http: httpx.AsyncClient, *queries: str) -> list[SearchResult]:
    answer = await http.post("/retrieve", json={"queries": queries, "return_scores": True})
    assert answer.status_code == 200, answer.text
    return parse_response(answer.content, queries, 3)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def asked(server: WebServer) -> list[str]:
    return [request.body["q"] for request in server.asked]


async def test_a_query_that_hangs_keeps_no_other_waiting_and_answers_are_those_of_the_engine(server: WebServer) -> None:
    engine = web(server)
    expected = engine.search(["whale", "slow", "nothing"], 3)
    server.held["slow"] = threading.Event()
    async with service(engine) as http:
        slow = asyncio.create_task(ask(http, "slow"))
        await until(lambda: asked(server).count("slow") == 2)
        assert await asyncio.wait_for(ask(http, "whale", "nothing"), 5) == [expected[0], expected[2]]
        for number in range(20):
            await asyncio.wait_for(ask(http, f"other {number}"), 5)
        assert not slow.done()
        server.held["slow"].set()
        assert await slow == [expected[1]]


async def test_a_colbert_server_gets_queries_while_it_is_busy_with_others(corpus: Corpus) -> None:
    gate = threading.Event()
    behind = create_app(FakeEngine(corpus, gate=gate), CONFIG)
    with live(behind, CONFIG) as port:
        engine = open_colbert(ColbertApiConfig(f"http://127.0.0.1:{port}/api/search"), {})
        async with service(engine) as http:
            calls = [asyncio.create_task(ask(http, f"query {number}")) for number in range(8)]
            await until(lambda: behind.service.waiting == 7)
            gate.set()
            for number, call in enumerate(calls):
                assert (await call)[0].query == f"query {number}"


async def test_what_is_known_does_not_wait_for_the_rate(server: WebServer, tmp_path: Path) -> None:
    engine = web(server, rate=1000.0, cache=tmp_path / "kept.sqlite", cache_mode="record")
    known = engine.search(["whale"], 3)
    engine.close()
    engine = web(server, rate=0.005, cache=tmp_path / "kept.sqlite", cache_mode="record")
    server.held["new 0"] = threading.Event()
    async with service(engine) as http:
        many = asyncio.create_task(ask(http, *(f"new {number}" for number in range(50))))
        await until(lambda: "new 0" in asked(server))
        assert await asyncio.wait_for(ask(http, "whale"), 5) == known
        many.cancel()
    assert asked(server) == ["whale", "new 0"]


async def test_the_rate_is_served_in_the_order_of_arrival(server: WebServer) -> None:
    async with service(web(server, rate=1 / 0.03)) as http:
        first = asyncio.create_task(ask(http, "a 0", "a 1", "a 2"))
        await until(lambda: len(server.asked) == 1)
        await asyncio.gather(first, ask(http, "b 0", "b 1"))
    assert asked(server) == ["a 0", "a 1", "a 2", "b 0", "b 1"]


async def test_equal_queries_of_several_requests_are_paid_for_once(server: WebServer) -> None:
    server.held["whale"] = threading.Event()
    async with service(web(server)) as http:
        calls = [asyncio.create_task(ask(http, "whale")) for _ in range(8)]
        await until(lambda: len(server.asked) == 1)
        await asyncio.sleep(0.05)
        server.held["whale"].set()
        answers = await asyncio.gather(*calls)
        assert all(answer == answers[0] for answer in answers) and asked(server) == ["whale"]
        await ask(http, "whale")
        assert asked(server) == ["whale"] * 2, "what changes is not kept"


async def test_what_a_client_leaves_behind_is_not_asked_for(server: WebServer) -> None:
    app = create_app(web(server, rate=2.0), CONFIG)
    with live(app, CONFIG) as port:
        body = {"queries": [f"query {number}" for number in range(30)]}
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post(f"http://127.0.0.1:{port}/retrieve", json=body, timeout=0.5)
        await until(lambda: app.service.waiting == 0)
        sent = len(server.asked)
        await asyncio.sleep(1.2)
    assert len(server.asked) == sent < 30


async def test_draining_answers_what_is_in_flight(server: WebServer) -> None:
    server.held["slow"] = threading.Event()
    engine = web(server)
    app = create_app(engine, CONFIG)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://retriever", timeout=30) as http:
        slow = asyncio.create_task(ask(http, "slow", "whale"))
        await until(lambda: "slow" in asked(server))
        closing = asyncio.create_task(app.aclose())
        await until(lambda: app.service.state.value == "draining")
        assert (await http.get("/ready")).status_code == 503
        await asyncio.sleep(0.05)
        assert not closing.done() and not slow.done()
        server.held["slow"].set()
        assert [result.query for result in await slow] == ["slow", "whale"]
        await closing
    assert engine._loop.closed and not app.service.busy


async def test_what_does_not_end_is_left_behind(server: WebServer) -> None:
    server.held["slow"] = threading.Event()
    app = create_app(web(server), ServerConfig(topk=3, shutdown_timeout_s=0.1))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://retriever", timeout=30) as http:
        slow = asyncio.create_task(ask(http, "slow"))
        await until(lambda: "slow" in asked(server))
        await app.aclose()
        assert app.service.busy
        server.held["slow"].set()
        await slow


async def test_too_many_queries_are_turned_away_with_a_time_to_come_back(server: WebServer) -> None:
    server.held = {f"query {number}": threading.Event() for number in range(64)}
    async with service(web(server)) as http:
        await ask(http, "whale")
        many = asyncio.create_task(ask(http, *server.held))
        await until(lambda: len(server.asked) == 65)
        refused = await http.post("/retrieve", json={"queries": ["one more"]})
        assert refused.status_code == 503 and 1 <= int(refused.headers["Retry-After"]) <= 30
        assert "64 queries wait already" in refused.json()["error"]["message"]
        for held in server.held.values():
            held.set()
        assert len(await many) == 64 and (await ask(http, "one more"))[0].query == "one more"


async def test_a_query_that_fails_fails_alone(server: WebServer) -> None:
    async with service(web(server)) as http:
        server.held["slow"] = threading.Event()
        slow = asyncio.create_task(ask(http, "slow"))
        await until(lambda: "slow" in asked(server))
        server.key = "another"
        failed = await http.post("/retrieve", json={"queries": ["bad"]})
        assert failed.status_code == 502 and "check SERPER_API_KEY" in failed.json()["error"]["message"]
        server.held["slow"].set()
        assert (await slow)[0].documents


@pytest.mark.parametrize("file", [False, True])
async def test_all_that_was_recorded_is_replayed_and_may_then_be_kept(
    server: WebServer, tmp_path: Path, file: bool
) -> None:
    kept = {"cache": tmp_path / "kept.sqlite", "pages": 2}
    queries = [f"query {number % 30}" for number in range(40)]
    async with service(web(server, cache_mode="record", **kept)) as http:
        parts = await asyncio.gather(*(ask(http, *queries[start : start + 8]) for start in range(0, 40, 8)))
    recorded = [result for part in parts for result in part]
    assert sorted(asked(server)) == sorted(set(queries))
    server.asked.clear()
    cache = CacheConfig(memory_mb=0, path=tmp_path / "results.sqlite") if file else CacheConfig()
    config = ServerConfig(topk=3, cache=cache)
    async with service(web(server, cache_mode="replay", **kept), config) as http:
        for _ in range(2):
            assert await ask(http, *queries) == recorded
        metrics = (await http.get("/metrics")).text
    assert f'retriever_cache_hits_total{{where="{"disk" if file else "memory"}"}}' in metrics
    assert "retriever_searched_queries_total 30.0" in metrics and server.asked == []


# --- stages on top ---


async def test_a_hybrid_asks_an_index_in_batches_and_the_web_for_each_query(server: WebServer, corpus: Corpus) -> None:
    index = FakeEngine(corpus, gate=threading.Event())
    hybrid = HybridEngine([index, web(server)], depth=5)
    server.held["slow"] = threading.Event()
    async with service(hybrid) as http:
        first = asyncio.create_task(ask(http, "first"))
        await asyncio.to_thread(index.started.wait, 20)
        others = [asyncio.create_task(ask(http, f"query {number}")) for number in range(10)]
        slow = asyncio.create_task(ask(http, "slow"))
        await until(lambda: len(server.asked) == 12)
        index.gate.set()
        answers = [(await call)[0] for call in (first, *others)]
        assert not slow.done()
        server.held["slow"].set()
        answers += await slow
        assert index.calls[0] == (["first"], 5) and len(index.calls) == 2
        queries = ["first", *(f"query {number}" for number in range(10)), "slow"]
        assert answers == await asyncio.to_thread(hybrid.search, queries, 3)


async def test_a_hybrid_without_one_of_its_engines(server: WebServer, corpus: Corpus) -> None:
    for require_all in (True, False):
        hybrid = HybridEngine([FakeEngine(corpus), web(server)], require_all=require_all)
        key, server.key = server.key, "another"
        async with service(hybrid) as http:
            answer = await http.post("/retrieve", json={"queries": ["q"]})
        server.key = key
        assert answer.status_code == (502 if require_all else 200) and hybrid.partial == (0 if require_all else 1)


async def test_a_rerank_stage_orders_what_the_web_finds(server: WebServer) -> None:
    batches: list[int] = []

    class Noting(ByLength):
        def score(self, pairs: Sequence[Any]) -> Sequence[float]:
            batches.append(len(pairs))
            return super().score(pairs)

    engine = RerankEngine(web(server), Noting(), depth=5)
    expected = engine.search(["whale", "other"], 3)
    server.held["slow"] = threading.Event()
    async with service(engine) as http:
        slow = asyncio.create_task(ask(http, "slow"))
        assert [(await ask(http, query))[0] for query in ("whale", "other")] == expected
        server.held["slow"].set()
        await slow
    assert batches == [10, 5, 5, 5]
