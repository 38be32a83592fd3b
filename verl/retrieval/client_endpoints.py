"""Which endpoint a request goes to: the least busy one that is well and serves what the others serve."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from verl.errors import RetrieverError

logger = logging.getLogger(__name__)

Clock = Callable[[], float]


class Unavailable(Exception):
    """An endpoint could not be reached or could not answer; asking again, or another one, may help."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Endpoint:
    """One address and how it has been doing.

    Attributes:
        in_flight: requests on their way.
        last_turn: number of the last request that it got.
        resting_until: when it may be asked again.
        fingerprint: what it serves, None while that is not known (or it does not say).
        checked: whether it was asked for that since it last failed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.in_flight = 0
        self.last_turn = 0
        self.resting_until = 0.0
        self.fingerprint: str | None = None
        self.checked = False
        self._failures = 0
        self._ejected_at = 0.0

    def answered(self) -> None:
        """Note that it is well."""
        self._failures = 0

    def failed(self, now: float, sent_at: float, retry_after_s: float, pause_s: Callable[[int], float]) -> None:
        """Leave it alone for a time that doubles with every failure in a row, and at least for what it asked for.

        Requests that were on their way together fail together, and count as one failure.
        """
        if sent_at >= self._ejected_at:
            self._failures += 1
            self._ejected_at = now
            self.resting_until = now + pause_s(self._failures)
        self.resting_until = max(self.resting_until, now + retry_after_s)
        self.checked = False


class EndpointPool:
    """The endpoints of one client; belongs to one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        backoff_s: float,
        max_backoff_s: float,
        identify: Callable[[str], Awaitable[str | None]],
        clock: Clock = time.monotonic,
    ) -> None:
        """Prepare a pool; nothing is asked yet.

        Args:
            backoff_s: mean pause after a first failure.
            max_backoff_s: longest mean pause.
            identify: returns what an endpoint serves, None if it does not say; raises `Unavailable`.
        """
        self._endpoints = tuple(Endpoint(url) for url in urls)
        self._backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._identify = identify
        self._clock = clock
        self._checking = asyncio.Lock()
        self._mixture: str | None = None
        self._turn = 0
        self._jitter = random.Random()  # only spreads retries in time; no result depends on it

    def __str__(self) -> str:
        return ", ".join(endpoint.url for endpoint in self._endpoints)

    def choose(self) -> tuple[Endpoint, float]:
        """Return the endpoint to ask and for how many seconds to wait before, mostly 0."""
        now = self._clock()
        well = [endpoint for endpoint in self._endpoints if endpoint.resting_until <= now]
        if well:
            return min(well, key=lambda endpoint: (endpoint.in_flight, endpoint.last_turn)), 0.0
        soonest = min(self._endpoints, key=lambda endpoint: endpoint.resting_until)
        return soonest, soonest.resting_until - now

    @contextmanager
    def request(self, endpoint: Endpoint) -> Iterator[float]:
        """Count a request while it is on its way; give what the clock showed when it was sent."""
        self._turn += 1
        endpoint.last_turn = self._turn
        endpoint.in_flight += 1
        try:
            yield self._clock()
        finally:
            endpoint.in_flight -= 1

    def failed(self, endpoint: Endpoint, sent_at: float, retry_after_s: float) -> None:
        """Note that a request, sent when the clock showed `sent_at`, got no answer."""
        endpoint.failed(self._clock(), sent_at, retry_after_s, self._pause_s)

    async def check(self, endpoint: Endpoint) -> None:
        """Make sure that an endpoint which is to be asked serves what the others serve.

        A single endpoint is not asked. At the first call all are, so that a mixture shows before anything is used.

        Raises:
            Unavailable: it cannot say at the moment.
            RetrieverError: the endpoints serve different indexes.
        """
        if len(self._endpoints) == 1 or (endpoint.checked and self._mixture is None):
            return
        async with self._checking:
            if not any(other.checked for other in self._endpoints):
                others = [other for other in self._endpoints if other is not endpoint]
                await asyncio.gather(*(self._check_or_rest(other) for other in others))
            if not endpoint.checked:
                await self._check(endpoint)
        if self._mixture is not None:
            raise RetrieverError(self._mixture)

    async def _check_or_rest(self, endpoint: Endpoint) -> None:
        sent_at = self._clock()
        try:
            await self._check(endpoint)
        except Unavailable as cause:
            logger.warning("retriever %s: %s", endpoint.url, cause)
            self.failed(endpoint, sent_at, cause.retry_after_s)

    async def _check(self, endpoint: Endpoint) -> None:
        endpoint.fingerprint = await self._identify(endpoint.url)
        endpoint.checked = True
        known = [other for other in self._endpoints if other.checked]
        if len({other.fingerprint for other in known}) > 1:
            serving = "; ".join(f"{other.url} serves {_shown(other.fingerprint)}" for other in known)
            self._mixture = f"the retriever endpoints serve different indexes: {serving}; pass urls of one index"

    def _pause_s(self, failures: int) -> float:
        """Exponential backoff with jitter between half and one and a half of its mean."""
        mean = min(self._backoff_s * 2 ** min(failures - 1, 30), self._max_backoff_s)
        return min(mean * self._jitter.uniform(0.5, 1.5), self._max_backoff_s)


def _shown(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint is not None else "something that has no fingerprint"
