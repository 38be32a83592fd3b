"""Questions out to several workers and samples back, over a real Ray with workers that only pretend to play."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from tests.trainer.fakes import question, sample
from verl.agent.loop import derive_seed
from verl.agent.protocols import Sampling
from verl.errors import WorkerError
from verl.single_controller.cluster import RayConfig, cluster
from verl.single_controller.placement import HardwareConfig, ResourcePool
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.rollouts import RolloutPool, flat
from verl.types import Question
from verl.workers.rollout import Sample

SAMPLING = Sampling(seed=11)


class Player:
    """Scores a sample by its seed and says through `seconds` which worker played it; some questions are special."""

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.running = 0
        self.most = 0

    async def sample(self, asked: Question, seeds: Sequence[int | None], sampling: Sampling) -> list[Sample]:
        """Play, after a moment in which others may come in."""
        self.running += len(seeds)
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.5 if asked.text == "Who is slow?" else 0.01)
        self.running -= len(seeds)
        if asked.text == "Who is deadly?":
            os._exit(1)
        if asked.text == "Who is stuck?":
            await asyncio.Event().wait()
        return [sample(float(seed or 0), asked, seconds=float(self.rank)) for seed in seeds]

    async def most_at_a_time(self) -> int:
        """Return how many trajectories this worker has held at most since the last call."""
        most, self.most = self.most, 0
        return most

    async def close(self) -> None:
        """Nothing to release."""


@pytest.fixture(scope="module")
def resources() -> Iterator[ResourcePool]:
    """Room for two rollout workers on a local Ray."""
    hardware = HardwareConfig(devices_per_node=2)
    with cluster(RayConfig(object_store_gib=0.25, log_to_driver=False), hardware):
        pool = ResourcePool(hardware)
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def pool(resources: ResourcePool) -> Iterator[RolloutPool]:
    """Two workers that hold four trajectories each; the last test ends them."""
    started = RolloutPool(WorkerGroup(Player, (), resources.placed("rollout")), in_flight=4)
    yield started
    started.close()


def scores(groups: list[list[Sample]]) -> list[float]:
    return [played.outcome.score for played in flat(groups)]


def test_results_come_in_the_order_of_the_questions_with_a_seed_per_sample(pool: RolloutPool) -> None:
    seen: list[int] = []
    asked = [question("slow"), *(question(f"Q{n}") for n in range(9))]
    groups = pool.collect(asked, 2, SAMPLING, seen.append)
    assert [[s.trajectory.question.id for s in group] for group in groups] == [[q.id] * 2 for q in asked]
    assert scores(groups) == [derive_seed(11, n) for n in range(20)]
    assert seen == [2] * 10
    assert scores(pool.collect(asked[:2], 2, SAMPLING)) == scores(groups)[:4], "whichever worker plays it"
    assert scores(pool.collect(asked[:1], 2, Sampling())) == [0, 0], "no seed stays no seed"
    assert pool.collect([], 2, SAMPLING) == []


def test_few_questions_spread_over_all_workers_and_a_slow_one_stalls_only_its_own(pool: RolloutPool) -> None:
    spread = Counter(s.seconds for s in flat(pool.collect([question("A"), question("B")], 2, SAMPLING)))
    assert spread == {0.0: 2, 1.0: 2}
    asked = [question("slow"), question("A"), question("slow"), *(question(f"Q{n}") for n in range(8))]
    pool.group.call("most_at_a_time")
    groups = pool.collect(asked, 2, SAMPLING)
    # Worker 0 holds both slow ones (four trajectories), so worker 1 plays all the rest.
    assert [group[0].seconds for group in groups] == [0, 1, 0] + [1] * 8
    assert pool.group.call("most_at_a_time") == [4, 4]


def test_more_samples_than_in_flight_are_still_played(pool: RolloutPool) -> None:
    assert len(pool.collect([question("A")], 6, SAMPLING)[0]) == 6


def test_weights_cannot_be_published_before_the_trainers_are_connected(pool: RolloutPool) -> None:
    with pytest.raises(RuntimeError, match="connect the training workers first"):
        pool.publish(1)
    assert pool.version == 0


def test_a_worker_that_dies_is_one_error_and_what_is_left_can_still_be_closed(pool: RolloutPool) -> None:
    with pytest.raises(WorkerError, match=r"rollout worker [01] failed or died"):
        pool.collect([question("A"), question("deadly"), question("B")], 1, SAMPLING)
    with pytest.raises(WorkerError, match="has ended"):
        pool.group.call("most_at_a_time")
    pool.close()


def test_a_worker_that_hangs_is_one_error(resources: ResourcePool) -> None:
    pool = RolloutPool(WorkerGroup(Player, (), resources.placed("rollout")), in_flight=4, stall_seconds=1.0)
    with pytest.raises(WorkerError, match=r"rollout workers \[1\] finished no question in 1 s"):
        pool.collect([question("A"), question("stuck"), question("B")], 1, SAMPLING)
    pool.close()
