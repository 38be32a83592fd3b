"""A rate that is kept over every window of time, for services that count our requests."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Self

from verl.errors import ConfigError


class SlidingWindow:
    """Lets at most `limit` requests leave in any `window_s` seconds, in the order in which they asked.

        async with limiter.turn() as turn:
            ...  # send; call turn.sent() once the request has left

    A request is counted when it has left, or at the end of its turn where nobody says when it left. What it takes to
    connect lies before that: counted from the beginning of the turn, requests that wait for new connections and those
    that follow on open ones could reach the service in one window. And unlike a token bucket this never lets two
    windows' worth of requests leave around the border between them.

    One object limits one process and belongs to one event loop.
    """

    def __init__(
        self,
        limit: int,
        window_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Prepare a limit; nothing has left yet.

        Args:
            clock: seconds since some moment, never going back.
            sleep: waits for about as many seconds of `clock`.

        Raises:
            ConfigError: `limit` is below 1, or `window_s` is not above 0.
        """
        if limit < 1:
            raise ConfigError(f"rate limit of {limit} requests; expected at least 1")
        if not (math.isfinite(window_s) and window_s > 0):
            raise ConfigError(f"rate limit over {window_s} s; expected a positive number of seconds")
        self._window_s = window_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = [-math.inf] * limit
        self._held_until = -math.inf
        self._queue = asyncio.Lock()
        self._left = asyncio.Event()

    @classmethod
    def per_second(
        cls,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> Self:
        """Return the limit for `rate` requests in any second.

        A rate that is no whole number is kept by even spacing: 0.5 is one request in any two seconds, 2.5 one in any
        0.4 seconds.

        Raises:
            ConfigError: `rate` is not above 0.
        """
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"rate of {rate} requests a second; expected a positive number")
        limit = int(rate) if float(rate).is_integer() else 1
        return cls(limit, limit / rate, clock, sleep)

    def hold(self, seconds: float) -> None:
        """Let no turn begin for so many seconds, because the service asked for that (Retry-After)."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Wait until a request may be sent."""
        async with self._queue:
            place = await self._free_place()
            self._free_at[place] = math.inf
        turn = Turn(lambda: self._count(place))
        try:
            yield turn
        finally:
            if not turn.left:
                turn.sent()

    def _count(self, place: int) -> None:
        self._free_at[place] = self._clock() + self._window_s
        self._left.set()

    async def _free_place(self) -> int:
        while True:
            free_at, place = min((free_at, place) for place, free_at in enumerate(self._free_at))
            wait_s = max(free_at, self._held_until) - self._clock()
            if wait_s <= 0:
                return place
            if free_at < math.inf:
                await self._sleep(wait_s)
            else:  # as many as may leave are about to
                self._left.clear()
                await self._left.wait()


class Turn:
    """The right to send one request.

    Attributes:
        left: whether it was said that the request has left.
    """

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count
        self.left = False

    def sent(self) -> None:
        """Say that the request has left; the last time counts (a proxy gets a request of its own before)."""
        self.left = True
        self._count()
