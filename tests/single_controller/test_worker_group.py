from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.single_controller.test_dispatch import batch_of
from verl.batch import Batch
from verl.errors import ConfigError, WorkerError
from verl.single_controller.placement import HardwareConfig, Placed, ResourcePool
from verl.single_controller.sync import publish
from verl.single_controller.worker_group import WorkerGroup

pytestmark = pytest.mark.integration


class Counter:
    """A worker that knows its rank and can fail in several ways."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise ConfigError(f"start={start} is negative")
        self._rank = int(os.environ["RANK"])
        self._total = start

    def surroundings(self) -> dict[str, str]:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GREETING")
        return {name: os.environ[name] for name in names}

    def add(self, number: int, times: int = 1) -> int:
        self._total += number * times
        return self._total

    def tagged(self, batch: Batch) -> dict[str, Tensor | int]:
        return {"tokens": batch.input_ids, "row_count": len(batch)}

    def fail(self, rank: int) -> None:
        if self._rank == rank:
            raise ZeroDivisionError("as asked")
        wait_in_vain()

    def die(self, rank: int) -> None:
        if self._rank == rank:
            os._exit(1)
        wait_in_vain()

    def collect_weights(self) -> dict[str, Tensor]:
        return {"w": torch.full((2,), 7.0)} if self._rank == 0 else {}


def wait_in_vain() -> None:
    """Stand for a collective that the failed worker never joins."""
    threading.Event().wait(60)


def alone(pool: ResourcePool) -> Placed:
    """One worker is enough."""
    return replace(pool.placed("train"), slots=pool.placed("train").slots[:1])


class Meeting:
    """A worker whose calls run concurrently, as a rollout's do."""

    def __init__(self) -> None:
        self._everyone = asyncio.Event()
        self.weights: dict[str, Tensor] = {}

    async def wait(self) -> str:
        await self._everyone.wait()
        return "met"

    async def arrive(self) -> None:
        self._everyone.set()

    async def update_weights(self, weights: dict[str, Tensor], version: int) -> None:
        self.weights = weights | {"version": torch.tensor(version)}

    def held(self) -> dict[str, Tensor]:
        return self.weights


def test_workers_know_their_place_and_answer_by_rank(pool: ResourcePool) -> None:
    group = WorkerGroup(Counter, (10,), pool.placed("train"))
    first, second = group.call("surroundings")
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert first["LOCAL_RANK"] == second["LOCAL_RANK"] == "0"
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and first["MASTER_ADDR"] == second["MASTER_ADDR"]
    assert first["GREETING"] == "hello"
    assert group.call("add", 3, times=2) == [16, 16]
    assert group.start_each("add", [(1,), (2,)]).result() == [17, 18]
    assert [endpoint.call("add", 0) for endpoint in group.endpoints()] == [17, 18]
    batch = batch_of([3, 9, 1, 4], 12)
    merged = group.dispatch("tagged", batch)
    assert torch.equal(merged["tokens"], batch.input_ids)
    assert merged["row_count"] == 4
    with pytest.raises(WorkerError, match="no method 'ad'; it has add"):
        group.call("ad")
    group.close()
    with pytest.raises(WorkerError, match="it was closed"):
        group.call("add", 1)


def test_a_failure_carries_the_workers_traceback_and_ends_the_group(pool: ResourcePool) -> None:
    group = WorkerGroup(Counter, (0,), pool.placed("train"))
    with pytest.raises(WorkerError, match=r"(?s)worker 1 failed in 'fail'.*in fail.*ZeroDivisionError: as asked"):
        group.call("fail", 1)  # rank 0 would wait for a minute
    with pytest.raises(WorkerError, match="has ended"):
        group.call("add", 1)


def test_a_death_is_an_error(pool: ResourcePool) -> None:
    group = WorkerGroup(Counter, (0,), pool.placed("train"))
    with pytest.raises(WorkerError, match="worker 1 died during 'die'"):
        group.call("die", 1)


def test_a_constructor_that_fails_is_an_error(pool: ResourcePool) -> None:
    with pytest.raises(WorkerError, match=r"(?s)__init__.*start=-1 is negative"):
        WorkerGroup(Counter, (-1,), alone(pool))


def test_a_late_answer_is_an_error(pool: ResourcePool) -> None:
    group = WorkerGroup(Meeting, (), alone(pool))
    with pytest.raises(WorkerError, match=r"workers \[0\] did not answer 'wait' within 0.2 s"):
        group.start("wait").result(timeout=0.2)


def test_coroutines_run_concurrently_and_take_weights_from_other_workers(pool: ResourcePool) -> None:
    train = WorkerGroup(Counter, (0,), pool.placed("train"))
    rollout = WorkerGroup(Meeting, (), pool.placed("rollout"))
    waiting = rollout.start("wait")
    rollout.call("arrive")
    assert waiting.result(timeout=30) == ["met", "met"]
    publish(train, rollout, "copy", 3)
    for held in rollout.call("held"):
        assert held["w"].tolist() == [7.0, 7.0] and held["version"] == 3
    train.close()
    rollout.close()


def test_a_cluster_that_is_too_small_is_refused(pool: ResourcePool) -> None:
    with pytest.raises(ConfigError, match="1 GPUs, but there are 0"):
        ResourcePool(HardwareConfig("cuda", cpus_per_worker=0))
