"""When a failed request is asked again: a window of time for an endpoint that is away, a count for unusable replies."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from verl.errors import GeneratorError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """The endpoint did not answer: connection, timeout, 429 or 5xx.

    Attributes:
        retry_after: seconds that the endpoint asked us to wait, or None.
    """

    def __init__(self, cause: str, retry_after: float | None = None) -> None:
        super().__init__(cause)
        self.retry_after = retry_after


class Malformed(Exception):
    """The endpoint answered something that cannot be used; another try may help."""


class Rejected(Exception):
    """The endpoint will not answer this request, however often it is asked."""


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds and pace of retries.

    Attributes:
        window_s: seconds after the first failure until an unavailable endpoint is given up.
        malformed_retries: unusable replies that are asked for again.
        first_wait_s: the first pause; each further one doubles up to `longest_wait_s`, times a jitter in [0.5, 1).
        clock, sleep, jitter: time and chance, injected for tests.
    """

    window_s: float
    malformed_retries: int
    first_wait_s: float = 0.25
    longest_wait_s: float = 8.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random

    async def run(self, call: Callable[[], Awaitable[T]], where: str, on_retry: Callable[[], None]) -> T:
        """Return what `call` returns, within the bounds.

        Args:
            where: the endpoint, for messages.
            on_retry: told about every retry, to count it.

        Raises:
            GeneratorError: the bounds are reached or the request is rejected; carries the endpoint and the last cause.
        """
        first_failure: float | None = None
        attempts = unusable = 0
        while True:
            try:
                return await call()
            except Rejected as cause:
                raise GeneratorError(f"{where}: {cause}") from cause
            except Malformed as cause:
                unusable += 1
                if unusable > self.malformed_retries:
                    raise GeneratorError(f"{where} gave no usable reply in {unusable} tries: {cause}") from cause
                error, wait = cause, self._pause(attempts)
            except Unavailable as cause:
                error, wait = cause, max(self._pause(attempts), cause.retry_after or 0.0)
            now = self.clock()
            first_failure = now if first_failure is None else first_failure
            attempts += 1
            if now + wait > first_failure + self.window_s:
                raise GeneratorError(
                    f"{where} failed {attempts} times within the retry window of {self.window_s:g} s: {error}; check "
                    "that it runs, or raise retry_window_s"
                ) from error
            logger.debug("%s: %s; asking again in %.2f s", where, error, wait)
            on_retry()
            await self.sleep(wait)

    def _pause(self, attempts: int) -> float:
        # The exponent is bounded, so that a long window cannot overflow the float.
        longest = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(attempts, 32))
        return longest * (0.5 + 0.5 * self.jitter())


def parse_retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or an HTTP date; None if it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
