from __future__ import annotations

import asyncio

import pytest

from verl.retrieval.singly import Singly


class Doubler:
    """Doubles numbers, each when its gate opens; a 100 fails."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.ended: list[int] = []
        self.cancelled: list[int] = []
        self.gates: dict[int, asyncio.Event] = {}

    async def __call__(self, item: int) -> int | Exception:
        self.started.append(item)
        try:
            if item in self.gates:
                await self.gates[item].wait()
        except asyncio.CancelledError:
            self.cancelled.append(item)
            raise
        self.ended.append(item)
        return KeyError(item) if item == 100 else 2 * item


@pytest.fixture
async def doubler() -> Doubler:
    return Doubler()


async def test_items_start_in_order_and_none_waits_for_another(doubler: Doubler) -> None:
    singly = Singly(doubler)
    doubler.gates[1] = asyncio.Event()
    slow = asyncio.create_task(singly.gather([1, 2, 100]))
    await asyncio.sleep(0)
    failed, fast = await singly.gather([100, 3])
    assert isinstance(failed, KeyError) and fast == 6
    assert doubler.started == [1, 2, 100, 3] and not slow.done() and singly.waiting == 1
    doubler.gates[1].set()
    first, second, third = await slow
    assert (first, second) == (2, 4) and isinstance(third, KeyError) and singly.waiting == 0


async def test_equal_items_that_meet_run_once_and_later_ones_again(doubler: Doubler) -> None:
    singly = Singly(doubler)
    assert await singly.gather([5, 5]) == [10, 10]
    assert await singly.gather([5]) == [10]
    assert doubler.started == [5, 5]


async def test_what_nobody_waits_for_is_cancelled_and_what_somebody_does_is_not(doubler: Doubler) -> None:
    singly = Singly(doubler)
    doubler.gates = {1: asyncio.Event(), 2: asyncio.Event()}
    leaving = asyncio.create_task(singly.gather([1, 2]))
    staying = asyncio.create_task(singly.gather([2]))
    await asyncio.sleep(0.01)
    assert singly.waiting == 3
    leaving.cancel()
    await asyncio.sleep(0.01)
    assert singly.waiting == 1 and doubler.cancelled == [1]
    again = asyncio.create_task(singly.gather([1]))
    await asyncio.sleep(0.01)
    for gate in doubler.gates.values():
        gate.set()
    assert await staying == [4] and await again == [2]
    assert doubler.started == [1, 2, 1]


async def test_a_call_that_is_cancelled_before_it_starts_leaves_nothing(doubler: Doubler) -> None:
    singly = Singly(doubler)
    call = asyncio.create_task(singly.gather([1]))
    asyncio.get_running_loop().call_soon(call.cancel)
    with pytest.raises(asyncio.CancelledError):
        await call
    await singly.drain()
    assert singly.waiting == 0 and await singly.gather([1]) == [2]


async def test_draining_waits_for_everything(doubler: Doubler) -> None:
    singly = Singly(doubler)
    await singly.drain()
    doubler.gates[1] = asyncio.Event()
    call = asyncio.create_task(singly.gather([1, 2, 3]))
    await asyncio.sleep(0)
    draining = asyncio.create_task(singly.drain())
    await asyncio.sleep(0.01)
    assert not draining.done()
    doubler.gates[1].set()
    await draining
    assert doubler.ended == [2, 3, 1] and await call == [2, 4, 6]
