from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.retrieval.support import FakeEngine, free_port, live
from tests.retrieval.test_rerank import ByLength, some_documents, write_cross_encoder
from verl.retrieval.app import create_app
from verl.retrieval.corpus import Corpus
from verl.retrieval.rerank import CrossEncoderReranker, Pair
from verl.retrieval.rerank_server import RerankOnly, add_rerank_route, parse_rerank_request
from verl.retrieval.server_config import ServerConfig
from verl.retrieval.wire import RefusedRequest, RequestLimits
from verl.types import Document

LIMITS = RequestLimits(max_body_bytes=10_000, max_queries=8, max_query_chars=100, max_documents=20)
CONFIG = ServerConfig(topk=2, limits=LIMITS)


@dataclass
class Overlap:
    """The score is the number of words that query and document share."""

    model: str = "overlap"
    fingerprint: str = "overlap"
    gate: threading.Event | None = None
    started: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)
    error: Exception | None = None

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        self.batches.append(len(pairs))
        self.started.set()
        if self.gate is not None:
            self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return [float(len(set(query.split()) & set(document.text.split()))) for query, document in pairs]


def wire_document(id: str, text: str, title: str = "T") -> dict[str, str]:
    return {"id": id, "contents": f'"{title}"\n{text}', "title": title, "text": text}


CATS, DOGS, BOTH = (
    wire_document("1", "cats purr"),
    wire_document("2", "dogs bark"),
    wire_document("3", "cats and dogs"),
)


@pytest.fixture
def overlap() -> Overlap:
    return Overlap()


@pytest.fixture
async def http(corpus: Corpus, overlap: Overlap) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(FakeEngine(corpus), CONFIG)
    service = add_rerank_route(app, overlap, CONFIG)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://reranker") as client:
        yield client
    if overlap.gate is not None:
        overlap.gate.set()
    await service.close()


async def test_each_query_gets_its_own_documents_in_the_shape_of_retrieve(http: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"queries": ["cats", "dogs bark"], "documents": [[DOGS, CATS], [CATS, DOGS, BOTH]]}
    bare = await http.post("/rerank", json=body)
    assert bare.status_code == 200 and bare.headers["content-type"] == "application/json"
    assert bare.json() == {"result": [[CATS, DOGS], [DOGS, BOTH]]}
    scored = await http.post("/rerank", json={**body, "rerank_topk": 3, "return_scores": True})
    assert scored.json() == {
        "result": [
            [{"document": CATS, "score": 1.0}, {"document": DOGS, "score": 0.0}],
            [
                {"document": DOGS, "score": 2.0},
                {"document": BOTH, "score": 1.0},
                {"document": CATS, "score": 0.0},
            ],
        ]
    }


async def test_what_retrieve_answers_can_be_sent_on(http: httpx.AsyncClient) -> None:
    for return_scores in (True, False):
        found = await http.post("/retrieve", json={"queries": ["capital"], "return_scores": return_scores})
        answer = await http.post("/rerank", json={"queries": ["capital"], "documents": found.json()["result"]})
        assert [document["id"] for document in answer.json()["result"][0]] == ["d0", "d1"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"id": 7, "contents": "Title\ntext"}, wire_document("7", "text", "Title")),
        ({"id": "7", "contents": '"Title"\ntext', "extra": 1}, wire_document("7", "text", "Title")),
        ({"id": "7", "title": "T", "text": "x"}, wire_document("7", "x")),
        ({"document": {"id": "7", "contents": "T\nx"}, "score": "any"}, wire_document("7", "x")),
    ],
)
async def test_documents_as_other_servers_send_them(
    http: httpx.AsyncClient, document: dict[str, Any], expected: dict[str, str]
) -> None:
    answer = await http.post("/rerank", json={"queries": ["q"], "documents": [[document]]})
    assert answer.json() == {"result": [[expected]]}


async def test_no_documents_are_an_empty_result(http: httpx.AsyncClient, overlap: Overlap) -> None:
    answer = await http.post("/rerank", json={"queries": ["q", "dogs"], "documents": [[], [DOGS]]})
    assert answer.json() == {"result": [[], [DOGS]]}
    assert (await http.post("/rerank", json={"queries": ["q"], "documents": [[]]})).json() == {"result": [[]]}
    assert overlap.batches == [1]


REFUSED: list[tuple[bytes, int, str]] = [
    (b"{", 400, "not JSON"),
    (b"[]", 400, "the body is a list of 0"),
    (b'{"queries": ["\xff"]}', 400, "not UTF-8"),
    (b"{}", 422, "queries is missing"),
    (b'{"queries": [" "], "documents": [[]]}', 422, "queries[0] is blank"),
    (b'{"queries": ["q"]}', 422, "documents is missing; expected a list of lists"),
    (b'{"queries": ["q"], "documents": "d"}', 422, "documents is 'd'"),
    (b'{"queries": ["q"], "documents": []}', 422, "0 lists of documents for 1 queries; expected one for each"),
    (b'{"queries": ["q"], "documents": [[], []]}', 422, "2 lists of documents for 1 queries"),
    (b'{"queries": ["q"], "documents": [{"id": "1"}]}', 422, "documents[0] is a JSON object of 1; expected a list"),
    (b'{"queries": ["q"], "documents": [["text"]]}', 422, "documents[0][0] is 'text'; expected an object with id"),
    (b'{"queries": ["q"], "documents": [[{"contents": "x"}]]}', 422, "documents[0][0]: a document has id=None"),
    (b'{"queries": ["q"], "documents": [[{"id": "1"}]]}', 422, "document '1' has contents=None; expected a string"),
    (b'{"queries": ["q"], "documents": [[{"document": 5}]]}', 422, "documents[0][0] is 5"),
    (
        b'{"queries": ["q"], "documents": [[{"id": "1", "contents": "\\ud800"}]]}',
        422,
        "documents[0][0] holds an unpaired surrogate",
    ),
    (
        json.dumps({"queries": ["q"], "documents": [[{"id": "1", "contents": "x"}] * 21]}).encode(),
        422,
        "21 documents came; expected at most 20",
    ),
    (b'{"queries": ["q"], "documents": [[]], "rerank_topk": 0}', 422, "rerank_topk is 0"),
    (b'{"queries": ["q"], "documents": [[]], "rerank_topk": true}', 422, "rerank_topk is True"),
    (b'{"queries": ["q"], "documents": [[]], "rerank_topk": 1.5}', 422, "rerank_topk is 1.5"),
    (b'{"queries": ["q"], "documents": [[]], "return_scores": "yes"}', 422, "return_scores is 'yes'"),
    (b'{"queries": ["q"], "documents": [[]], "topk": 3}', 422, "unknown key 'topk'; expected queries, documents"),
    (b" " * 10_001, 413, "more than 10000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
async def test_a_wrong_request_gets_a_reason(
    http: httpx.AsyncClient, overlap: Overlap, body: bytes, status: int, reason: str
) -> None:
    answer = await http.post("/rerank", content=body)
    assert answer.status_code == status
    assert reason in answer.json()["error"]["message"]
    assert overlap.batches == []


async def test_the_list_at_fault_is_named_by_index(http: httpx.AsyncClient) -> None:
    answer = await http.post("/rerank", json={"queries": ["a", "b"], "documents": [[DOGS], [7]]})
    assert answer.json()["error"]["query_index"] == 1


async def test_concurrent_requests_share_a_batch_and_keep_their_topk(http: httpx.AsyncClient, overlap: Overlap) -> None:
    overlap.gate = threading.Event()
    first = asyncio.create_task(http.post("/rerank", json={"queries": ["q"], "documents": [[CATS]]}))
    await asyncio.to_thread(overlap.started.wait, 20)
    bodies = [{"queries": ["cats"], "documents": [[DOGS, CATS]], "rerank_topk": topk} for topk in (1, 2, 1, 2)]
    others = [asyncio.create_task(http.post("/rerank", json=body)) for body in bodies]
    await asyncio.sleep(0.05)
    overlap.gate.set()
    answers = [(await other).json()["result"] for other in others]
    assert (await first).status_code == 200
    assert answers == [[[CATS, DOGS][:topk]] for topk in (1, 2, 1, 2)]
    assert overlap.batches == [1, 8]


async def test_more_than_may_wait_is_turned_away_with_a_time_to_come_back(
    http: httpx.AsyncClient, overlap: Overlap
) -> None:
    overlap.gate = threading.Event()
    first = asyncio.create_task(http.post("/rerank", json={"queries": ["q"], "documents": [[CATS]]}))
    await asyncio.to_thread(overlap.started.wait, 20)
    many = {"queries": ["q"], "documents": [[CATS] * 15]}
    second = asyncio.create_task(http.post("/rerank", json=many))
    await asyncio.sleep(0.05)
    turned_away = await http.post("/rerank", json=many)
    assert turned_away.status_code == 503 and int(turned_away.headers["Retry-After"]) >= 1
    assert "15 documents wait to be reranked; at most 20 may" in turned_away.json()["error"]["message"]
    overlap.gate.set()
    assert (await first).status_code == (await second).status_code == 200
    assert (await http.post("/rerank", json=many)).status_code == 200


async def test_pairs_whose_client_has_gone_are_not_scored(corpus: Corpus, overlap: Overlap) -> None:
    overlap.gate = threading.Event()
    app = create_app(FakeEngine(corpus), CONFIG)
    app.serve_reranker(overlap)
    (service,) = app._rerankers
    with live(app, CONFIG) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            first = asyncio.create_task(http.post("/rerank", json={"queries": ["q"], "documents": [[CATS]]}))
            await asyncio.to_thread(overlap.started.wait, 20)
            leaving = {"queries": ["q"], "documents": [[CATS] * 7]}
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/rerank", json=leaving, timeout=0.2)
            async with asyncio.timeout(20):
                while service._batcher.waiting:
                    await asyncio.sleep(0.01)
            last = asyncio.create_task(http.post("/rerank", json={"queries": ["q"], "documents": [[CATS, DOGS]]}))
            await asyncio.sleep(0.05)
            overlap.gate.set()
            assert [(await each).status_code for each in (first, last)] == [200, 200]
    assert overlap.batches == [1, 2]


async def test_a_reranker_that_fails_is_an_error_in_json_and_the_service_goes_on(
    http: httpx.AsyncClient, overlap: Overlap
) -> None:
    body = {"queries": ["cats"], "documents": [[CATS]]}
    overlap.error = RuntimeError("out of memory")
    answer = await http.post("/rerank", json=body)
    assert answer.status_code == 500 and "out of memory" in answer.json()["error"]["message"]
    overlap.error = None
    assert (await http.post("/rerank", json=body)).status_code == 200


async def test_a_score_that_is_no_number_is_no_score(corpus: Corpus) -> None:
    class Broken(ByLength):
        def score(self, pairs: Sequence[Pair]) -> list[float]:
            return [float("nan") if query == "bad" else 1.0 for query, _ in pairs]

    app = create_app(FakeEngine(corpus), CONFIG)
    service = add_rerank_route(app, Broken(), CONFIG)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://reranker") as http:
        answer = await http.post("/rerank", json={"queries": ["q", "bad"], "documents": [[CATS], [DOGS]]})
    await service.close()
    error = answer.json()["error"]
    assert answer.status_code == 502 and error["query_index"] == 1 and "not finite" in error["message"]


async def test_the_schema_names_the_route(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/openapi.json")).json()
    assert "/rerank" in schema["paths"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
texts = st.text(st.characters(), max_size=12)
documents = st.fixed_dictionaries(
    {}, optional={key: texts | json_values for key in ("id", "contents", "title", "text")}
)
near_requests = st.fixed_dictionaries(
    {},
    optional={
        "queries": st.lists(texts, max_size=3) | json_values,
        "documents": st.lists(st.lists(documents | json_values, max_size=3), max_size=3) | json_values,
        "rerank_topk": st.integers(-1, 4) | json_values,
        "return_scores": st.booleans() | json_values,
        "other": json_values,
    },
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.binary(max_size=100) | near_requests.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_a_request_or_gets_a_reason(body: bytes) -> None:
    try:
        asked = parse_rerank_request(body, LIMITS, 3)
    except RefusedRequest as refused:
        status = refused.status
    else:
        status = 200
        assert len(asked.queries) == len(asked.documents) and asked.rerank_topk >= 1
        for own in asked.documents:
            assert all(isinstance(each, Document) for each in own)
            "".join(each.contents for each in own).encode()
    assert status in (200, 400, 422)


def test_the_service_alone_says_that_it_has_no_index() -> None:
    (answer,) = RerankOnly(ByLength(), LIMITS).search(["q"], 1)
    assert "it answers POST /rerank" in str(answer)


@pytest.mark.integration
def test_the_script_serves_a_model(tmp_path: Path) -> None:
    folder, port = write_cross_encoder(tmp_path / "model"), free_port()
    script = Path(__file__).resolve().parents[2] / "scripts" / "deploy_retriever" / "rerank_launch.sh"
    command = ["bash", str(script), "--rerank_model", str(folder), "--device", "cpu"]
    own = {"PYTHON": sys.executable, "PORT": str(port), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env={**os.environ, **own}, stderr=subprocess.PIPE)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(server, address)
        own = some_documents(5)
        sent = [{"id": each.id, "contents": each.contents} for each in own]
        body = {"queries": ["river"], "documents": [sent], "return_scores": True}
        hits = httpx.post(f"{address}/rerank", json=body, timeout=60).json()["result"][0]
        (expected,) = CrossEncoderReranker(str(folder), device="cpu").rerank(["river"], [own], 3)
        assert [hit["document"]["id"] for hit in hits] == [each.id for each in expected.documents]  # type: ignore[union-attr]
        assert [hit["score"] for hit in hits] == list(expected.scores)  # type: ignore[union-attr]
        refused = httpx.post(f"{address}/retrieve", json={"queries": ["q"]}, timeout=60)
        assert refused.status_code == 502 and "it answers POST /rerank" in refused.text
    finally:
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 0, errors.decode()


def wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    for _ in range(600):
        assert server.poll() is None
        try:
            if httpx.get(f"{address}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        threading.Event().wait(0.1)
    raise AssertionError("the service did not become ready")
