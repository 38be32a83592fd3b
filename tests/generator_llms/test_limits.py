"""Rates and budgets under a fake clock, and within a client."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator_llms.limits import Budget, RateLimiter
from generator_llms.replies import Completion
from tests.generator_llms.backends import client_of
from tests.generator_llms.fake_server import FakeServer, Reply, as_json, chat
from verl.errors import GeneratorError


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def limiter(requests: int | None, tokens: int | None) -> tuple[RateLimiter, Clock]:
    clock = Clock()
    return RateLimiter(requests, tokens, clock, clock.sleep), clock


async def times(rates: RateLimiter, clock: Clock, costs: list[int]) -> list[float]:
    found = []
    for cost in costs:
        await rates.admit(cost)
        found.append(clock.now - 1000.0)
    return found


async def test_the_window_slides() -> None:
    rates, clock = limiter(2, None)
    assert await times(rates, clock, [1, 1]) == [0, 0]
    clock.now += 30
    assert await times(rates, clock, [1]) == [60]  # when the first two leave
    clock.now += 10
    assert await times(rates, clock, [1]) == [70]
    assert await times(rates, clock, [1]) == [120]  # sixty after the third


async def test_tokens_are_bounded_by_their_sum() -> None:
    rates, clock = limiter(None, 100)
    assert await times(rates, clock, [60, 40, 1, 99]) == [0, 0, 60, 60]


async def test_what_a_reply_did_not_take_is_free_again_within_a_second() -> None:
    rates, clock = limiter(None, 100)
    sent = await rates.admit(100)
    waiting = asyncio.create_task(rates.admit(50))
    await asyncio.sleep(0)
    rates.settle(sent, 20)
    await waiting
    assert clock.now - 1000.0 <= 2.0


async def test_settling_after_the_window_changes_nothing() -> None:
    rates, clock = limiter(None, 100)
    sent = await rates.admit(100)
    clock.now += 61
    await rates.admit(100)  # the first has left
    rates.settle(sent, 0)
    assert await times(rates, clock, [1]) == [121]


async def test_a_request_larger_than_a_minute_is_refused() -> None:
    rates, _ = limiter(None, 100)
    with pytest.raises(GeneratorError, match="tokens_per_minute=100"):
        await rates.admit(101)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 30), st.integers(0, 50)), max_size=12),
    st.integers(1, 5),
)
def test_no_sixty_seconds_ever_hold_more_than_allowed(steps: list[tuple[int, float, int]], requests: int) -> None:
    clock = Clock()

    async def pass_by(seconds: float) -> None:
        clock.now += seconds

    async def run() -> list[tuple[float, int]]:
        rates, admitted = RateLimiter(requests, 100, clock, pass_by), []
        for tokens, pause, real in steps:
            sent = await rates.admit(tokens)
            admitted.append((clock.now, sent))
            clock.now += pause
            rates.settle(sent, min(real, tokens))
        return [(at, sent.tokens) for at, sent in admitted]

    admitted = asyncio.run(run())
    for at, _ in admitted:
        window = [tokens for other, tokens in admitted if at - 60 + 1e-9 < other <= at]
        assert len(window) <= requests and sum(window) <= 100


def test_a_budget_books_what_replies_say_they_took() -> None:
    budget = Budget(2.0, 10.0, None)
    reserved = budget.reserve(1_000_000, 100_000)
    assert reserved == pytest.approx(3.0)
    budget.settle(reserved, Completion("x", prompt_tokens=500_000, completion_tokens=10_000))
    assert budget.spent == pytest.approx(1.1)
    budget.settle(budget.reserve(1_000_000, 0), Completion("x"))  # it does not say: all of it
    assert budget.spent == pytest.approx(3.1)
    budget.settle(budget.reserve(1_000_000, 0), None)  # not answered
    assert budget.spent == pytest.approx(3.1)


def test_spent_and_reserved_never_exceed_the_budget() -> None:
    budget = Budget(1.0, 0.0, 3.0)
    first = budget.reserve(2_000_000, 0)
    with pytest.raises(GeneratorError, match="max_spend=3"):
        budget.reserve(2_000_000, 0)
    budget.settle(first, None)
    budget.reserve(2_000_000, 0)


TALKS = [[{"role": "user", "content": str(i)}] for i in range(50)]
PRICES = {"price_per_million_prompt": 1.0, "price_per_million_completion": 10.0}


async def test_a_client_counts_what_it_spends_and_stops_before_it_spends_more() -> None:
    # Every reply takes 11 and 3 tokens, 41 millionths; before it, 33 and 10 tokens, 133 millionths, are set aside.
    async with (
        FakeServer() as server,
        client_of("openai", server, max_tokens=10, max_spend=300e-6, **PRICES) as client,
    ):
        for talk in TALKS[:5]:
            await client.complete(talk)
        assert client.stats.spend == pytest.approx(5 * 41e-6)
        with pytest.raises(GeneratorError, match=r"max_spend=0\.0003"):
            await client.complete(TALKS[5])
    assert len(server.requests) == 5 and client.stats.failures == 1


async def test_many_at_once_do_not_overspend() -> None:
    slow = Reply(chat("Paris").body, delay=0.02)
    async with (
        FakeServer(default=lambda r: slow) as server,
        client_of("openai", server, max_tokens=10, max_spend=300e-6, **PRICES) as client,
    ):
        outcomes = await asyncio.gather(*map(client.complete, TALKS), return_exceptions=True)
    assert sum(isinstance(outcome, GeneratorError) for outcome in outcomes) == 48
    assert len(server.requests) == 2 and client.stats.spend <= 300e-6


async def test_unusable_replies_cost_and_unanswered_requests_do_not() -> None:
    async with (
        FakeServer(Reply(b"{}", status=500), as_json({"choices": []})) as server,
        client_of("openai", server, max_tokens=10, **PRICES) as client,
    ):
        await client.complete(TALKS[0])
    assert client.stats.spend == pytest.approx(133e-6 + 41e-6)


async def test_a_client_that_may_send_two_a_minute_does_not_send_a_third() -> None:
    async with FakeServer() as server, client_of("openai", server, requests_per_minute=2) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.gather(*map(client.complete, TALKS[:3]))
    assert len(server.requests) == 2


async def test_a_client_refuses_a_prompt_larger_than_its_minute() -> None:
    async with FakeServer() as server, client_of("openai", server, tokens_per_minute=100) as client:
        with pytest.raises(GeneratorError, match="tokens_per_minute=100"):
            await client.complete(TALKS[0])  # its 512 tokens of reply alone are more
    assert server.requests == []
