from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from verl.retrieval.batching import MicroBatcher


class Doubler:
    """Doubles numbers in batches; a 100 fails alone, a -13 fails the batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = self.most_running = 0

    async def __call__(self, items: list[int]) -> Sequence[int | Exception]:
        self.batches.append(items)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.gate.wait()
        self.running -= 1
        if -13 in items:
            raise ValueError("thirteen")
        return [KeyError(item) if item == 100 else 2 * item for item in items]


@pytest.fixture
async def doubler() -> Doubler:
    return Doubler()


async def test_what_waits_while_a_batch_runs_becomes_the_next_batch(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=50, window_s=0.001)
    doubler.gate.clear()
    first = asyncio.create_task(batcher.submit([0]))
    while not doubler.batches:
        await asyncio.sleep(0)
    others = [asyncio.create_task(batcher.submit([n])) for n in range(1, 33)]
    await asyncio.sleep(0.01)
    doubler.gate.set()
    assert await asyncio.gather(first, *others) == [[2 * n] for n in range(33)]
    assert doubler.batches == [[0], list(range(1, 33))]


async def test_batches_keep_their_limit_and_calls_their_order(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=4, window_s=0.001)
    assert await batcher.submit(list(range(10))) == [2 * n for n in range(10)]
    assert doubler.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert doubler.most_running == 1


async def test_as_many_batches_run_as_allowed(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=1, window_s=0, max_running=3)
    doubler.gate.clear()
    call = asyncio.create_task(batcher.submit(list(range(10))))
    await asyncio.sleep(0.01)
    doubler.gate.set()
    await call
    assert doubler.most_running == 3


async def test_a_failed_batch_fails_its_callers_and_a_failed_item_its_own(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=8, window_s=0.01)
    with pytest.raises(ValueError, match="thirteen"):
        await batcher.submit([-13, 1])
    good, bad = asyncio.create_task(batcher.submit([1, 2])), asyncio.create_task(batcher.submit([3, 100]))
    assert await good == [2, 4]
    with pytest.raises(KeyError):
        await bad
    assert doubler.batches[-1] == [1, 2, 3, 100]


async def test_a_result_too_few_is_an_error() -> None:
    async def drop_one(items: list[int]) -> list[int]:
        return items[1:]

    with pytest.raises(RuntimeError, match="2 items got 1 results"):
        await MicroBatcher(drop_one, max_items=8, window_s=0).submit([1, 2])


async def test_a_caller_that_went_away_costs_nothing(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=8, window_s=0.001)
    doubler.gate.clear()
    running, gone, kept = (asyncio.create_task(batcher.submit([n])) for n in (1, 2, 3))
    while not doubler.batches:
        await asyncio.sleep(0)
    late = asyncio.create_task(batcher.submit([4]))
    later = asyncio.create_task(batcher.submit([5]))
    await asyncio.sleep(0)
    gone.cancel()
    late.cancel()
    await asyncio.sleep(0)
    doubler.gate.set()
    assert await running == [2] and await kept == [6] and await later == [10]
    assert 4 not in [item for batch in doubler.batches for item in batch]
    await batcher.drain()


async def test_draining_waits_for_everything(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=2, window_s=0.001)
    await batcher.drain()
    call = asyncio.create_task(batcher.submit(list(range(7))))
    await asyncio.sleep(0)
    await batcher.drain()
    assert sum(map(len, doubler.batches)) == 7 and doubler.running == 0
    assert await call == [2 * n for n in range(7)]
