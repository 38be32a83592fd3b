from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from verl.errors import RetrieverError
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.retrieval.client_endpoints import EndpointPool, Unavailable

A, B, C = (f"http://{name}/retrieve" for name in "abc")


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def unnamed(_: str) -> str | None:
    return "same"


def pool(*urls: str, clock: Clock, identify: Callable[[str], Any] = unnamed) -> EndpointPool:
    return EndpointPool(urls, backoff_s=1.0, max_backoff_s=8.0, identify=identify, clock=clock)


def test_the_least_busy_endpoint_is_chosen() -> None:
    endpoints = pool(A, B, clock=Clock())
    chosen = []
    with ExitStack() as stack:
        for _ in range(6):
            endpoint, wait = endpoints.choose()
            stack.enter_context(endpoints.request(endpoint))
            chosen.append(endpoint.url)
            assert wait == 0
        assert chosen == [A, B] * 3
        endpoint.in_flight -= 1
        assert endpoints.choose()[0] is endpoint
        endpoint.in_flight += 1


def test_idle_endpoints_take_turns() -> None:
    endpoints = pool(A, B, C, clock=Clock())
    chosen = []
    for _ in range(6):
        endpoint, _ = endpoints.choose()
        with endpoints.request(endpoint):
            chosen.append(endpoint.url)
    assert chosen == [A, B, C] * 2


def test_an_endpoint_that_failed_rests_ever_longer_and_is_tried_again() -> None:
    clock = Clock()
    endpoints = pool(A, B, clock=clock)
    bad, _ = endpoints.choose()
    rests = []
    for _ in range(6):
        endpoints.failed(bad, sent_at=clock.now, retry_after_s=0.0)
        assert endpoints.choose()[0] is not bad
        rests.append(bad.resting_until - clock.now)
        clock.now = bad.resting_until
        assert bad in {endpoints.choose()[0], bad}
    for rest, mean in zip(rests, (1, 2, 4, 8, 8, 8), strict=True):
        assert min(0.5 * mean, 4) - 1e-6 <= rest <= min(1.5 * mean, 8) + 1e-6  # the clock rounds
    bad.answered()
    endpoints.failed(bad, sent_at=clock.now, retry_after_s=0.0)
    assert bad.resting_until - clock.now <= 1.5


def test_requests_that_fail_together_count_once() -> None:
    clock = Clock()
    endpoints = pool(A, B, clock=clock)
    bad, _ = endpoints.choose()
    sent = clock.now
    clock.now += 1
    for _ in range(20):
        endpoints.failed(bad, sent_at=sent, retry_after_s=0.0)
    assert bad.resting_until - clock.now <= 1.5


def test_an_endpoint_that_asks_for_time_is_left_alone_for_it() -> None:
    clock = Clock()
    endpoints = pool(A, clock=clock)
    busy, _ = endpoints.choose()
    endpoints.failed(busy, sent_at=clock.now, retry_after_s=20.0)
    assert endpoints.choose() == (busy, 20.0)


def test_when_all_rest_the_first_that_will_not_is_waited_for() -> None:
    clock = Clock()
    endpoints = pool(A, B, clock=clock)
    first, _ = endpoints.choose()
    endpoints.failed(first, sent_at=clock.now, retry_after_s=30.0)
    second, _ = endpoints.choose()
    endpoints.failed(second, sent_at=clock.now, retry_after_s=10.0)
    assert endpoints.choose() == (second, 10.0)


async def test_an_endpoint_is_asked_what_it_serves_once_and_again_after_a_failure() -> None:
    asked: list[str] = []

    async def identify(url: str) -> str:
        asked.append(url)
        await asyncio.sleep(0)
        return "same"

    clock = Clock()
    endpoints = pool(A, B, clock=clock, identify=identify)
    endpoint, _ = endpoints.choose()
    await asyncio.gather(*(endpoints.check(endpoint) for _ in range(5)))
    assert sorted(asked) == [A, B]
    endpoints.failed(endpoint, sent_at=clock.now, retry_after_s=0.0)
    await endpoints.check(endpoint)
    assert sorted(asked) == [A, A, B]


async def test_a_mixture_is_refused_before_anything_is_used_and_from_then_on() -> None:
    async def identify(url: str) -> str | None:
        return {A: "one", B: "one", C: None}[url]

    endpoints = pool(A, B, C, clock=Clock(), identify=identify)
    endpoint, _ = endpoints.choose()
    for _ in range(2):
        with pytest.raises(RetrieverError, match=r"different indexes: .*b/retrieve serves one; .*c/retrieve serves so"):
            await endpoints.check(endpoint)


async def test_an_endpoint_that_is_away_is_checked_when_it_comes_back() -> None:
    serving: dict[str, str] = {A: "one"}

    async def identify(url: str) -> str:
        if url not in serving:
            raise Unavailable("away")
        return serving[url]

    clock = Clock()
    endpoints = pool(A, B, clock=clock, identify=identify)
    first, _ = endpoints.choose()
    await endpoints.check(first)
    assert endpoints.choose()[0] is first
    serving[B] = "two"
    clock.now += 60
    first.in_flight += 1
    second, _ = endpoints.choose()
    assert second is not first
    with pytest.raises(RetrieverError, match="serve different indexes"):
        await endpoints.check(second)


class Cluster:
    """Several services by host name; those in `down` cannot be reached, those in `full` say 503."""

    def __init__(self, **fingerprints: str) -> None:
        self.fingerprints = fingerprints
        self.down: set[str] = set()
        self.full: set[str] = set()
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if host in self.down:
            raise httpx.ConnectError("refused")
        if request.url.path == "/info":
            return httpx.Response(200, json={"fingerprint": self.fingerprints[host]})
        self.asked.append(host)
        if host in self.full:
            return httpx.Response(503, headers={"Retry-After": "30"})
        hits = [
            [{"document": {"id": host, "contents": "x"}, "score": 1}] for _ in json.loads(request.content)["queries"]
        ]
        return httpx.Response(200, json={"result": hits})

    def client(self, **changes: Any) -> RetrieverClient:
        urls = tuple(f"http://{host}/retrieve" for host in self.fingerprints)
        config = RetrieverClientConfig(urls=urls, batch_queries=1, backoff_s=0.01, max_backoff_s=0.02, **changes)
        return RetrieverClient(config, transport=httpx.MockTransport(self))


async def test_requests_are_spread_and_failures_cost_no_call() -> None:
    cluster = Cluster(a="f", b="f", c="f")
    async with cluster.client() as client:
        await asyncio.gather(*(client([f"q{n}"], 1) for n in range(30)))
        assert set(cluster.asked) == {"a", "b", "c"}
        cluster.down, cluster.full = {"a"}, {"b"}
        cluster.asked.clear()
        results = await asyncio.gather(*(client([f"r{n}"], 1) for n in range(30)))
        assert {result.documents[0].id for (result,) in results} == {"c"}
        assert cluster.asked.count("b") <= 8  # one for each request on its way when it said that it is full
        cluster.down = set()
        await asyncio.sleep(0.05)
        results = await asyncio.gather(*(client([f"s{n}"], 1) for n in range(30)))
        assert {result.documents[0].id for (result,) in results} == {"a", "c"}


async def test_a_client_of_two_indexes_answers_nothing() -> None:
    cluster = Cluster(a="one", b="two")
    async with cluster.client() as client:
        for _ in range(2):
            with pytest.raises(RetrieverError, match=r"http://a/retrieve serves one; http://b/retrieve serves two"):
                await client(["q"], 1)
    assert cluster.asked == []


async def test_when_all_are_away_the_message_names_them(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(a="f", b="f")
    cluster.down = {"a", "b"}
    with caplog.at_level(logging.CRITICAL):
        async with cluster.client(retry_window_s=0.1) as client:
            with pytest.raises(
                RetrieverError,
                match=r"retriever http://a/retrieve, http://b/retrieve gave no answer: http://[ab]/.*refused",
            ):
                await client(["q"], 1)


@pytest.mark.parametrize(
    ("answers", "fingerprint"),
    [
        ({"/info": httpx.Response(200, json={"fingerprint": "f1"})}, "f1"),
        ({"/health": httpx.Response(200, json={"fingerprint": "f2"})}, "f2"),
        ({"/info": httpx.Response(200, json=[]), "/health": httpx.Response(200, text="OK")}, None),
        ({}, None),
    ],
)
async def test_what_an_endpoint_serves(answers: dict[str, httpx.Response], fingerprint: str | None) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        return answers.get(request.url.path.removeprefix("/behind"), httpx.Response(404))

    client = RetrieverClient(RetrieverClientConfig(url=A), transport=httpx.MockTransport(handle))
    assert await client._http.identify("http://a/behind/retrieve") == fingerprint
