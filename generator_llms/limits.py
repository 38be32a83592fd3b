"""Bounds on requests and tokens over any 60 seconds, and on what a client may spend."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from generator_llms.replies import Completion
from verl.errors import GeneratorError

_WINDOW_S = 60.0
_LOOK_AGAIN_S = 1.0


@dataclass(slots=True)
class Sent:
    """A request; `tokens` is the most it can take until its reply says what it did, `counted` while in the window."""

    at: float
    tokens: int
    counted: bool = True


class RateLimiter:
    """A sliding window: at no time do the last 60 seconds hold more requests or tokens than allowed.

    Args:
        requests, tokens: per minute; None is no bound.
        clock, sleep: time, injected for tests.
    """

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._requests = requests
        self._tokens = tokens
        self._clock = clock
        self._sleep = sleep
        self._window: deque[Sent] = deque()
        self._used = 0
        self._turn = asyncio.Lock()

    async def admit(self, tokens: int) -> Sent:
        """Wait until a request of at most `tokens` fits; requests are admitted in the order of asking.

        Raises:
            GeneratorError: it is larger than a whole minute's tokens.
        """
        if self._tokens is not None and tokens > self._tokens:
            raise GeneratorError(
                f"one request may take {tokens} tokens, more than tokens_per_minute={self._tokens}; lower "
                "max_prompt_tokens or max_tokens, or raise the limit"
            )
        async with self._turn:
            while (wait := self._wait(tokens)) > 0:
                # Replies that turn out shorter than reserved make room before the oldest request leaves the window.
                await self._sleep(min(wait, _LOOK_AGAIN_S))
            sent = Sent(self._clock(), tokens)
            self._window.append(sent)
            self._used += tokens
            return sent

    def settle(self, sent: Sent, tokens: int) -> None:
        """Put what a request really took in the place of its reservation."""
        if sent.counted:
            self._used += tokens - sent.tokens
        sent.tokens = tokens

    def _wait(self, tokens: int) -> float:
        """Return the seconds until something leaves the window if `tokens` do not fit now, else 0."""
        now = self._clock()
        # One expression decides both who has left and how long to wait, or rounding could let one too many in.
        while self._window and (left := self._window[0].at + _WINDOW_S - now) <= 0:
            gone = self._window.popleft()
            gone.counted = False
            self._used -= gone.tokens
        fits = (self._requests is None or len(self._window) < self._requests) and (
            self._tokens is None or self._used + tokens <= self._tokens
        )
        return 0.0 if fits or not self._window else left


class Budget:
    """What was spent, and what the requests under way may still cost; the two never exceed `most`.

    Args:
        prompt_price, completion_price: of a million tokens.
        most: the bound; None is none.
    """

    def __init__(self, prompt_price: float, completion_price: float, most: float | None) -> None:
        self.spent = 0.0
        self._prices = (prompt_price / 1e6, completion_price / 1e6)
        self._most = most
        self._reserved = 0.0

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Set aside the most that a request can cost, and return it.

        Raises:
            GeneratorError: it might exceed the bound.
        """
        cost = self._cost(prompt_tokens, completion_tokens)
        if self._most is not None and self.spent + self._reserved + cost > self._most:
            raise GeneratorError(
                f"max_spend={self._most:g}: {self.spent:.6g} is spent, {self._reserved:.6g} set aside for requests "
                f"under way, and the next may cost {cost:.6g}; raise max_spend or ask less"
            )
        self._reserved += cost
        return cost

    def settle(self, reserved: float, completion: Completion | None) -> None:
        """Book what a request cost: by the reply's own count, all that was reserved where it gives none.

        Args:
            completion: None for a request that was not answered, which costs nothing.
        """
        self._reserved -= reserved
        if completion is None:
            return
        counted = completion.prompt_tokens or completion.completion_tokens
        self.spent += self._cost(completion.prompt_tokens, completion.completion_tokens) if counted else reserved

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]
