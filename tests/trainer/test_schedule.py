"""When rollouts start: in turn, or one step ahead of the update."""

from __future__ import annotations

import threading

import pytest

from verl.trainer.schedule import Ahead, InTurn, schedule


class Roller:
    """Rolls out when it is let; counts questions taken, five a step."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.taken = 0
        self.gate = threading.Event()
        self.gate.set()

    def roll(self, step: int) -> str:
        self.begun.append(step)
        self.taken += 5
        self.gate.wait(10)
        return f"rollout {step}"

    def state(self) -> dict[str, int]:
        return {"taken": self.taken}


def test_in_turn_rolls_out_when_asked() -> None:
    roller = Roller()
    plan = schedule("sync", roller.roll, roller.state, last_step=3)
    assert isinstance(plan, InTurn)
    assert plan.take(1) == "rollout 1"
    assert (roller.begun, plan.source_state()) == ([1], {"taken": 5})
    plan.settle()
    assert roller.begun == [1]


@pytest.mark.parametrize("mode", ["one_step_off", "async"])
def test_ahead_hands_out_every_step_once_and_stops_at_the_last(mode: str) -> None:
    roller = Roller()
    plan = schedule(mode, roller.roll, roller.state, last_step=3)
    assert [plan.take(step) for step in (1, 2, 3)] == ["rollout 1", "rollout 2", "rollout 3"]
    plan.settle()
    assert roller.begun == [1, 2, 3]


def test_ahead_saves_the_source_as_it_was_before_the_next_rollout() -> None:
    roller = Roller()
    plan = Ahead(roller.roll, roller.state, 3, finish_before_publish=True)
    plan.take(1)
    plan.settle()
    assert (roller.taken, plan.source_state()) == (10, {"taken": 5})


def test_one_step_off_publishes_only_when_the_next_rollout_is_done() -> None:
    roller = Roller()
    plan = Ahead(roller.roll, roller.state, 3, finish_before_publish=True)
    plan.take(1)
    roller.gate.clear()
    plan.take(2)  # the rollout of step 3 is held up now
    settled = threading.Event()
    waiter = threading.Thread(target=lambda: (plan.settle(), settled.set()))
    waiter.start()
    assert not settled.wait(0.1)
    roller.gate.set()
    assert settled.wait(10)
    waiter.join()


def test_async_publishes_while_the_next_rollout_runs() -> None:
    roller = Roller()
    plan = Ahead(roller.roll, roller.state, 3, finish_before_publish=False)
    plan.take(1)
    roller.gate.clear()
    plan.take(2)
    plan.settle()  # returns although the rollout of step 3 is held up
    roller.gate.set()
    assert plan.take(3) == "rollout 3"


def test_a_failed_rollout_is_raised_where_it_is_taken() -> None:
    def roll(step: int) -> str:
        if step == 2:
            raise RuntimeError("no engine")
        return "fine"

    plan = Ahead(roll, dict, 3, finish_before_publish=True)
    assert plan.take(1) == "fine"
    plan.settle()
    with pytest.raises(RuntimeError, match="no engine"):
        plan.take(2)
