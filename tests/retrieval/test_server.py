from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.retrieval.support import PASSAGES, FakeEngine
from verl.errors import ConfigError
from verl.retrieval.corpus import Corpus
from verl.retrieval.server import ServerConfig, create_app
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
    (b'{"queries": ["q"], "topk": 2.0}', 422, "topk is 2.0"),
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
    assert "expected POST /retrieve or GET /health" in answer.json()["error"]["message"]


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
        assert (await http.post("/retrieve", json={"queries": ["q"]})).status_code == 200


def test_a_default_topk_above_the_corpus_is_refused(engine: FakeEngine) -> None:
    with pytest.raises(ConfigError, match="topk=9 exceeds the corpus's 8 documents; lower --topk"):
        create_app(engine, ServerConfig(topk=9))


@pytest.mark.parametrize("wrong", [{"topk": 0}, {"batch_queries": 0}, {"port": 70000}, {"port": -1}])
def test_a_wrong_server_config_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerConfig(**wrong)


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
