from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.retrieval.support import PASSAGES, FakeEngine, free_port
from verl.errors import ConfigError, RetrieverError
from verl.retrieval.app import create_app
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig, search_sync
from verl.retrieval.client_http import _retry_after_s
from verl.retrieval.corpus import Corpus
from verl.retrieval.server_config import ServerConfig
from verl.retrieval.wire import RequestLimits, parse_response
from verl.types import Document, SearchResult

URL = "http://retriever/retrieve"
FAST = {"url": URL, "timeout_s": 5.0, "retry_window_s": 0.0, "backoff_s": 0.001, "max_backoff_s": 0.002}

Handler = Callable[[httpx.Request], Awaitable[httpx.Response]] | Callable[[httpx.Request], httpx.Response]


def make_client(handler: Handler, **changes: Any) -> RetrieverClient:
    return RetrieverClient(RetrieverClientConfig(**{**FAST, **changes}), transport=httpx.MockTransport(handler))


class Service:
    """Answers every query with one document named after it, and remembers the requests."""

    def __init__(self, fail_first: int = 0, failure: httpx.Response | Exception | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self._failures_left = fail_first
        self._failure = failure

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(json.loads(request.content))
        if self._failures_left:
            self._failures_left -= 1
            if isinstance(self._failure, Exception):
                raise self._failure
            assert self._failure is not None
            return self._failure
        document = {"id": "1", "contents": '"T"\ntext'}
        hits = [[{"document": {**document, "id": query}, "score": 1.5}] for query in self.requests[-1]["queries"]]
        return httpx.Response(200, json={"result": hits})


async def test_a_published_servers_answer_becomes_results() -> None:
    async with make_client(Service()) as client:
        assert await client(["a", "b"], 3) == [
            SearchResult("a", (Document("a", "T", "text"),), (1.5,)),
            SearchResult("b", (Document("b", "T", "text"),), (1.5,)),
        ]


async def test_concurrent_calls_share_requests_and_get_their_own_answers(corpus: Corpus) -> None:
    service = Service()
    async with make_client(service, batch_queries=16, max_requests=1) as client:
        results = await asyncio.gather(*(client([f"q{n}"], 3) for n in range(40)))
    assert [result.query for (result,) in results] == [f"q{n}" for n in range(40)]
    assert [result.documents[0].id for (result,) in results] == [f"q{n}" for n in range(40)]
    assert len(service.requests) <= 4 and max(len(r["queries"]) for r in service.requests) == 16


async def test_calls_with_another_topk_get_their_own_request() -> None:
    service = Service()
    async with make_client(service) as client:
        await asyncio.gather(client(["a"], 3), client(["b"], 5))
    assert sorted((r["topk"], r["queries"], r["return_scores"]) for r in service.requests) == [
        (3, ["a"], True),
        (5, ["b"], True),
    ]


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("closed"),
        httpx.Response(502, text="bad gateway"),
        httpx.Response(503, headers={"Retry-After": "0"}),
        httpx.Response(504),
    ],
)
async def test_what_may_pass_is_tried_again(failure: httpx.Response | Exception) -> None:
    service = Service(fail_first=3, failure=failure)
    async with make_client(service, retry_window_s=5.0) as client:
        assert (await client(["a"], 1))[0].query == "a"
    assert len(service.requests) == 4


async def test_a_service_that_asks_for_time_gets_it() -> None:
    service = Service(fail_first=1, failure=httpx.Response(503, headers={"Retry-After": "1"}))
    start = time.monotonic()
    async with make_client(service, retry_window_s=5.0) as client:
        await client(["a"], 1)
    assert time.monotonic() - start >= 0.99


async def test_a_service_that_asks_for_more_time_than_there_is_is_given_up_at_once() -> None:
    service = Service(fail_first=9, failure=httpx.Response(503, headers={"Retry-After": "3600"}))
    async with make_client(service, retry_window_s=60.0) as client:
        with pytest.raises(RetrieverError, match=r"gave no answer: status 503: .*\(1 attempts"):
            await client(["a"], 1)


async def test_every_call_gets_an_attempt_however_long_the_service_rests() -> None:
    service = Service(fail_first=1, failure=httpx.Response(503, headers={"Retry-After": "3600"}))
    async with make_client(service, retry_window_s=0.05) as client:
        with pytest.raises(RetrieverError, match="gave no answer"):
            await client(["a"], 1)
        async with asyncio.timeout(10):
            assert (await client(["a"], 1))[0].query == "a"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("1.5", 1.5), ("", 0.0), ("soon", 0.0), ("-3", 0.0), ("nan", 0.0), ("inf", 0.0)],
)
def test_retry_after_is_read(value: str, seconds: float) -> None:
    assert _retry_after_s(httpx.Response(503, headers={"Retry-After": value})) == seconds


def test_retry_after_may_be_a_date() -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 95 <= _retry_after_s(httpx.Response(503, headers={"Retry-After": at})) <= 100


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "refused the request with 400"),
        (408, "refused the request with 408"),
        (429, "refused the request with 429"),
        (500, "failed with 500"),
        (501, "failed with 501"),
    ],
)
async def test_any_other_status_is_an_error_after_one_request(status: int, message: str) -> None:
    failure = httpx.Response(status, json={"error": {"code": "x", "message": "oops"}}, headers={"Retry-After": "0"})
    service = Service(fail_first=1, failure=failure)
    async with make_client(service, retry_window_s=60.0) as client:
        with pytest.raises(RetrieverError, match=f"retriever {URL} {message}: oops"):
            await client(["a"], 1)
        assert len(service.requests) == 1
        assert (await client(["a"], 1))[0].query == "a", "the endpoint is not left alone for it"


@pytest.mark.parametrize("status", [502, 504])
async def test_a_gateways_status_that_names_a_query_is_the_services(status: int) -> None:
    error = {"code": "query_failed", "message": "no luck", "query_index": 0}
    service = Service(fail_first=1, failure=httpx.Response(status, json={"error": error}))
    async with make_client(service, retry_window_s=60.0) as client:
        with pytest.raises(RetrieverError, match=f"retriever {URL} could not answer: no luck"):
            await client(["a"], 1)
    assert len(service.requests) == 1


class Partial(FakeEngine):
    """Cannot answer queries that start with "no", and breaks at those that start with "break"."""

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
        if any(query.startswith("break") for query in queries):
            raise RuntimeError("index on fire")
        found = super().search(queries, topk)
        return [RetrieverError(f"no luck with {r.query}") if r.query.startswith("no") else r for r in found]


async def test_a_query_that_the_engine_cannot_answer_fails_for_its_caller_alone(corpus: Corpus) -> None:
    engine = Partial(corpus)
    transport = httpx.ASGITransport(create_app(engine, ServerConfig()))
    asked = ["a", "no 1", "b", "no 2", "c", "break", "no 3"]
    async with RetrieverClient(RetrieverClientConfig(**FAST), transport) as client:
        answers = await asyncio.gather(*(client([query], 1) for query in asked), return_exceptions=True)
    for query, answer in zip(asked, answers, strict=True):
        if query in "abc":
            assert isinstance(answer, list) and answer[0].query == query
        else:
            assert isinstance(answer, RetrieverError)
            assert ("index on fire" if query == "break" else f"no luck with {query}") in str(answer)


async def test_queries_that_fail_together_are_asked_for_together(corpus: Corpus) -> None:
    engine = Partial(corpus)
    transport = httpx.ASGITransport(create_app(engine, ServerConfig()))
    async with RetrieverClient(RetrieverClientConfig(**FAST, batch_queries=40), transport) as client:
        calls = (client([f"{'no' if n % 2 else 'yes'} {n}"], 1) for n in range(40))
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, RetrieverError) for answer in answers) == 20
    assert sum(query.startswith("no") for queries, _ in engine.calls for query in queries) == 20


async def test_a_call_ends_at_its_deadline_and_leaves_the_others(corpus: Corpus) -> None:
    async def slowly(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits that long")

    async with make_client(slowly, deadline_s=0.1, retry_window_s=60.0, timeout_s=60.0, max_requests=1) as client:
        with pytest.raises(RetrieverError, match=rf"{URL} gave no answer within deadline_s=0.1; raise it"):
            await client(["a"], 1)
        client._http._http._transport = httpx.MockTransport(Service())
        with pytest.raises(RetrieverError, match="deadline_s"):  # the slow request still has the only place
            await client(["b"], 1)
        for task in next(iter(client._batchers.values()))._running:
            task.cancel()


async def test_the_token_goes_with_every_request(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIEVER_TOKEN", "s3cret")
    transport = httpx.ASGITransport(create_app(FakeEngine(corpus), ServerConfig(token_env="RETRIEVER_TOKEN")))
    async with RetrieverClient(RetrieverClientConfig(**FAST, token_env="RETRIEVER_TOKEN"), transport) as client:
        assert len(await client(["a"], 1)) == 1
    async with RetrieverClient(RetrieverClientConfig(**FAST), transport) as client:
        with pytest.raises(RetrieverError, match="refused the request with 401: no valid bearer token came"):
            await client(["a"], 1)
    monkeypatch.delenv("RETRIEVER_TOKEN")
    with pytest.raises(ConfigError, match="token_env=RETRIEVER_TOKEN: the variable is not set"):
        RetrieverClient(RetrieverClientConfig(**FAST, token_env="RETRIEVER_TOKEN"))


def test_from_code_without_a_loop_and_from_many_threads() -> None:
    service = Service()
    with make_client(service, batch_queries=64, max_requests=1, batch_window_ms=20.0) as client:
        assert client.search(["a", "b"], 1)[1].query == "b"
        with ThreadPoolExecutor(16) as threads:
            found = list(threads.map(lambda n: client.search([f"q{n}"], 1), range(64)))
        assert [result.query for (result,) in found] == [f"q{n}" for n in range(64)]
        with pytest.raises(RetrieverError, match="is blank"):
            client.search([" "], 1)
    assert len(service.requests) < 60  # at least some of them shared one


async def test_a_call_that_would_block_the_loop_is_refused() -> None:
    with pytest.raises(RetrieverError, match="would block the running event loop; await the client"):
        make_client(Service()).search(["a"], 1)


async def test_a_service_that_stays_away_is_reported_after_the_window() -> None:
    service = Service(fail_first=10**9, failure=httpx.ConnectError("refused"))
    async with make_client(service, retry_window_s=0.05) as client:
        with pytest.raises(
            RetrieverError, match=rf"{URL} gave no answer: ConnectError: refused .*check that"
        ) as caught:
            await client(["a"], 1)
    assert isinstance(caught.value.__cause__, Exception)
    assert len(service.requests) > 3


async def test_without_a_window_there_is_one_attempt() -> None:
    service = Service(fail_first=9, failure=httpx.Response(503, json={"error": {"code": "x", "message": "full"}}))
    async with make_client(service) as client:
        with pytest.raises(RetrieverError, match=r"status 503: full \(1 attempts"):
            await client(["a"], 1)
    assert len(service.requests) == 1


def test_a_dead_server_is_an_error_with_its_address() -> None:
    url = f"http://127.0.0.1:{free_port()}/retrieve"
    with pytest.raises(RetrieverError, match=rf"{url} gave no answer: ConnectError"):
        search_sync(RetrieverClientConfig(**{**FAST, "url": url}), ["a"], 1)


async def test_a_refusal_is_raised_at_once_with_the_servers_words(corpus: Corpus) -> None:
    transport = httpx.ASGITransport(create_app(FakeEngine(corpus), ServerConfig()))
    client = RetrieverClient(RetrieverClientConfig(**{**FAST, "retry_window_s": 60.0}), transport)
    async with client:
        with pytest.raises(
            RetrieverError, match=r"refused the request with 422: topk=9 exceeds the corpus's 8 documents"
        ):
            await client(["a"], 9)


async def test_a_refused_query_fails_for_its_caller_alone(corpus: Corpus) -> None:
    engine = FakeEngine(corpus)
    config = ServerConfig(limits=RequestLimits(max_query_chars=5))
    transport = httpx.ASGITransport(create_app(engine, config))
    async with RetrieverClient(RetrieverClientConfig(**FAST), transport) as client:
        asked = ["a", "too long 1", "b", "too long 2", "c"]
        calls = [asyncio.create_task(client([query], 1)) for query in asked]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    for query, answer in zip(asked, answers, strict=True):
        if len(query) > 5:
            assert isinstance(answer, RetrieverError) and "10 characters; expected at most 5" in str(answer)
        else:
            assert isinstance(answer, list) and answer[0].query == query


async def test_documents_survive_the_way_over_the_wire(corpus: Corpus) -> None:
    transport = httpx.ASGITransport(create_app(FakeEngine(corpus), ServerConfig()))
    async with RetrieverClient(RetrieverClientConfig(**FAST), transport) as client:
        (result,) = await client(["ü日本"], 8)
    assert result == SearchResult("ü日本", tuple(Document(*p) for p in PASSAGES), (3.0,) * 8)


@pytest.mark.parametrize(
    ("queries", "reason"),
    [
        ([], r"queries=\[\]; expected a list of at least one query"),
        ("abc", "queries='abc'; expected a list"),
        (["a", "  "], r"queries\[1\] is blank"),
        ([["a"]], r"queries\[0\] is a list of 1; expected a string"),
        (["\ud800"], "unpaired surrogate"),
    ],
)
async def test_a_query_that_cannot_be_asked_is_not_sent(queries: Any, reason: str) -> None:
    service = Service()
    async with make_client(service) as client:
        with pytest.raises(RetrieverError, match=reason):
            await client(queries, 1)
    assert service.requests == []


@pytest.mark.parametrize(
    ("query", "sent"),
    [
        ("exactly 10", "exactly 10"),
        ("one two three", "one two"),
        ("ten chars! and more", "ten chars!"),
        ("unbreakable", "unbreakabl"),
        ("   padded to the left", "padded to"),
    ],
)
async def test_a_long_query_is_cut_at_a_word_counted_and_logged_once(
    query: str, sent: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    with caplog.at_level(logging.WARNING):
        async with make_client(service, max_query_chars=10) as client:
            results = await client([query, query], 1)
    assert [result.query for result in results] == service.requests[0]["queries"] == [sent, sent]
    assert client.truncated == (0 if query == sent else 2)
    assert len(caplog.records) == (0 if query == sent else 1)


@given(st.text(min_size=11, max_size=40).filter(lambda text: not text.isspace()))
def test_a_cut_query_is_never_too_long_and_the_start_of_what_was_asked(query: str) -> None:
    client = make_client(Service(), max_query_chars=10)
    sent = client._shortened(query)
    assert 0 < len(sent) <= 10 and query.strip().startswith(sent)


WRONG_ANSWERS: list[tuple[Any, str]] = [
    (b"<html>", "not JSON"),
    ([], "result=None; expected a list of 2"),
    ({"result": "x"}, "result='x'"),
    ({"result": [[]]}, "1 results; expected a list of 2"),
    ({"result": [[], 5]}, "has 5 for a query"),
    ({"result": [[], [{}] * 3]}, "3 hits for a query; expected a list of at most topk=2"),
    ({"result": [[], ["text"]]}, "a hit is 'text'"),
    ({"result": [[], [{"id": "1", "contents": "x"}]]}, "expected an object with document and score"),
    ({"result": [[], [{"document": {"id": "1", "contents": "x"}}]]}, "score=None; expected a finite number"),
    ({"result": [[], [{"document": {"id": "1", "contents": "x"}, "score": float("nan")}]]}, "score=nan"),
    ({"result": [[], [{"document": {"id": "1", "contents": "x"}, "score": 10**400}]]}, "expected a finite number"),
    ({"result": [[], [{"document": {"contents": "x"}, "score": 1}]]}, "id=None"),
    ({"result": [[], [{"document": {"id": "1"}, "score": 1}]]}, "contents=None"),
]


@pytest.mark.parametrize(("answer", "reason"), WRONG_ANSWERS, ids=[reason for _, reason in WRONG_ANSWERS])
async def test_an_answer_that_breaks_the_contract_is_an_error(answer: Any, reason: str) -> None:
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    async with make_client(lambda _: httpx.Response(200, content=content), retry_window_s=60.0) as client:
        with pytest.raises(RetrieverError, match=f"retriever {URL}: .*check that the URL is a retriever's") as caught:
            await client(["a", "b"], 2)
    assert reason in str(caught.value)


@given(st.recursive(st.none() | st.floats() | st.text(max_size=5), lambda s: st.lists(s) | st.fixed_dictionaries(
    {}, optional={"result": s, "document": s, "score": s, "id": s, "contents": s}), max_leaves=8))  # fmt: skip
def test_any_answer_is_results_or_an_error(answer: Any) -> None:
    try:
        results = parse_response(json.dumps(answer).encode(), ["a"], 3)
    except RetrieverError:
        return
    assert [result.query for result in results] == ["a"]
    assert len(results[0].documents) == len(results[0].scores) <= 3


def test_a_client_belongs_to_one_event_loop() -> None:
    client = make_client(Service())
    asyncio.run(client(["a"], 1))

    async def again() -> None:
        with pytest.raises(RetrieverError, match="another event loop"):
            await client(["a"], 1)

    asyncio.run(again())


async def test_an_answer_that_drips_is_given_up_at_the_timeout() -> None:
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=drip())

    async with make_client(handle, timeout_s=0.1) as client:
        with pytest.raises(RetrieverError, match=r"no answer within timeout_s=0.1 \(1 attempts"):
            await client(["a"], 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "localhost:3000"},
        {"url": "http://localhost:99999/retrieve"},
        {"url": "http://localhost:3000"},
        {"url": "http:///retrieve"},
        {"urls": ("http://a/retrieve", "b/retrieve")},
        {"urls": ("http://a/retrieve", "http://a/retrieve")},
        {"batch_queries": 0},
        {"max_requests": 0},
        {"timeout_s": 0.0},
        {"timeout_s": float("inf")},
        {"retry_window_s": -1.0},
        {"deadline_s": 0.0},
        {"backoff_s": float("nan")},
        {"batch_window_ms": -1.0},
    ],
)
def test_a_wrong_client_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=next(iter(wrong)).removesuffix("s") if "url" in str(wrong) else next(iter(wrong))
    ):
        RetrieverClientConfig(**wrong)
