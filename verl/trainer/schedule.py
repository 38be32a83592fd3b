"""When the next rollout starts; the only thing in which the modes of training differ.

* `sync`: after the update. Strictly on-policy, and the only mode whose resumed run equals an unbroken one to the bit.
* `one_step_off`: while the update runs, with the weights before it; new weights wait until that rollout is done. Every
  token is one version old.
* `async`: the same, but new weights go in at once, between two generations, and trajectories go on under them. Tokens
  carry the version that sampled them and are at most one version old.

In the last two the sampling policy is not the one that is updated; `actor.loss.tis_cap` weighs the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Literal, Protocol, TypeVar

Mode = Literal["sync", "one_step_off", "async"]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
State = Mapping[str, Any]


class Schedule(Protocol[T_co]):
    """Hands out each step's rollout."""

    def take(self, step: int) -> T_co:
        """Return the rollout of `step`; steps come in order."""
        ...

    def settle(self) -> None:
        """Called before new weights are published."""
        ...

    def source_state(self) -> State:
        """Return the state of the question source with which the next step begins."""
        ...


class InTurn(Generic[T]):
    """`sync`: roll out when asked."""

    def __init__(self, roll: Callable[[int], T], state: Callable[[], State]) -> None:
        self._roll = roll
        self._state = state

    def take(self, step: int) -> T:
        return self._roll(step)

    def settle(self) -> None:
        return

    def source_state(self) -> State:
        return self._state()


class Ahead(Generic[T]):
    """`one_step_off` and `async`: the next rollout runs in a thread while this one is learned from."""

    def __init__(
        self, roll: Callable[[int], T], state: Callable[[], State], last_step: int, finish_before_publish: bool
    ) -> None:
        self._roll = roll
        self._state = state
        self._last_step = last_step
        self._finish = finish_before_publish
        self._thread = ThreadPoolExecutor(1, "rollout")
        self._next: Future[T] | None = None
        self._before_next: State = {}

    def take(self, step: int) -> T:
        """Return the rollout of `step`, and start that of the next step unless there is none.

        Raises:
            Exception: whatever the rollout raised.
        """
        rolled = self._next.result() if self._next else self._roll(step)
        self._before_next = self._state()
        self._next = self._thread.submit(self._roll, step + 1) if step < self._last_step else None
        return rolled

    def settle(self) -> None:
        if self._finish and self._next:
            self._next.exception()

    def source_state(self) -> State:
        return self._before_next


def schedule(mode: Mode, roll: Callable[[int], T], state: Callable[[], State], last_step: int) -> Schedule[T]:
    """Return the schedule that `mode` names."""
    if mode == "sync":
        return InTurn(roll, state)
    return Ahead(roll, state, last_step, finish_before_publish=mode == "one_step_off")
