from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


async def test_the_window_ends_when_as_many_are_there_as_before(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=50, window_s=30.0)
    doubler.gate.clear()
    calls = [asyncio.create_task(batcher.submit([n])) for n in range(8)]
    while not doubler.batches:
        await asyncio.sleep(0)
    doubler.gate.set()
    await asyncio.gather(*calls)
    async with asyncio.timeout(10):
        await asyncio.gather(*(batcher.submit([n]) for n in range(len(doubler.batches[-1]))))


@pytest.mark.parametrize(("callers", "waits"), [(2, False), (7, False), (8, True)])
async def test_the_window_is_for_a_crowd(doubler: Doubler, callers: int, waits: bool) -> None:
    batcher = MicroBatcher(doubler, max_items=50, window_s=3600.0)
    await asyncio.gather(*(batcher.submit([n]) for n in range(callers)))
    assert doubler.batches == [list(range(callers))]
    lone = asyncio.create_task(batcher.submit([100_000]))
    done, _ = await asyncio.wait({lone}, timeout=0.2 if waits else 60)
    assert bool(done) != waits
    lone.cancel()


@pytest.mark.parametrize(("batch_s", "item_s", "waits"), [(0.6, 0.0, True), (0.0, 0.02, False)])
async def test_the_window_is_for_batches_that_save_its_time(batch_s: float, item_s: float, waits: bool) -> None:
    batches: list[list[str]] = []

    async def run(items: list[str]) -> list[str]:
        batches.append(items)
        await asyncio.sleep(batch_s + len(items) * item_s)
        return items

    batcher = MicroBatcher(run, max_items=50, window_s=0.4)
    await batcher.submit(["alone"])
    await asyncio.gather(*(batcher.submit([f"one of {n}"]) for n in range(10)))
    first = asyncio.create_task(batcher.submit(["first"]))
    for _ in range(10):
        await asyncio.sleep(0)
    await asyncio.gather(first, batcher.submit(["second"]))
    assert batches[2:] == ([["first", "second"]] if waits else [["first"], ["second"]])


async def test_errors_come_in_place_where_they_are_asked_for(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=8, window_s=0.001)
    first, failed, last = await batcher.gather([1, 100, 3])
    assert (first, last) == (2, 6) and isinstance(failed, KeyError)
    wrong = await batcher.gather([-13, 1])
    assert [type(error) for error in wrong] == [ValueError, ValueError]


async def test_what_waits_is_counted(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=4, window_s=0)
    doubler.gate.clear()
    running = asyncio.create_task(batcher.submit([0]))
    while not doubler.batches:
        await asyncio.sleep(0)
    long = asyncio.create_task(batcher.submit(list(range(10))))
    short = asyncio.create_task(batcher.submit([1, 2]))
    await asyncio.sleep(0)
    assert batcher.waiting == 12
    long.cancel()
    await asyncio.sleep(0)
    assert batcher.waiting == 2
    doubler.gate.set()
    assert await running == [0] and await short == [2, 4]
    assert batcher.waiting == 0 and sorted(doubler.batches) == [[0], [1, 2]]


async def test_a_call_that_is_cut_short_leaves_the_rest_of_its_items(doubler: Doubler) -> None:
    batcher = MicroBatcher(doubler, max_items=2, window_s=0)
    doubler.gate.clear()
    call = asyncio.create_task(batcher.submit(list(range(6))))
    while not doubler.batches:
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.sleep(0)
    doubler.gate.set()
    await batcher.drain()
    assert doubler.batches == [[0, 1]] and batcher.waiting == 0


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.lists(st.integers(0, 200), max_size=7), max_size=12),
    max_items=st.integers(1, 6),
    max_running=st.integers(1, 3),
)
def test_every_call_gets_its_own_results(calls: list[list[int]], max_items: int, max_running: int) -> None:
    async def run() -> None:
        async def work(items: list[int]) -> list[int | Exception]:
            assert 0 < len(items) <= max_items
            await asyncio.sleep(0)
            return [KeyError(item) if item == 100 else 2 * item for item in items]

        batcher = MicroBatcher(work, max_items=max_items, window_s=0.0001, max_running=max_running)
        answers = await asyncio.gather(*(batcher.gather(items) for items in calls))
        for items, results in zip(calls, answers, strict=True):
            assert [-1 if isinstance(result, KeyError) else result for result in results] == [
                -1 if item == 100 else 2 * item for item in items
            ]

    asyncio.run(run())
