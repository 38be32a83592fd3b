from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.retrieval.support import PASSAGES, FakeEngine, open_corpus
from verl.errors import ConfigError, RetrieverError
from verl.retrieval.app import RetrieverApp, create_app
from verl.retrieval.corpus import Corpus
from verl.retrieval.server_config import CacheConfig, ServerConfig
from verl.retrieval.service import SearchService
from verl.retrieval.wire import RequestLimits
from verl.types import SearchResult

LIMITS = RequestLimits(max_body_bytes=10_000, max_queries=16, max_query_chars=100)
CONFIG = ServerConfig(topk=2, limits=LIMITS, body_timeout_s=0.2)


def connect(engine: FakeEngine, config: ServerConfig = CONFIG) -> httpx.AsyncClient:
    """A client of the app without a network; a fault in the app is raised in the test, not turned into a 500."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(engine, config)), base_url="http://retriever")


@pytest.fixture
def engine(corpus: Corpus) -> FakeEngine:
    return FakeEngine(corpus)


@pytest.fixture
async def http(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(engine) as client:
        yield client


def wire_document(row: int) -> dict[str, str]:
    id, title, text = PASSAGES[row]
    return {"id": id, "contents": f'"{title}"\n{text}', "title": title, "text": text}


async def test_documents_come_bare_unless_scores_are_asked_for(http: httpx.AsyncClient) -> None:
    bare = await http.post("/retrieve", json={"queries": ["one", "three"]})
    assert bare.status_code == 200
    assert bare.json() == {"result": [[wire_document(0), wire_document(1)]] * 2}
    scored = await http.post("/retrieve", json={"queries": ["one", "three"], "topk": 1, "return_scores": True})
    assert scored.json() == {
        "result": [[{"document": wire_document(0), "score": 3.0}], [{"document": wire_document(0), "score": 5.0}]]
    }


@pytest.mark.parametrize("topk", [None, 2])
async def test_topk_defaults_to_the_servers(http: httpx.AsyncClient, topk: int | None) -> None:
    answer = await http.post("/retrieve", json={"queries": ["q"], "topk": topk, "return_scores": False})
    assert len(answer.json()["result"][0]) == 2


async def test_health_tells_what_is_served(http: httpx.AsyncClient, corpus: Corpus) -> None:
    answer = await http.get("/health")
    assert answer.status_code == 200
    expected = {"status": "ok", "retriever": "fake", "documents": 8, "fingerprint": corpus.fingerprint}
    assert answer.json() == expected


async def test_concurrent_requests_share_a_batch_and_get_their_own_topk(corpus: Corpus) -> None:
    engine = FakeEngine(corpus, gate=threading.Event())
    async with connect(engine) as http:
        first = asyncio.create_task(http.post("/retrieve", json={"queries": ["first"]}))
        await asyncio.to_thread(engine.started.wait, 20)
        asked = [{"queries": ["x" * n], "topk": n, "return_scores": True} for n in range(1, 9)]
        others = [asyncio.create_task(http.post("/retrieve", json=body)) for body in asked]
        await asyncio.sleep(0.05)
        engine.gate.set()
        answers = [answer.json()["result"] for answer in await asyncio.gather(*others)]
        assert (await first).status_code == 200
    assert engine.calls == [(["first"], 2), (["x" * n for n in range(1, 9)], 8)]
    for n, (hits,) in enumerate(answers, start=1):
        assert [hit["document"]["id"] for hit in hits] == [f"d{row}" for row in range(n)]
        assert {hit["score"] for hit in hits} == {float(n)}


REFUSED: list[tuple[bytes, int, str]] = [
    (b"", 400, "not JSON"),
    (b"{", 400, "not JSON"),
    (b"queries=x", 400, "not JSON"),
    (b'{"queries": ["q"], "topk": NaN}', 400, "NaN is not JSON"),
    (b'{"queries": ["q"], "topk": Infinity}', 400, "Infinity is not JSON"),
    (b'{"queries": ["q"], "topk": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    (b"[" * 9000, 400, "nested too deeply"),
    (b'{"queries": ["\xff"]}', 400, "not UTF-8 at byte 14"),
    ('{"queries": ["q"]}'.encode("utf-16"), 400, "not UTF-8"),
    (b"null", 400, "the body is None; send a JSON object"),
    (b'"queries"', 400, "the body is 'queries'"),
    (b'[["q"]]', 400, "the body is a list of 1"),
    (b"{}", 422, "queries is missing; expected a list of strings"),
    (b'{"queries": null}', 422, "queries is None"),
    (b'{"queries": "q"}', 422, "queries is 'q'; expected a list of strings"),
    (b'{"queries": {"0": "q"}}', 422, "queries is a JSON object of 1"),
    (b'{"queries": []}', 422, "queries is empty; expected at least one query"),
    (b'{"queries": ["q", 5]}', 422, "queries[1] is 5; expected a string"),
    (b'{"queries": [["q"]]}', 422, "queries[0] is a list of 1; expected a string"),
    (b'{"queries": ["q", "q", " \\n\\t"]}', 422, "queries[2] is blank"),
    (b'{"queries": ["\\ud800"]}', 422, "queries[0] holds an unpaired surrogate"),
    (b'{"queries": ["' + b"q" * 101 + b'"]}', 422, "queries[0] has 101 characters; expected at most 100"),
    (json.dumps({"queries": ["q"] * 17}).encode(), 422, "17 queries came; expected at most 16"),
    (b'{"queries": ["q"], "topk": 0}', 422, "topk is 0; expected an integer of at least 1"),
    (b'{"queries": ["q"], "topk": -3}', 422, "topk is -3"),
    (b'{"queries": ["q"], "topk": 9}', 422, "topk=9 exceeds the corpus's 8 documents; lower topk"),
    (b'{"queries": ["q"], "topk": ' + b"9" * 99 + b"}", 422, "an integer of more than 128 bits exceeds"),
    (b'{"queries": ["q"], "topk": true}', 422, "topk is True"),
    (b'{"queries": ["q"], "topk": 2.5}', 422, "topk is 2.5"),
    (b'{"queries": ["q"], "topk": 1e400}', 422, "topk is inf"),
    (b'{"queries": ["q"], "topk": 9.0}', 422, "topk=9 exceeds"),
    (b'{"queries": ["q"], "topk": "2"}', 422, "topk is '2'"),
    (b'{"queries": ["q"], "return_scores": 1}', 422, "return_scores is 1; expected true or false"),
    (b'{"queries": ["q"], "return_scores": null}', 422, "return_scores is None"),
    (b'{"queries": ["q"], "top_k": 2}', 422, "unknown key 'top_k'; did you mean 'topk'?"),
    (b'{"queries": ["q"], "zzz": 2}', 422, "unknown key 'zzz'; expected queries, topk, return_scores"),
    (b" " * 10_001, 413, "more than 10000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
async def test_a_wrong_request_gets_a_reason(
    http: httpx.AsyncClient, engine: FakeEngine, body: bytes, status: int, reason: str
) -> None:
    answer = await http.post("/retrieve", content=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert reason in answer.json()["error"]["message"]
    assert engine.calls == []


async def test_the_query_at_fault_is_named_by_index(http: httpx.AsyncClient) -> None:
    answer = await http.post("/retrieve", json={"queries": ["q", " "]})
    assert answer.json()["error"]["query_index"] == 1 and answer.json()["error"]["code"] == "blank_query"
    assert "query_index" not in (await http.post("/retrieve", json={"queries": []})).json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/retrieve", 405), ("POST", "/health", 405), ("GET", "/", 404), ("POST", "/search", 404)],
)
async def test_another_path_or_method_is_answered_in_json(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert "or GET /health, /ready, /info or /metrics" in answer.json()["error"]["message"]


async def test_a_body_is_not_read_beyond_its_limit(http: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    answer = await http.post("/retrieve", content=endless())
    assert answer.status_code == 413 and sent <= 12_000


async def test_a_body_that_does_not_arrive_is_given_up(http: httpx.AsyncClient) -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield b'{"queries": '
        await asyncio.sleep(60)

    answer = await http.post("/retrieve", content=stalling())
    assert answer.status_code == 408 and "within 0.2 s" in answer.json()["error"]["message"]


async def test_an_engine_that_fails_is_a_500_in_json_and_the_service_goes_on(corpus: Corpus) -> None:
    class Broken(FakeEngine):
        def search(self, queries: Any, topk: int) -> list[SearchResult]:
            if queries == ["break"]:
                raise RuntimeError("index on fire")
            return super().search(queries, topk)

    transport = httpx.ASGITransport(create_app(Broken(corpus), CONFIG), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://retriever") as http:
        answer = await http.post("/retrieve", json={"queries": ["break"]})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the search failed: RuntimeError: index on fire"
        assert answer.json()["error"]["query_index"] == 0
        assert (await http.post("/retrieve", json={"queries": ["q"]})).status_code == 200


async def test_a_query_that_breaks_the_engine_fails_alone(corpus: Corpus) -> None:
    class Broken(FakeEngine):
        def search(self, queries: Any, topk: int) -> list[SearchResult]:
            if "break" in queries:
                raise RuntimeError("index on fire")
            return super().search(queries, topk)

    engine = Broken(corpus, gate=threading.Event())
    async with connect(engine) as http:
        first = asyncio.create_task(http.post("/retrieve", json={"queries": ["first"]}))
        await asyncio.to_thread(engine.started.wait, 20)
        asked = [["a"], ["break"], ["b", "break", "c"], ["d", "e"]]
        others = [asyncio.create_task(http.post("/retrieve", json={"queries": queries})) for queries in asked]
        await asyncio.sleep(0.05)
        engine.gate.set()
        answers = await asyncio.gather(*others)
        assert (await first).status_code == 200
    assert [answer.status_code for answer in answers] == [200, 500, 500, 200]
    assert answers[2].json()["error"]["query_index"] == 1


async def test_an_engine_that_is_broken_for_good_is_not_asked_for_every_query(corpus: Corpus) -> None:
    class Broken(FakeEngine):
        def search(self, queries: Any, topk: int) -> list[SearchResult]:
            self.calls.append((list(queries), topk))
            raise RuntimeError("index on fire")

    engine = Broken(corpus)
    async with connect(engine) as http:
        answer = await http.post("/retrieve", json={"queries": [f"q{n}" for n in range(16)]})
    assert answer.status_code == 500 and len(answer.json()["error"]["query_errors"]) == 16
    assert len(engine.calls) == 4


class Partial(FakeEngine):
    """Cannot answer queries that start with "no"."""

    def search(self, queries: Any, topk: int) -> list[SearchResult | RetrieverError]:
        found = super().search(queries, topk)
        return [RetrieverError(f"no luck with {r.query}") if r.query.startswith("no") else r for r in found]


async def test_a_query_that_the_engine_cannot_answer_is_a_502_with_its_index(corpus: Corpus) -> None:
    async with connect(Partial(corpus)) as http:
        answer = await http.post("/retrieve", json={"queries": ["a", "no 1", "b", "no 2"]})
        assert answer.status_code == 502
        assert answer.json()["error"] == {
            "code": "query_failed",
            "message": "no luck with no 1",
            "query_index": 1,
            "query_errors": [
                {"query_index": 1, "message": "no luck with no 1"},
                {"query_index": 3, "message": "no luck with no 2"},
            ],
        }
        assert (await http.post("/retrieve", json={"queries": ["a", "b"]})).status_code == 200


async def test_a_batch_costs_each_query_once_and_a_large_topk_only_its_own(corpus: Corpus) -> None:
    passages = [(f"p{n:03}", "T", f"text {n}") for n in range(60)]
    engine = FakeEngine(open_corpus(corpus.path.parent, passages), gate=threading.Event())
    async with connect(engine, ServerConfig(topk=2)) as http:
        first = asyncio.create_task(http.post("/retrieve", json={"queries": ["first"]}))
        await asyncio.to_thread(engine.started.wait, 20)
        asked = [
            {"queries": ["same", "same"]},
            {"queries": ["same", "other"], "topk": 4},
            {"queries": ["x"], "topk": 50},
        ]
        others = [asyncio.create_task(http.post("/retrieve", json=body)) for body in asked]
        await asyncio.sleep(0.05)
        engine.gate.set()
        answers = [answer.json()["result"] for answer in await asyncio.gather(*others)]
        assert (await first).status_code == 200
    assert engine.calls[1:] == [(["same", "other"], 4), (["x"], 50)]
    assert [[len(hits) for hits in answer] for answer in answers] == [[2, 2], [4, 4], [50]]


async def test_an_engine_call_returns_no_more_documents_than_a_request_may(corpus: Corpus) -> None:
    engine = FakeEngine(corpus)
    limits = RequestLimits(max_documents=8)
    async with connect(engine, ServerConfig(topk=2, limits=limits)) as http:
        calls = [http.post("/retrieve", json={"queries": [f"{n}{m}" for m in range(4)]}) for n in range(3)]
        assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200] * 3
    assert max(len(queries) * topk for queries, topk in engine.calls) <= 8


async def test_a_known_query_is_answered_without_the_engine(corpus: Corpus) -> None:
    engine = FakeEngine(corpus)
    async with connect(engine) as http:
        large = (await http.post("/retrieve", json={"queries": ["q"], "topk": 5, "return_scores": True})).json()
        small = (await http.post("/retrieve", json={"queries": ["q"], "topk": 2, "return_scores": True})).json()
        mixed = (await http.post("/retrieve", json={"queries": ["new", "q"], "topk": 2, "return_scores": True})).json()
    assert small["result"][0] == large["result"][0][:2] and mixed["result"][1] == small["result"][0]
    assert engine.calls == [(["q"], 5), (["new"], 2)]


@pytest.mark.parametrize("cacheable", [True, False])
async def test_results_that_change_in_time_are_not_kept(corpus: Corpus, tmp_path: Path, cacheable: bool) -> None:
    engine = FakeEngine(corpus)
    config = ServerConfig(topk=2, cache=CacheConfig(path=tmp_path / "results.sqlite"))
    app = create_app(engine, config, cacheable)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://retriever") as http:
        for _ in range(3):
            await http.post("/retrieve", json={"queries": ["q"]})
    assert len(engine.calls) == (1 if cacheable else 3)
    assert (tmp_path / "results.sqlite").exists() == cacheable


async def test_a_failure_is_never_kept(corpus: Corpus, tmp_path: Path) -> None:
    engine = Partial(corpus)
    config = ServerConfig(topk=2, cache=CacheConfig(path=tmp_path / "results.sqlite"))
    async with connect(engine, config) as http:
        for _ in range(3):
            assert (await http.post("/retrieve", json={"queries": ["no", "yes"]})).status_code == 502
    assert [queries for queries, _ in engine.calls] == [["no", "yes"], ["no"], ["no"]]


async def test_the_file_of_results_serves_the_next_service_with_the_same_engine_only(
    corpus: Corpus, tmp_path: Path
) -> None:
    cache = CacheConfig(memory_mb=0, path=tmp_path / "results.sqlite")
    engines = [FakeEngine(corpus), FakeEngine(corpus), FakeEngine(corpus, name="other")]
    answers = []
    for engine in engines:
        async with connect(engine, ServerConfig(topk=3, cache=cache)) as http:
            answers.append(
                (await http.post("/retrieve", json={"queries": ["one", "two"], "return_scores": True})).json()
            )
    assert answers[0] == answers[1] == answers[2]
    assert [len(engine.calls) for engine in engines] == [1, 0, 1]


async def test_a_full_queue_is_a_503_that_says_when_to_come_back(corpus: Corpus) -> None:
    engine = FakeEngine(corpus, gate=threading.Event())
    limits = RequestLimits(max_queries=4)
    async with connect(engine, ServerConfig(topk=2, limits=limits, max_queued_queries=4)) as http:
        running = asyncio.create_task(http.post("/retrieve", json={"queries": ["first"]}))
        await asyncio.to_thread(engine.started.wait, 20)
        waiting = asyncio.create_task(http.post("/retrieve", json={"queries": ["a", "b", "c"]}))
        await asyncio.sleep(0.05)
        refused = await http.post("/retrieve", json={"queries": ["d", "e"]})
        engine.gate.set()
        assert (await running).status_code == (await waiting).status_code == 200
        assert (await http.post("/retrieve", json={"queries": ["d", "e"]})).status_code == 200
    assert refused.status_code == 503 and 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.json()["error"]["code"] == "overloaded"
    assert "3 queries wait already; at most 4 may" in refused.json()["error"]["message"]


async def test_bodies_that_hold_too_much_together_are_a_503(engine: FakeEngine) -> None:
    config = ServerConfig(topk=2, max_body_mb=1)

    async def slowly() -> AsyncIterator[bytes]:
        yield b" " * 700_000
        await asyncio.sleep(0.2)

    async with connect(engine, config) as http:
        calls = [http.post("/retrieve", content=slowly()) for _ in range(2)]
        statuses = sorted(answer.status_code for answer in await asyncio.gather(*calls))
        assert statuses == [400, 503]
        assert (await http.post("/retrieve", json={"queries": ["q"]})).status_code == 200


async def test_info_says_what_is_served(http: httpx.AsyncClient, engine: FakeEngine, corpus: Corpus) -> None:
    info = (await http.get("/info")).json()
    assert info["engine"] == "fake" and info["documents"] == info["max_topk"] == 8 and info["topk"] == 2
    assert (info["corpus"], info["fingerprint"]) == (corpus.fingerprint, engine.info.fingerprint)
    assert info["limits"]["max_queries"] == 16 and info["version"]


async def test_ready_until_it_drains(corpus: Corpus) -> None:
    app = create_app(FakeEngine(corpus), CONFIG)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://retriever") as http:
        assert (await http.get("/ready")).json() == {"status": "ready"}
        app.service.drain()
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert (await http.get("/health")).status_code == 200
        assert (await http.post("/retrieve", json={"queries": ["q"]})).status_code == 200


async def test_while_the_index_is_loaded_everything_says_so(corpus: Corpus) -> None:
    app = RetrieverApp(SearchService(CONFIG))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://retriever") as http:
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        answers = [await http.get("/health"), await http.get("/info")]
        answers.append(await http.post("/retrieve", json={"queries": ["q"]}))
        assert [answer.status_code for answer in answers] == [503] * 3
        assert all(answer.json()["error"]["code"] == "loading" and answer.headers["retry-after"] for answer in answers)
        app.service.start(FakeEngine(corpus))
        assert (await http.get("/health")).status_code == (await http.get("/ready")).status_code == 200
        assert (await http.post("/retrieve", json={"queries": ["q"]})).status_code == 200


async def test_metrics_count_what_happened(corpus: Corpus) -> None:
    async with connect(Partial(corpus)) as http:
        for queries in (["a", "b"], ["a", "a"], ["no"], []):
            await http.post("/retrieve", json={"queries": queries})
        await http.get("/nowhere")
        text = (await http.get("/metrics")).text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    expected = {
        'retriever_requests_total{path="/retrieve",status="200"}': 2,
        'retriever_requests_total{path="/retrieve",status="502"}': 1,
        'retriever_requests_total{path="/retrieve",status="422"}': 1,
        'retriever_requests_total{path="other",status="404"}': 1,
        'retriever_errors_total{code="query_failed"}': 1,
        'retriever_errors_total{code="queries"}': 1,
        "retriever_queries_total": 5,
        'retriever_cache_hits_total{where="memory"}': 2,
        "retriever_searched_queries_total": 3,
        "retriever_engine_seconds_count": 2,
        "retriever_batch_queries_sum": 3,
        "retriever_queued_queries": 0,
        "retriever_ready": 1,
    }
    assert {name: float(samples[name]) for name in expected} == expected
    assert float(samples["retriever_resident_bytes"]) > 10_000_000


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic s3cret", "s3cret", "Bearer s3cret2"])
async def test_without_the_token_only_the_probes_answer(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, header: str | None
) -> None:
    monkeypatch.setenv("RETRIEVER_TOKEN", "s3cret")
    config = ServerConfig(topk=2, token_env="RETRIEVER_TOKEN")
    headers = {"Authorization": header} if header else {}
    async with connect(engine, config) as http:
        for method, path in (("POST", "/retrieve"), ("GET", "/info"), ("GET", "/metrics"), ("GET", "/openapi.json")):
            answer = await http.request(method, path, json={"queries": ["q"]}, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "unauthorised" and "s3cret" not in answer.text
        assert (await http.get("/health")).status_code == (await http.get("/ready")).status_code == 200
        for good in ("Bearer s3cret", "bearer  s3cret "):
            answer = await http.post("/retrieve", json={"queries": ["q"]}, headers={"Authorization": good})
            assert answer.status_code == 200
    assert len(engine.calls) == 1


@pytest.mark.parametrize("value", ["", "  ", "zwei worte", "\u00fcber"])
def test_a_token_that_cannot_be_one_is_refused(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RETRIEVER_TOKEN", value)
    with pytest.raises(ConfigError, match="token_env=RETRIEVER_TOKEN: the variable") as caught:
        create_app(engine, ServerConfig(topk=2, token_env="RETRIEVER_TOKEN"))
    assert not value.strip() or value not in str(caught.value)


async def test_closing_answers_what_waits_and_closes_the_engine(corpus: Corpus) -> None:
    class Closing(FakeEngine):
        closed = False

        def close(self) -> None:
            self.closed = True

    engine = Closing(corpus, gate=threading.Event())
    app = create_app(engine, CONFIG)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://retriever") as http:
        calls = [asyncio.create_task(http.post("/retrieve", json={"queries": [str(n)]})) for n in range(5)]
        await asyncio.to_thread(engine.started.wait, 20)
        closing = asyncio.create_task(app.service.close())
        await asyncio.sleep(0.05)
        assert not closing.done() and not engine.closed
        engine.gate.set()
        await closing
        assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200] * 5
    assert engine.closed


def test_a_default_topk_above_the_corpus_is_refused(engine: FakeEngine) -> None:
    with pytest.raises(ConfigError, match="topk=9 exceeds the corpus's 8 documents; lower --topk"):
        create_app(engine, ServerConfig(topk=9))


@pytest.mark.parametrize(
    "wrong",
    [
        {"topk": 0},
        {"batch_queries": 0},
        {"port": 70000},
        {"port": -1},
        {"workers": 0},
        {"max_queued_queries": 1000},
        {"header_timeout_s": 0.0},
        {"drain_s": -1.0},
        {"keep_alive_s": float("nan")},
        {"batch_window_ms": float("inf")},
    ],
)
def test_a_wrong_server_config_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerConfig(**wrong)


@pytest.mark.parametrize("name", [item.name for item in fields(RequestLimits)])
def test_a_wrong_limit_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0; expected at least 1"):
        RequestLimits(**{name: 0})


@pytest.mark.parametrize(("wrong", "name"), [({"memory_mb": -1.0}, "cache_mb"), ({"disk_mb": 0.5}, "cache_disk_mb")])
def test_a_wrong_cache_config_is_refused(wrong: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        CacheConfig(**wrong)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
near_requests = st.fixed_dictionaries(
    {},
    optional={
        "queries": st.lists(st.text(st.characters(), max_size=120), max_size=20) | json_values,
        "topk": st.integers(-2, 12) | json_values,
        "return_scores": st.booleans() | json_values,
        "other": json_values,
    },
)
bodies = (
    st.binary(max_size=300)
    | json_values.map(lambda value: json.dumps(value).encode())
    | near_requests.map(lambda value: json.dumps(value).encode())
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies)
def test_any_body_gets_an_answer_or_a_reason(engine: FakeEngine, body: bytes) -> None:
    async def post() -> httpx.Response:
        async with connect(engine) as http:
            return await http.post("/retrieve", content=body)

    answer = asyncio.run(post())
    if answer.status_code == 200:
        request = json.loads(body)
        assert len(answer.json()["result"]) == len(request["queries"])
        assert all(len(hits) == (request.get("topk") or 2) for hits in answer.json()["result"])
    else:
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]["message"]


async def test_a_request_that_a_stopping_server_gives_up_is_told_to_come_back(corpus: Corpus) -> None:
    engine = FakeEngine(corpus, gate=threading.Event())
    app = create_app(engine, CONFIG)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"queries": ["q"]}'}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/retrieve", "method": "POST", "headers": []}
    request = asyncio.create_task(app(scope, receive, send))
    await asyncio.to_thread(engine.started.wait, 20)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert sent[0]["status"] == 503 and b"retry-after" in dict(sent[0]["headers"])
    assert "the service is stopping" in json.loads(sent[1]["body"])["error"]["message"]
    assert engine.gate is not None
    engine.gate.set()
    await app.aclose()
