"""Several endpoints: who gets the next request, who rests, who is tried again; and the same over real connections."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from generator_llms.pool import Pool
from generator_llms.replies import Completion, ServedModel
from generator_llms.request import Request
from tests.generator_llms.backends import client_of
from tests.generator_llms.fake_server import FakeServer, Reply, chat
from verl.errors import GeneratorError


class Endpoint:
    """A backend that is only told apart by its name."""

    def __init__(self, where: str) -> None:
        self.where = where

    async def complete(self, request: Request) -> Completion:
        raise NotImplementedError

    async def models(self) -> list[ServedModel] | None:
        return None

    async def aclose(self) -> None:
        return None


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def pool_of(names: str, concurrency: int, clock: Clock | None = None) -> Pool:
    return Pool([Endpoint(name) for name in names], concurrency, clock or Clock())


class Holder:
    """Holds slots until told to let go of them."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.free: list[asyncio.Event] = []
        self.got: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, count: int = 1) -> None:
        for _ in range(count):
            event = asyncio.Event()
            self.free.append(event)
            self.tasks.append(asyncio.create_task(self._hold(event)))
            await asyncio.sleep(0)

    async def _hold(self, event: asyncio.Event) -> None:
        async with self.pool.slot() as lane:
            self.got.append(lane.backend.where)
            await event.wait()

    async def finish(self) -> None:
        for event in self.free:
            event.set()
        await asyncio.gather(*self.tasks)


async def test_the_endpoint_with_the_fewest_in_flight_is_next_and_none_gets_more_than_its_slots() -> None:
    holder = Holder(pool_of("ab", 2))
    await holder.ask(6)
    assert holder.got == ["a", "b", "a", "b"]
    holder.free[1].set()  # one of b's
    await asyncio.sleep(0.01)
    assert holder.got == ["a", "b", "a", "b", "b"]
    await holder.finish()
    assert len(holder.got) == 6 and all(lane.in_flight == 0 for lane in holder.pool.lanes)


async def test_ties_go_to_who_served_less() -> None:
    pool = pool_of("ab", 2)
    served: Counter[str] = Counter()
    for _ in range(10):
        async with pool.slot() as lane:
            served[lane.backend.where] += 1
    assert served == {"a": 5, "b": 5}


async def test_those_who_wait_are_served_in_order_and_nobody_overtakes() -> None:
    pool, order = pool_of("a", 1), []

    async def ask(number: int) -> None:
        async with pool.slot():
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(ask(number) for number in range(20)))
    assert order == list(range(20))


async def test_a_cancelled_caller_loses_no_slot() -> None:
    holder = Holder(pool_of("a", 1))
    await holder.ask(3)
    holder.tasks[1].cancel()
    holder.free[0].set()
    await asyncio.sleep(0.01)
    assert holder.got == ["a", "a"]  # the first and the third
    holder.tasks[2].cancel()
    await asyncio.gather(*holder.tasks, return_exceptions=True)
    assert holder.pool.lanes[0].in_flight == 0
    async with holder.pool.slot() as lane:
        assert lane.in_flight == 1


async def test_a_slot_that_is_given_to_a_caller_who_just_gave_up_goes_on_to_the_next() -> None:
    holder = Holder(pool_of("a", 1))
    await holder.ask(3)
    holder.free[0].set()
    await asyncio.sleep(0)  # the first lets go, the second's future has its slot but has not run yet
    holder.tasks[1].cancel()
    await asyncio.sleep(0.01)
    holder.free[2].set()
    await asyncio.gather(*holder.tasks, return_exceptions=True)
    assert holder.pool.lanes[0].in_flight == 0 and len(holder.got) >= 2


async def test_an_endpoint_that_failed_rests_then_gets_one_request_and_after_an_answer_its_share() -> None:
    clock = Clock()
    pool = pool_of("ab", 4, clock)
    a, _ = pool.lanes
    assert pool.failed(a, None) is True  # b is healthy
    async with pool.slot() as first, pool.slot() as second:
        assert [first.backend.where, second.backend.where] == ["b", "b"]
    clock.now += 1.0
    async with pool.slot() as probe, pool.slot() as other:
        assert (probe.backend.where, other.backend.where) == ("a", "b")
        pool.answered(a)
        async with pool.slot() as third:
            assert third.backend.where in ("a", "b")
    assert a.failures == 0


async def test_rests_double_up_to_half_a_minute_and_last_as_long_as_the_endpoint_asks() -> None:
    clock = Clock()
    pool = pool_of("ab", 1, clock)
    a, b = pool.lanes
    rests = []
    for _ in range(7):
        for _ in range(4):  # all that were in flight
            pool.failed(a, None)
        rests.append(a.rested_until - clock.now)
        clock.now = a.rested_until
    assert rests == [1, 2, 4, 8, 16, 30, 30]
    pool.failed(b, 100.0)
    assert b.rested_until - clock.now == 100


async def test_an_endpoint_that_answers_and_fails_again_rests_again() -> None:
    pool = pool_of("ab", 1)
    a, _ = pool.lanes
    pool.failed(a, 20.0)
    pool.answered(a)  # a request that was still in flight
    pool.failed(a, None)
    assert (a.failures, a.rested_until) == (1, 51.0)


async def test_where_none_is_healthy_all_are_used() -> None:
    pool = pool_of("ab", 1)
    a, b = pool.lanes
    pool.failed(a, None)
    assert pool.failed(b, None) is False
    async with pool.slot() as first, pool.slot() as second:
        assert {first.backend.where, second.backend.where} == {"a", "b"}


async def test_who_waits_gets_an_endpoint_whose_rest_is_over_though_the_healthy_one_stays_busy() -> None:
    pool = Pool([Endpoint("a"), Endpoint("b")], 1)  # the real clock, because a timer wakes
    a, _ = pool.lanes
    pool.failed(a, None)
    holder = Holder(pool)
    async with asyncio.timeout(10):
        await holder.ask(2)
        assert holder.got == ["b"]
        while len(holder.got) < 2:
            await asyncio.sleep(0.05)
    assert holder.got == ["b", "a"]
    await holder.finish()


async def test_requests_spread_over_all_servers_and_each_has_its_own_bound() -> None:
    slow = Reply(chat("Paris").body, delay=0.03)
    async with (
        FakeServer(default=lambda r: slow) as one,
        FakeServer(default=lambda r: slow) as two,
        client_of("openai", one, base_urls=(two.url,), concurrency=3) as client,
    ):
        talks = [[{"role": "user", "content": str(i)}] for i in range(12)]
        await asyncio.gather(*map(client.complete, talks))
    assert len(one.requests) == len(two.requests) == 6
    assert one.most_in_flight == two.most_in_flight == 3
    assert one.model_lists == two.model_lists == 1


async def test_a_server_that_dies_is_left_alone_while_another_answers() -> None:
    async with FakeServer() as one, FakeServer() as two, client_of("openai", one, base_urls=(two.url,)) as client:
        await client.ready()
        await one.stop()
        for i in range(8):
            assert (await client.complete([{"role": "user", "content": str(i)}])).text == "Paris"
        await one.start()
    assert client.stats.retries == 1 and len(two.requests) == 8


async def test_a_server_that_asks_for_patience_does_not_keep_the_others_waiting() -> None:
    busy = Reply(b"{}", status=429, headers={"retry-after": "3600"})
    async with (
        FakeServer(busy) as one,
        FakeServer() as two,
        client_of("openai", one, base_urls=(two.url,)) as client,
    ):
        assert (await client.complete([{"role": "user", "content": "x"}])).text == "Paris"
    assert (len(one.requests), len(two.requests)) == (1, 1)


async def test_a_server_with_another_model_is_an_error_that_names_it() -> None:
    async with (
        FakeServer() as one,
        FakeServer(models=[{"id": "large"}]) as two,
        client_of("openai", one, base_urls=(two.url,), model=None) as client,
    ):
        with pytest.raises(GeneratorError, match=f"{two.url} serves large, expected 'tiny'"):
            await client.ready()
