"""Shared work: one run for callers at the same time, failures forgotten, cancelled callers."""

from __future__ import annotations

import asyncio

import pytest

from verl.errors import GeneratorError
from verl.rewards.once import Once, together


class Work:
    def __init__(self, *outcomes: int | Exception) -> None:
        self.outcomes = list(outcomes)
        self.runs = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        await self.go.wait()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def test_callers_at_the_same_time_and_later_share_one_run() -> None:
    once, work = Once[str, int](), Work(7)
    callers = [asyncio.create_task(once("a", work)) for _ in range(5)]
    await asyncio.sleep(0)
    work.go.set()
    assert await asyncio.gather(*callers) == [7] * 5
    assert (await once("a", work), work.runs) == (7, 1)


async def test_keys_do_not_share() -> None:
    once, work = Once[str, int](), Work(7, 8)
    work.go.set()
    assert (await once("a", work), await once("b", work)) == (7, 8)


async def test_a_failure_reaches_all_who_wait_and_is_forgotten() -> None:
    once, work = Once[str, int](), Work(GeneratorError("down"), 9)
    callers = [asyncio.create_task(once("a", work)) for _ in range(2)]
    await asyncio.sleep(0)
    work.go.set()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["down", "down"]
    assert (await once("a", work), work.runs) == (9, 2)


async def test_a_caller_who_gives_up_does_not_end_the_work_of_the_others() -> None:
    once, work = Once[str, int](), Work(7)
    first, second = (asyncio.create_task(once("a", work)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    work.go.set()
    assert (await second, work.runs) == (7, 1)
    assert first.cancelled()


async def test_together_raises_the_first_failure_as_it_is_and_ends_the_rest() -> None:
    ended = asyncio.Event()

    async def waits() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return 0

    async def fails() -> int:
        await asyncio.sleep(0)
        raise GeneratorError("down")

    with pytest.raises(GeneratorError, match="down"):
        await together([waits(), fails()])
    await asyncio.wait_for(ended.wait(), 5)


async def test_together_keeps_the_order() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await together([after(3), after(0), after(1)]) == [3, 0, 1]
