"""The run around the step: start the workers, resume, train, validate, save, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from verl.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from verl.batch import Batch, TrainBatch
from verl.config import to_dict, to_yaml
from verl.errors import WorkerError
from verl.evaluation.journal import write_whole
from verl.single_controller.cluster import cluster
from verl.single_controller.placement import ResourcePool
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer import preflight
from verl.trainer.checkpoint import Checkpoint, Checkpoints, find
from verl.trainer.config import TrainConfig
from verl.trainer.data import Shuffled, training_questions, validation_questions
from verl.trainer.estimate import AlgorithmConfig
from verl.trainer.rollouts import RolloutPool, Rollouts
from verl.trainer.schedule import State
from verl.trainer.sentinel import Sentinel
from verl.trainer.step import Learners, StepConfig, Stepper
from verl.trainer.surroundings import ServiceSurroundings
from verl.trainer.tracking import Tracker
from verl.trainer.validate import Validator
from verl.types import Question
from verl.workers.engines import EngineConfig
from verl.workers.train_worker import TrainWorker, TrainWorkerConfig
from verl.workers.weight_sync import Transport, choose_transport

logger = logging.getLogger(__name__)


class SavedLearners(Learners, Protocol):
    """Learners whose state can be written and restored."""

    def save(self, folder: Path) -> None:
        """Write the shards of models, optimizers, schedules and random states."""
        ...

    def load(self, folder: Path) -> None:
        """Load what `save` wrote."""
        ...

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format."""
        ...


Workers = Callable[[TrainConfig], AbstractContextManager[tuple[SavedLearners, Rollouts]]]
"""Starts what trains and what plays, for the duration of a block; raises WorkerError when a worker dies."""


@dataclass(frozen=True)
class RayLearners:
    """The `Learners` of a step, as a group of training workers."""

    group: WorkerGroup
    tokenizer: str

    def actor_log_probs(self, batch: Batch) -> Tensor:
        return self.group.dispatch("actor_log_probs", batch)

    def ref_log_probs(self, batch: Batch) -> Tensor:
        return self.group.dispatch("ref_log_probs", batch)

    def values(self, batch: Batch) -> Tensor:
        return self.group.dispatch("values", batch)

    def update_actor(self, batch: TrainBatch) -> Mapping[str, float]:
        return self.group.call("update_actor", batch)[0]

    def update_critic(self, batch: TrainBatch) -> Mapping[str, float]:
        return self.group.call("update_critic", batch)[0]

    def save(self, folder: Path) -> None:
        """Write every rank's shards of models, optimizers, schedules and random states."""
        self.group.call("save_checkpoint", folder)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, on this number of ranks."""
        self.group.call("load_checkpoint", folder)

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format."""
        self.group.call("export_hf", folder, self.tokenizer)


@dataclass(frozen=True)
class Summary:
    """What a finished run was: the `training` entry of a report."""

    algorithm: str
    steps: int
    questions: int
    trajectories: int
    seconds: float


@contextmanager
def ray_workers(config: TrainConfig) -> Iterator[tuple[SavedLearners, Rollouts]]:
    """Run Ray with the training workers and the rollout workers for the duration of the block."""
    surroundings = ServiceSurroundings(
        config.model.path,
        config.search,
        config.retriever,
        config.generator,
        config.reward,
        config.judge,
        config.judge_generator,
        config.literature,
        config.hardware.engines,
    )
    worker_config = TrainWorkerConfig(
        actor=config.actor,
        reference=config.reference if config.uses_reference else None,
        critic=config.critic if config.algorithm.needs_critic else None,
        device=config.hardware.device,
        threads=config.hardware.threads_per_worker,
        seed=config.trainer.seed,
    )
    hardware = config.hardware
    engine, transport = _engine(config)
    with cluster(config.ray, hardware), closing(ResourcePool(hardware)) as resources:
        rollout, in_flight = resources.placed("rollout"), config.rollout.in_flight
        with closing(RolloutPool.start(engine, surroundings, rollout, in_flight)) as pool:
            group = WorkerGroup(TrainWorker, (worker_config,), resources.placed("train"))
            pool.connect(group, transport, hardware)
            yield RayLearners(group, config.model.path), pool


def _engine(config: TrainConfig) -> tuple[EngineConfig, Transport]:
    """Return the engine as the hardware wants it, and how weights reach it."""
    hardware = config.hardware
    if config.engine.kind == "hf":
        return config.engine, "copy"
    transport = choose_transport(hardware.device, hardware.colocate)
    engine = replace(
        config.engine,
        weight_transfer="file" if transport == "copy" else transport,
        sleeps=hardware.device == "cuda" and hardware.colocate,
    )
    return engine, transport


def train(config: TrainConfig, workers: Workers = ray_workers) -> Summary:
    """Run a whole training, taking it up again from the last checkpoint when a worker dies.

    Raises:
        ConfigError, DataError, CheckpointError: found before any process starts.
        RunStopped: services failed or updates broke beyond the limits; the last checkpoint is whole.
        WorkerError: a worker died more often than `trainer.max_restarts` allows.
    """
    run_config, restarts = config.trainer, 0
    questions = [] if run_config.val_only else training_questions(config.data)
    config = config if run_config.val_only else config.over(len(questions))
    held_out = validation_questions(config.data)
    preflight.check(config, [*questions, *held_out])
    checkpoints = Checkpoints(run_config.folder / "checkpoints", run_config.checkpoint)
    # A validation alone leaves the checkpoints as they are.
    start = find(run_config.resume, checkpoints) if run_config.val_only else checkpoints.begin(run_config.resume)
    if not run_config.val_only:
        write_whole(run_config.folder / "config.yaml", to_yaml(config.recorded()))
    while True:
        run = _Run(config, questions, held_out, checkpoints, start)
        try:
            with workers(config) as (learners, pool):
                return run.go(learners, pool)
        except WorkerError as error:
            restarts += 1
            if restarts > run_config.max_restarts:
                raise
            logger.warning("%s; restart %d of %d", error, restarts, run_config.max_restarts)
            start = start if run_config.val_only else checkpoints.latest() or start


class _Run:
    """One attempt at a run: the driver's state, from the start or as a checkpoint left it."""

    def __init__(
        self,
        config: TrainConfig,
        questions: list[Question],
        held_out: list[Question],
        checkpoints: Checkpoints,
        start: Checkpoint | None,
    ) -> None:
        """Restore what `start` holds of the driver.

        Raises:
            ConfigError: `start` was trained on other questions.
        """
        run = config.trainer
        self.config, self.checkpoints, self.start = config, checkpoints, start
        self.source = Shuffled(questions, config.data.seed, config.data.shuffle)
        self.kl = _kl_controller(config.algorithm)
        self.sentinel = Sentinel(run.sentinel)
        self.totals = {"trajectories": 0.0, "seconds": 0.0}
        self.validator = Validator(
            held_out, config.rollout.evaluation(run.seed), run.folder / "validation", self.sentinel
        )
        if start is not None and not run.val_only:
            self.source.load_state_dict(start.driver["source"])
            self.kl.load_state_dict(start.driver["kl"])
            self.sentinel.load_state_dict(start.driver["sentinel"])
            self.totals = dict(start.driver["totals"])

    def go(self, learners: SavedLearners, pool: Rollouts) -> Summary:
        """Train to the last step, or validate only."""
        run, done = self.config.trainer, 0
        if self.start is not None:
            logger.info("resuming from %s", self.start.path)
            learners.load(self.start.learners)
            done = self.start.step
        pool.publish(done)
        if run.val_only:
            with self._tracker(run.folder / "validation", None) as tracker:
                tracker.log(self._validate(pool, done), done)
            return self._summary(done)
        with self._tracker(run.folder, done) as tracker:
            if done == 0 and run.val_before_train:
                tracker.log(self._validate(pool, done), done)
            self._train(done, learners, pool, tracker)
        return self._summary(run.last_step)

    def _tracker(self, folder: Path, resume_step: int | None) -> closing[Tracker]:
        return closing(Tracker(folder, self.config.tracking, to_dict(self.config.recorded()), resume_step))

    def _train(self, done: int, learners: SavedLearners, pool: Rollouts, tracker: Tracker) -> None:
        run = self.config.trainer
        stepper = self._stepper(learners, pool)
        with tqdm(total=run.last_step, initial=done, desc="training", unit="step") as bar:
            for step in range(done + 1, run.last_step + 1):
                metrics = stepper.run(step)
                self._count(metrics)
                last = step == run.last_step
                if last or _due(step, run.test_freq):
                    metrics |= self._validate(pool, step)
                tracker.log(metrics, step)
                bar.set_postfix({"reward": f"{metrics.get('reward/mean', 0):.3f}"})
                bar.update()
                if last or run.checkpoint.due(step):
                    self._save(step, metrics, stepper.schedule.source_state(), learners)

    def _stepper(self, learners: SavedLearners, pool: Rollouts) -> Stepper:
        run = self.config.trainer
        return Stepper(
            config=_step_config(self.config),
            source=self.source,
            pool=pool,
            learners=learners,
            kl=self.kl,
            sentinel=self.sentinel,
            dump=run.folder / "trajectories" if run.dump_trajectories else None,
        )

    def _validate(self, pool: Rollouts, step: int) -> dict[str, float]:
        began = time.perf_counter()
        with tqdm(total=len(self.validator.questions), desc=f"validating step {step}", unit="question") as bar:
            metrics = self.validator.run(pool, step, bar.update)
        return metrics | {"val/seconds": time.perf_counter() - began}

    def _count(self, metrics: Mapping[str, float]) -> None:
        self.totals["trajectories"] += metrics["env/trajectories"]
        self.totals["seconds"] += metrics["timing_s/step"]

    def _save(self, step: int, metrics: Mapping[str, float], source: State, learners: SavedLearners) -> None:
        driver = {
            "source": source,
            "kl": self.kl.state_dict(),
            "sentinel": self.sentinel.state_dict(),
            "totals": self.totals,
            "best": metrics.get(self.config.trainer.checkpoint.best_metric or ""),
        }
        self.checkpoints.save(step, driver, learners.save, learners.export)

    def _summary(self, steps: int) -> Summary:
        trajectories = int(self.totals["trajectories"])
        return Summary(
            algorithm=self.config.algorithm.estimator,
            steps=steps,
            questions=trajectories // self.config.rollout.samples,
            trajectories=trajectories,
            seconds=self.totals["seconds"],
        )


def _step_config(config: TrainConfig) -> StepConfig:
    return StepConfig(
        questions=config.data.batch_size,
        samples=config.rollout.samples,
        sampling=config.rollout.training(config.trainer.seed),
        algorithm=config.algorithm,
        uses_reference=config.uses_reference,
        pad_id=_pad_id(config.model.path),
        mode=config.rollout.mode,
        last_step=config.trainer.last_step,
    )


def _kl_controller(algorithm: AlgorithmConfig) -> KLController:
    if algorithm.kl_target is None:
        return FixedKLController(algorithm.kl_coef)
    return AdaptiveKLController(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)


def _pad_id(path: str) -> int:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
