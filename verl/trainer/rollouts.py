"""Questions out to the rollout workers, samples back, through one queue: a slow worker does not stall a fast one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from verl.agent.loop import derive_seed
from verl.agent.protocols import Sampling
from verl.errors import WorkerError
from verl.single_controller import sync
from verl.single_controller.placement import HardwareConfig
from verl.single_controller.worker_group import Placed, WorkerGroup
from verl.types import Question
from verl.workers.engines import EngineConfig
from verl.workers.rollout import RolloutWorker, Sample, Surroundings
from verl.workers.weight_sync import Transport

START_SECONDS = 600.0
STOP_SECONDS = 30.0
# Far beyond what a question takes, all of the clients' retry windows included.
STALL_SECONDS = 3600.0

Progress = Callable[[int], None]


class Rollouts(Protocol):
    """What plays questions with the present policy: a `RolloutPool`, or a fake."""

    @property
    def version(self) -> int:
        """Version of the weights that sample now."""
        ...

    def collect(
        self, questions: Sequence[Question], samples: int, sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Sample]]:
        """Play every question `samples` times; result i belongs to questions[i]."""
        ...

    def publish(self, version: int) -> None:
        """Sample from the actor's present weights from now on, as `version`."""
        ...


@dataclass
class RolloutPool:
    """The rollout workers, as Ray actor handles.

    Attributes:
        in_flight: trajectories that one worker holds at a time.
        sleeps: engines share their devices with the training and give the memory back between rollouts.
        stall_seconds: a rollout of which nothing ends for so long hangs, and is given up.
    """

    group: WorkerGroup
    in_flight: int
    sleeps: bool = False
    stall_seconds: float = STALL_SECONDS
    _version: int = field(default=0, init=False)
    _train: WorkerGroup | None = field(default=None, init=False)
    _transport: Transport = field(default="copy", init=False)

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
        return cls(group, in_flight, engine.sleeps)

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
            WorkerError: a worker died, failed or hangs.
        """
        with self._on_the_device():
            return self._collect(questions, samples, sampling, progress)

    def _collect(
        self, questions: Sequence[Question], samples: int, sampling: Sampling, progress: Progress | None
    ) -> list[list[Sample]]:
        waiting = iter(enumerate(questions))
        groups_each = max(1, self.in_flight // samples)
        running: dict[Any, tuple[int, int]] = {}
        results: dict[int, list[Sample]] = {}
        # Round by round, so that few questions spread over all workers.
        workers = [worker for _ in range(groups_each) for worker in range(len(self.group))]
        for worker, (index, question) in zip(workers, waiting, strict=False):
            running[self._submit(worker, index, question, samples, sampling)] = (index, worker)
        while running:
            ended, _ = ray.wait(list(running), num_returns=1, timeout=self.stall_seconds)
            if not ended:
                hanging = sorted({worker for _, worker in running.values()})
                raise self.group.fail(f"rollout workers {hanging} finished no question in {self.stall_seconds:g} s")
            (done,) = ended
            index, worker = running.pop(done)
            results[index] = self._result(done, worker)
            if progress:
                progress(len(results[index]))
            for later, question in itertools.islice(waiting, 1):
                running[self._submit(worker, later, question, samples, sampling)] = (later, worker)
        return [results[index] for index in range(len(questions))]

    def connect(self, train: WorkerGroup, transport: Transport, hardware: HardwareConfig) -> None:
        """Prepare the way from the training workers' weights to the engines; see `verl.workers.weight_sync`."""
        self._train, self._transport = train, transport
        sync.connect(train, self.group, transport, hardware.devices_per_engine)

    def publish(self, version: int) -> None:
        """Make every engine sample from the actor's weights, as `version`; returns when all do.

        Raises:
            WorkerError: a worker failed.
        """
        if self._train is None:
            raise RuntimeError("publish before connect; connect the training workers first")
        if self.sleeps:
            self.group.call("wake", ["weights"])
        sync.publish(self._train, self.group, self._transport, version)
        if self.sleeps:
            self.group.call("sleep")
        self._version = version

    @contextmanager
    def _on_the_device(self) -> Iterator[None]:
        """Where engines and training share devices, let the engines have the memory for the duration of the block."""
        if not self.sleeps or self._train is None:
            yield
            return
        self._train.call("sleep")
        self.group.call("wake", ["weights", "kv_cache"])
        yield
        self.group.call("sleep")

    @property
    def version(self) -> int:
        """Version of the weights that sample now."""
        return self._version

    def close(self) -> None:
        """Stop the engines and end the workers; those that have died already are left as they are."""
        with suppress(WorkerError):
            self.group.start("close").result(STOP_SECONDS)
        self.group.close()

    def _result(self, ref: Any, worker: int) -> list[Sample]:
        try:
            return ray.get(ref)
        except RayError as cause:
            raise self.group.fail(f"rollout worker {worker} failed or died: {cause}") from cause

    def _submit(self, worker: int, index: int, question: Question, samples: int, sampling: Sampling) -> Any:
        seeds = [derive_seed(sampling.seed, index * samples + k) for k in range(samples)]
        return self.group.handles[worker].call.remote("sample", question, seeds, sampling)


def flat(groups: Sequence[Sequence[Sample]]) -> Iterator[Sample]:
    """Yield the samples of all groups, in order."""
    return itertools.chain.from_iterable(groups)
