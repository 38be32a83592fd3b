"""Several endpoints as one: each request goes where the fewest are in flight, and an endpoint that fails is rested."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from generator_llms.backend import Backend

_FIRST_REST_S = 1.0
_LONGEST_REST_S = 30.0


@dataclass(slots=True)
class Lane:
    """One endpoint and what is known of it.

    Attributes:
        in_flight: requests that hold one of its slots.
        served: requests it got so far.
        failures: times that it failed since its last answer; 0 is healthy.
        rested_until: time before which it gets no request as long as another endpoint is healthy.
    """

    backend: Backend
    in_flight: int = 0
    served: int = 0
    failures: int = 0
    rested_until: float = 0.0


class Pool:
    """Slots on endpoints, handed out in the order of asking.

    An endpoint that did not answer rests, twice as long each time, and is then tried with a single request. Where none
    is healthy all are used, so that the callers' own bounds of patience hold.

    Args:
        concurrency: slots of each endpoint.
        clock: seconds; the event loop's timers must follow it.
    """

    def __init__(
        self, backends: Sequence[Backend], concurrency: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lanes = [Lane(backend) for backend in backends]
        self._concurrency = concurrency
        self._clock = clock
        self._waiting: deque[asyncio.Future[Lane]] = deque()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Lane]:
        """Hold a slot of the endpoint that suits best; waits for one."""
        lane = await self._acquire()
        try:
            yield lane
        finally:
            self._release(lane)

    def answered(self, lane: Lane) -> None:
        """Note that an endpoint answered, whatever it said."""
        lane.failures = 0
        lane.rested_until = 0.0

    def failed(self, lane: Lane, retry_after: float | None) -> bool:
        """Rest an endpoint that did not answer, at least as long as it asked for.

        Returns:
            Whether another endpoint is healthy, so that the caller need not wait for this one.
        """
        now = self._clock()
        until = now + (retry_after or 0.0)
        if not lane.failures or lane.rested_until <= now:  # all that was in flight fails at once and counts once
            until = max(until, now + min(_LONGEST_REST_S, _FIRST_REST_S * 2.0 ** min(lane.failures, 32)))
            lane.failures += 1
        if until > lane.rested_until:
            lane.rested_until = until
            # Who waits then may not have to wait until a healthy endpoint has a free slot.
            asyncio.get_running_loop().call_later(until - now, self._wake)
        return any(not other.failures for other in self.lanes)

    async def _acquire(self) -> Lane:
        # Nobody overtakes those who wait.
        lane = None if self._waiting else self._best()
        if lane is not None:
            return self._taken(lane)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # it was given a slot in the moment it gave up
                self._release(future.result())
            raise

    def _release(self, lane: Lane) -> None:
        lane.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        """Hand free slots to those who wait, first come first served."""
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
                continue
            lane = self._best()
            if lane is None:
                return
            self._waiting.popleft().set_result(self._taken(lane))

    def _best(self) -> Lane | None:
        """Return the endpoint that the next request goes to; None if it has to wait."""
        healthy = [lane for lane in self.lanes if not lane.failures]
        if healthy:
            now = self._clock()
            tried = [lane for lane in self.lanes if lane.failures and not lane.in_flight and lane.rested_until <= now]
            usable = [lane for lane in healthy if lane.in_flight < self._concurrency] + tried
        else:
            usable = [lane for lane in self.lanes if lane.in_flight < self._concurrency]
        return min(usable, key=lambda lane: (lane.in_flight, lane.served), default=None)

    def _taken(self, lane: Lane) -> Lane:
        lane.in_flight += 1
        lane.served += 1
        return lane
