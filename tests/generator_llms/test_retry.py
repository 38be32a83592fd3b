"""The retry policy under a fake clock: what is waited for, how long, and when it ends."""

from __future__ import annotations

import time

import pytest

from generator_llms.retry import Malformed, Rejected, RetryPolicy, Unavailable, parse_retry_after
from verl.errors import GeneratorError


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def policy(clock: Clock, window: float = 20.0, malformed: int = 2) -> RetryPolicy:
    return RetryPolicy(window, malformed, 1.0, 4.0, clock=lambda: clock.now, sleep=clock.sleep, jitter=lambda: 1.0)


class Scripted:
    """Raises its causes one after the other, then returns 7."""

    def __init__(self, *causes: Exception) -> None:
        self.causes = list(causes)
        self.retries = 0

    async def __call__(self) -> int:
        if self.causes:
            raise self.causes.pop(0)
        return 7

    def count(self) -> None:
        self.retries += 1


async def test_pauses_double_up_to_the_longest() -> None:
    clock, call = Clock(), Scripted(*(Unavailable("down") for _ in range(5)))
    assert await policy(clock).run(call, "here", call.count) == 7
    assert clock.slept == [1.0, 2.0, 4.0, 4.0, 4.0] and call.retries == 5


async def test_jitter_halves_a_pause_at_most() -> None:
    clock, call = Clock(), Scripted(Unavailable("down"))
    await RetryPolicy(9.0, 0, 1.0, clock=lambda: clock.now, sleep=clock.sleep, jitter=lambda: 0.0).run(
        call, "here", call.count
    )
    assert clock.slept == [0.5]


async def test_an_absent_endpoint_is_given_up_at_the_end_of_the_window() -> None:
    clock, call = Clock(), Scripted(*(Unavailable("down") for _ in range(99)))
    with pytest.raises(GeneratorError, match=r"here failed 5 times within the retry window of 12 s: down"):
        await policy(clock, window=12.0).run(call, "here", call.count)
    # 1 + 2 + 4 + 4 = 11 fits into 12, another 4 would not.
    assert clock.slept == [1.0, 2.0, 4.0, 4.0]


async def test_retry_after_is_waited_for_when_it_is_longer() -> None:
    clock, call = Clock(), Scripted(Unavailable("busy", 9.0), Unavailable("busy", 0.1))
    await policy(clock).run(call, "here", call.count)
    assert clock.slept == [9.0, 2.0]


async def test_unusable_replies_are_counted_apart_from_absence() -> None:
    causes = [Malformed("a"), Unavailable("down"), Malformed("b"), Unavailable("down")]
    clock, call = Clock(), Scripted(*causes)
    assert await policy(clock).run(call, "here", call.count) == 7
    clock, call = Clock(), Scripted(*causes, Malformed("c"))
    with pytest.raises(GeneratorError, match="here gave no usable reply in 3 tries: c"):
        await policy(clock).run(call, "here", call.count)


async def test_a_rejection_is_final() -> None:
    clock, call = Clock(), Scripted(Rejected("no"))
    with pytest.raises(GeneratorError, match="here: no"):
        await policy(clock).run(call, "here", call.count)
    assert clock.slept == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-2", 0.0),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:40 GMT", 0.0),
        ("Thu, 99 Jan 1970", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str | None, expected: float | None) -> None:
    assert parse_retry_after(value, now=lambda: 60.0) == expected


def test_retry_after_reads_the_wall_clock() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 1000))
    waited = parse_retry_after(date)
    assert waited is not None and 900 < waited <= 1000
