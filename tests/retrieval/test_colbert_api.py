"""`GET /api/search` in the published shape, and the engine that asks servers of that shape."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.retrieval.support import PASSAGES, FakeEngine, live, open_corpus
from tests.retrieval.web_server import Fault, WebServer
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.app import create_app
from verl.retrieval.colbert_api import entries, softmax
from verl.retrieval.colbert_client import ColbertApiConfig, ColbertApiEngine, open_engine, read_answer
from verl.retrieval.corpus import Corpus
from verl.retrieval.opening import EngineOptions
from verl.retrieval.opening import open_engine as open_any
from verl.retrieval.server_config import ServerConfig
from verl.retrieval.web_http import FetchConfig
from verl.retrieval.wire import RequestLimits
from verl.types import Document, SearchResult

CONFIG = ServerConfig(topk=2, limits=RequestLimits(max_query_chars=40))
FAST = FetchConfig(rate=1000, timeout_s=5, attempts=3, backoff_s=0.001, max_wait_s=0.5)
HIT = {"text": "Paris | Paris is a city.", "pid": 3, "rank": 1, "score": 2.5, "prob": 1.0}


def connect(engine: Any, config: ServerConfig = CONFIG) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(engine, config)), base_url="http://retriever")


class Graded(FakeEngine):
    """Scores 2, 1, 0, ... ; one query cannot be answered."""

    def search(self, queries: Any, topk: int) -> list[Any]:
        found = super().search(queries, topk)
        return [
            RetrieverError("away")
            if one.query == "broken"
            else SearchResult(one.query, one.documents, tuple(float(2 - rank) for rank in range(len(one.documents))))
            for one in found
        ]


async def test_documents_come_in_the_published_shape(corpus: Corpus) -> None:
    async with connect(Graded(corpus)) as http:
        answer = (await http.get("/api/search", params={"query": "a & b?", "k": 2})).json()
    assert answer["query"] == "a & b?"
    assert answer["topk"][0] == {
        "text": f"{PASSAGES[0][1]} | {PASSAGES[0][2]}",
        "pid": "d0",
        "rank": 1,
        "score": 2.0,
        "prob": pytest.approx(math.e**2 / (math.e**2 + math.e)),
    }
    assert [hit["rank"] for hit in answer["topk"]] == [1, 2]


async def test_a_query_whose_client_has_gone_is_not_searched(corpus: Corpus) -> None:
    engine = FakeEngine(corpus, gate=threading.Event())
    app = create_app(engine, CONFIG)
    with live(app, CONFIG) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            first = asyncio.create_task(http.get("/api/search", params={"query": "first"}))
            await asyncio.to_thread(engine.started.wait, 20)
            with pytest.raises(httpx.ReadTimeout):
                await http.get("/api/search", params={"query": "leaving"}, timeout=0.2)
            async with asyncio.timeout(20):
                while app.service.waiting:
                    await asyncio.sleep(0.01)
            engine.gate.set()
            assert (await first).status_code == 200
            assert (await http.get("/api/search", params={"query": "last"})).status_code == 200
    assert [queries for queries, _ in engine.calls] == [["first"], ["last"]]


@pytest.mark.parametrize(("k", "asked", "given"), [(None, 10, 8), ("3", 3, 3), ("100000", 100, 8)])
async def test_k_is_10_by_default_and_bounded(corpus: Corpus, k: str | None, asked: int, given: int) -> None:
    engine = Graded(corpus)
    async with connect(engine) as http:
        answer = await http.get("/api/search", params={"query": "q"} | ({"k": k} if k else {}))
    assert (len(answer.json()["topk"]), engine.calls) == (given, [(["q"], min(asked, 8))])


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"query": "  "},
        {"query": "x" * 41},
        {"query": "q", "k": "0"},
        {"query": "q", "k": "-1"},
        {"query": "q", "k": "many"},
        {"query": "q", "k": "9" * 5000},
    ],
)
async def test_a_wrong_request_is_told_so(corpus: Corpus, parameters: dict[str, str]) -> None:
    async with connect(Graded(corpus)) as http:
        answer = await http.get("/api/search", params=parameters)
    assert answer.status_code == 422 and ("expected" in answer.text or "allowed" in answer.text)


async def test_a_failed_search_is_no_empty_answer(corpus: Corpus) -> None:
    async with connect(Graded(corpus)) as http:
        answer = await http.get("/api/search", params={"query": "broken"})
    assert answer.status_code == 502 and "away" in answer.text


async def test_the_token_counts_here_too(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIEVER_TOKEN", "a-long-enough-token")
    async with connect(Graded(corpus), ServerConfig(topk=2, token_env="RETRIEVER_TOKEN")) as http:
        assert (await http.get("/api/search", params={"query": "q"})).status_code == 401


def test_ids_that_are_rows_are_numbers() -> None:
    documents = [{"id": id, "title": "T", "text": "t"} for id in ("7", "007", "d7", "-7", "1" * 30)]
    assert [entry["pid"] for entry in entries(documents, [0.0] * 5)] == [7, "007", "d7", "-7", "1" * 30]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_shares_sum_to_one_and_follow_the_scores(scores: list[float]) -> None:
    shares = softmax(scores)
    assert sum(shares) == pytest.approx(1) and softmax([]) == []
    # A difference in score too small for a float share is a tie of shares, never an order turned round.
    assert shares[scores.index(max(scores))] == max(shares)


@pytest.fixture
def opened() -> Iterator[Callable[..., ColbertApiEngine]]:
    engines: list[ColbertApiEngine] = []

    def open_(url: str | None, environ: dict[str, str] | None = None, **config: Any) -> ColbertApiEngine:
        engines.append(open_engine(ColbertApiConfig(url, http=FAST, **config), environ or {}))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


def test_our_own_service_can_be_asked(tmp_path: Path, opened: Callable[..., ColbertApiEngine]) -> None:
    corpus = open_corpus(tmp_path)
    with live(create_app(Graded(corpus), CONFIG), CONFIG) as port:
        engine = opened(f"http://127.0.0.1:{port}/api/search")
        result, failed, again = engine.search(["käse & brot? #1 100%", "broken", "käse & brot? #1 100%"], 3)
    assert isinstance(result, SearchResult) and again == result
    assert (result.query, result.scores) == ("käse & brot? #1 100%", (2.0, 1.0, 0.0))
    assert result.documents == tuple(corpus.documents(0, 3)), "title and text come back as they were"
    assert isinstance(failed, RetrieverError) and "away" in str(failed)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


def answering(*hits: dict[str, Any]) -> Fault:
    return Fault(body=json.dumps({"query": "q", "topk": hits}).encode())


def test_the_environment_names_the_server_and_busy_ones_are_asked_again(
    server: WebServer, opened: Callable[..., ColbertApiEngine]
) -> None:
    server.faults.extend([Fault(503), Fault(drop=True), answering(HIT, {**HIT, "pid": 4, "score": 1})])
    engine = opened(None, {"API_SEARCH": f"{server.url}/api/search"})
    (result,) = engine.search(["whale & co"], 1)
    assert result == SearchResult("whale & co", (Document("3", "Paris", "Paris is a city."),), (2.5,))
    assert [asked.path for asked in server.asked] == ["/api/search"] * 3
    assert server.asked[-1].query == {"query": "whale & co", "k": "1"}
    server.always = Fault(500)
    (failed,) = engine.search(["other"], 1)
    assert isinstance(failed, RetrieverError) and "3 attempts" in str(failed)


def test_answers_are_kept_and_replayed(
    server: WebServer, opened: Callable[..., ColbertApiEngine], tmp_path: Path
) -> None:
    server.faults.extend([answering(HIT)])
    kept = {"cache": tmp_path / "kept.sqlite"}
    first = opened(server.url, cache_mode="record", **kept).search(["q"], 5)
    replaying = opened(server.url, cache_mode="replay", **kept)
    assert replaying.search(["q"], 5) == first and len(server.asked) == 1
    assert isinstance(replaying.search(["other"], 5)[0], RetrieverError)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<html>", "not JSON"),
        ("[]", "expected an object with a list topk"),
        ('{"topk": {}}', "expected an object with a list topk"),
        (json.dumps({"topk": ["x"]}), "expected text, pid and a finite score"),
        (json.dumps({"topk": [{**HIT, "score": True}]}), "expected text, pid and a finite score"),
        ('{"topk": [{"text": "a", "pid": 1, "score": NaN}]}', "expected text, pid and a finite score"),
        (json.dumps({"topk": [{**HIT, "pid": None}]}), "expected text, pid and a finite score"),
        (json.dumps({"topk": [HIT, {**HIT, "pid": 4, "score": 9}]}), "do not fall"),
        (json.dumps({"topk": [HIT, HIT]}), "a pid twice"),
    ],
)
def test_an_answer_of_another_shape_is_an_error(text: str, reason: str) -> None:
    with pytest.raises(RetrieverError, match=reason):
        read_answer(text, "q", 5)


@pytest.mark.parametrize(
    ("text", "title", "rest"),
    [
        ("a | b | c", "a", "b | c"),
        ("no bar", "", "no bar"),
        ('"The ""x""" | "quoted"', 'The "x"', "quoted"),
        ("|", "", ""),
    ],
)
def test_a_title_stands_before_the_first_bar(text: str, title: str, rest: str) -> None:
    (document,) = read_answer(json.dumps({"topk": [{**HIT, "text": text}]}), "q", 5).documents
    assert (document.title, document.text) == (title, rest)


@given(
    st.text(max_size=40)
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["topk", "text", "pid", "score"]), inner),
        max_leaves=8,
    ).map(json.dumps)
)
def test_reading_an_answer_raises_nothing_else(text: str) -> None:
    with suppress(RetrieverError):
        assert len(read_answer(text, "q", 3).documents) <= 3


def test_it_is_opened_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("API_SEARCH", raising=False)
    with pytest.raises(ConfigError, match="API_SEARCH"):
        open_any(EngineOptions("colbert_api"))
    with pytest.raises(ConfigError, match="searches another server"):
        EngineOptions("colbert_api", corpus_path=Path("c.jsonl"))
    opened = open_any(EngineOptions("colbert_api", web_base_url="http://colbert.example:8893/api/search"))
    assert (opened.engine.info.name, opened.engine.info.max_topk, opened.cacheable) == ("colbert_api", 100, False)
    opened.engine.close()


@pytest.mark.parametrize("url", ["ftp://x", "http://user:word@x/", "http://x/?query=1", "colbert:8893"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        ColbertApiConfig(url)
    with pytest.raises(ConfigError):
        open_engine(ColbertApiConfig(), {"API_SEARCH": url})


def test_a_missing_file_of_answers_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        open_engine(ColbertApiConfig("http://x", tmp_path / "none", "replay"))
