from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import ConfigError
from verl.retrieval.rate_limit import SlidingWindow


class Time:
    """A clock that only moves when somebody sleeps, and then by a little less or more than asked."""

    def __init__(self, inexactness: float = 0.0) -> None:
        self.now = 100.0
        self.inexactness = inexactness
        self.slept = 0.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept += seconds
        self.now += max(seconds * (1 + self.inexactness), 1e-9)
        await asyncio.sleep(0)


async def departures(limiter: SlidingWindow, time: Time, count: int) -> list[float]:
    moments = []
    for _ in range(count):
        async with limiter.turn():
            moments.append(time.now)
    return moments


async def test_the_first_requests_of_a_window_go_at_once_and_the_next_when_the_oldest_leaves_it() -> None:
    time = Time()
    limiter = SlidingWindow(3, 2.0, time.clock, time.sleep)
    assert await departures(limiter, time, 3) == [100.0] * 3
    time.now = 101.5
    assert await departures(limiter, time, 4) == [102.0, 102.0, 102.0, 104.0]


async def test_no_burst_around_the_border_of_two_windows() -> None:
    time = Time()
    limiter = SlidingWindow(2, 1.0, time.clock, time.sleep)
    await departures(limiter, time, 1)
    time.now = 100.9
    assert await departures(limiter, time, 3) == [100.9, 101.0, 101.9]


async def test_a_request_counts_from_when_it_left_and_not_from_when_it_began_to_connect() -> None:
    time = Time()
    limiter = SlidingWindow(1, 1.0, time.clock, time.sleep)
    async with limiter.turn() as turn:
        time.now = 100.2
        turn.sent()  # to the proxy
        time.now = 100.7
        turn.sent()  # to the service
        time.now = 101.5  # answered
    assert await departures(limiter, time, 1) == [101.7]
    time.now = 200.0
    async with limiter.turn():
        time.now = 200.7  # answered; nobody said when it left
    assert await departures(limiter, time, 1) == [201.7]


async def test_a_turn_waits_for_those_that_are_still_connecting() -> None:
    time = Time()
    limiter = SlidingWindow(2, 1.0, time.clock, time.sleep)
    connected = asyncio.Event()
    order: list[float] = []

    async def ask() -> None:
        async with limiter.turn() as turn:
            if not connected.is_set():
                await connected.wait()
            turn.sent()
            order.append(time.now)

    asked = [asyncio.create_task(ask()) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert order == []
    time.now = 103.0
    connected.set()
    await asyncio.gather(*asked)
    assert order == [103.0, 103.0, 104.0]


@given(
    limit=st.integers(1, 5),
    window_s=st.sampled_from([0.1, 0.3, 1.0, 7.0]),
    requests=st.lists(st.tuples(st.floats(0, 3), st.floats(0, 2)), max_size=40),
    inexactness=st.sampled_from([-0.5, -0.01, 0.0, 0.2]),
)
def test_no_window_ever_holds_more_than_the_limit(
    limit: int, window_s: float, requests: list[tuple[float, float]], inexactness: float
) -> None:
    time = Time(inexactness)
    limiter = SlidingWindow(limit, window_s, time.clock, time.sleep)

    async def run() -> list[float]:
        moments = []
        for pause, connecting in requests:
            time.now += pause
            async with limiter.turn() as turn:
                time.now += connecting
                turn.sent()
                moments.append(time.now)
        return moments

    moments = asyncio.run(run())
    assert all(later - earlier >= window_s - 1e-9 for earlier, later in zip(moments, moments[limit:], strict=False))
    if inexactness == 0:
        assert time.slept <= len(moments) / limit * window_s + 1e-6


async def test_requests_go_in_the_order_in_which_they_asked() -> None:
    time = Time()
    limiter = SlidingWindow(1, 1.0, time.clock, time.sleep)
    order: list[int] = []

    async def ask(number: int) -> None:
        async with limiter.turn():
            order.append(number)

    await asyncio.gather(*(ask(number) for number in range(6)))
    assert order == list(range(6)) and time.now == pytest.approx(105.0)


async def test_a_request_that_is_cancelled_while_it_waits_takes_no_turn() -> None:
    time = Time()
    limiter = SlidingWindow(1, 0.05)
    await departures(limiter, time, 1)
    waiting = asyncio.create_task(departures(limiter, time, 1))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait_for(departures(limiter, time, 2), 5)
    assert waiting.cancelled()


async def test_a_request_that_fails_counts() -> None:
    time = Time()
    limiter = SlidingWindow(1, 1.0, time.clock, time.sleep)

    async def fail() -> None:
        async with limiter.turn():
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011  # it carries nothing
        await fail()
    assert await departures(limiter, time, 1) == [101.0]


async def test_a_hold_keeps_every_request_back_and_never_shortens_an_earlier_one() -> None:
    time = Time()
    limiter = SlidingWindow(5, 1.0, time.clock, time.sleep)
    limiter.hold(30)
    limiter.hold(2)
    assert await departures(limiter, time, 2) == [130.0, 130.0]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (3, [100.0, 100.0, 100.0, 101.0]),
        (0.5, [100.0, 102.0, 104.0, 106.0]),
        (2.5, [100.0, 100.4, 100.8, 101.2]),
        (0.001, [100.0, 1100.0, 2100.0, 3100.0]),
    ],
)
async def test_a_rate_per_second(rate: float, expected: list[float]) -> None:
    time = Time()
    limiter = SlidingWindow.per_second(rate, time.clock, time.sleep)
    assert await departures(limiter, time, 4) == pytest.approx(expected)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="expected a positive number"):
        SlidingWindow.per_second(rate)


def test_a_wrong_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        SlidingWindow(0, 1.0)
    with pytest.raises(ConfigError, match="over 0 s"):
        SlidingWindow(1, 0)
