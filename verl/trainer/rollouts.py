"""Questions out to the rollout workers, samples back, through one queue: a slow worker does not stall a fast one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from verl.agent.loop import derive_seed
from verl.agent.protocols import Sampling
from verl.single_controller.worker_group import Placed, WorkerGroup
from verl.types import Question
from verl.workers.engines import EngineConfig
from verl.workers.rollout import RolloutWorker, Sample, Surroundings

START_SECONDS = 600.0

Progress = Callable[[int], None]


@dataclass
class Usage:
    """What one collection cost: seconds summed over trajectories, and policy tokens."""

    search_seconds: float = 0.0
    reward_seconds: float = 0.0
    seconds: float = 0.0
    policy_tokens: int = 0
    dropped_documents: int = 0

    def add(self, sample: Sample) -> None:
        """Add one trajectory."""
        self.search_seconds += sample.search_seconds
        self.reward_seconds += sample.reward_seconds
        self.seconds += sample.seconds
        for turn in sample.trajectory.turns:
            self.dropped_documents += turn.dropped
            self.policy_tokens += sum(len(segment.ids) for segment in turn.segments if segment.logprobs)


@dataclass
class RolloutPool:
    """The rollout workers, as Ray actor handles.

    Attributes:
        in_flight: trajectories that one worker holds at a time.
    """

    group: WorkerGroup
    in_flight: int
    _version: int = field(default=0, init=False)

    @classmethod
    def start(
        cls, engine: EngineConfig, surroundings: Callable[[], Surroundings], placed: Placed, in_flight: int
    ) -> RolloutPool:
        """Start the workers and load their engines.

        Raises:
            WorkerError: an engine could not start.
        """
        group = WorkerGroup(RolloutWorker, (engine, surroundings), placed, timeout=START_SECONDS)
        group.call("start")
        return cls(group, in_flight)

    def collect(
        self,
        questions: Sequence[Question],
        samples: int,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """Play every question `samples` times; result i belongs to questions[i].

        Each worker holds about `in_flight` trajectories and pulls the next question when one of its own is done.
        With `sampling.seed` set, sample k of question i always gets the same seed, whichever worker plays it.

        Raises:
            WorkerError: a worker died or failed.
        """
        waiting = iter(enumerate(questions))
        groups_each = max(1, self.in_flight // samples)
        running: dict[Any, tuple[int, int]] = {}
        results: dict[int, list[Sample]] = {}
        for worker in range(len(self.group)):
            for index, question in itertools.islice(waiting, groups_each):
                running[self._submit(worker, index, question, samples, sampling)] = (index, worker)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            index, worker = running.pop(done)
            results[index] = self.group.get(done, worker, "sample")
            if progress:
                progress(len(results[index]))
            for later, question in itertools.islice(waiting, 1):
                running[self._submit(worker, later, question, samples, sampling)] = (later, worker)
        return [results[index] for index in range(len(questions))]

    def update_weights(self, weights: dict[str, Any], version: int) -> None:
        """Give every worker the new weights (one copy through the object store) and wait until all have them."""
        self.group.call("update_weights", weights, version)
        self._version = version

    @property
    def version(self) -> int:
        """Version of the weights that sample now."""
        return self._version

    def close(self) -> None:
        """Stop the engines."""
        self.group.call("close")

    def _submit(self, worker: int, index: int, question: Question, samples: int, sampling: Sampling) -> Any:
        seeds = [derive_seed(sampling.seed, index * samples + k) for k in range(samples)]
        return self.group.handles[worker].call.remote("sample", question, seeds, sampling)


def flat(groups: Sequence[Sequence[Sample]]) -> Iterator[Sample]:
    """Yield the samples of all groups, in order."""
    return itertools.chain.from_iterable(groups)
