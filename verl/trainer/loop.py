"""The run around the step: start the workers, resume, train, validate, save, report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from verl.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from verl.batch import Batch, TrainBatch
from verl.config import to_dict
from verl.errors import WorkerError
from verl.single_controller.cluster import cluster
from verl.single_controller.placement import ResourcePool
from verl.single_controller.train_worker import TrainWorker, TrainWorkerConfig
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer import preflight
from verl.trainer.checkpoint import Checkpoint, Checkpoints, find
from verl.trainer.config import TrainConfig
from verl.trainer.data import Shuffled, training_questions, validation_questions
from verl.trainer.rollouts import RolloutPool
from verl.trainer.sentinel import Sentinel
from verl.trainer.step import StepConfig, Stepper
from verl.trainer.surroundings import ServiceSurroundings
from verl.trainer.tracking import Tracker
from verl.trainer.validate import Validator
from verl.types import Question

logger = logging.getLogger(__name__)


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

    def weights(self) -> dict[str, Tensor]:
        return self.group.call("weights")[0]

    def save(self, folder: Path) -> None:
        """Write every rank's shards of models, optimizers, schedules and random states."""
        self.group.call("save", str(folder))

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, on this number of ranks."""
        self.group.call("load", str(folder))

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format."""
        self.group.call("export_hf", str(folder), self.tokenizer)


@dataclass(frozen=True)
class Summary:
    """What a finished run was: the `training` entry of a report."""

    algorithm: str
    steps: int
    questions: int
    trajectories: int
    seconds: float


def train(config: TrainConfig) -> Summary:
    """Run a whole training, taking it up again from the last checkpoint when a worker dies.

    Raises:
        ConfigError, DataError: found before any process starts.
        RunStopped: services failed or updates broke beyond the limits; the last checkpoint is whole.
        WorkerError: a worker died more often than `trainer.max_restarts` allows.
    """
    questions, held_out = training_questions(config.data), validation_questions(config.data)
    preflight.check(config, [*questions, *held_out])
    resume, restarts = config.trainer.resume, 0
    while True:
        try:
            with _workers(config) as (learners, pool):
                return _Run(config, questions, held_out, learners, pool).go(resume)
        except WorkerError as error:
            restarts += 1
            if restarts > config.trainer.max_restarts:
                raise
            logger.warning("%s; restart %d of %d", error, restarts, config.trainer.max_restarts)
            resume = "auto"


@contextmanager
def _workers(config: TrainConfig) -> Iterator[tuple[RayLearners, RolloutPool]]:
    """Run Ray with the training workers and the rollout workers for the duration of the block."""
    surroundings = ServiceSurroundings(
        config.model.path, config.search, config.retriever, config.generator, config.reward, config.judge
    )
    worker_config = TrainWorkerConfig(
        actor=config.actor,
        reference=config.reference if config.uses_reference else None,
        critic=config.critic if config.algorithm.needs_critic else None,
        device=config.hardware.device,
        threads=config.hardware.threads_per_worker,
        seed=config.trainer.seed,
    )
    with cluster(config.ray, config.hardware):
        resources = ResourcePool(config.hardware)
        try:
            rollouts = RolloutPool.start(
                config.engine, surroundings, resources.placed("rollout"), config.rollout.in_flight
            )
            group = WorkerGroup(TrainWorker, (worker_config,), resources.placed("train"))
            group.call("init")
            yield RayLearners(group, config.model.path), rollouts
        finally:
            resources.close()


class _Run:
    """One attempt at a run."""

    def __init__(
        self,
        config: TrainConfig,
        questions: list[Question],
        held_out: list[Question],
        learners: RayLearners,
        pool: RolloutPool,
    ) -> None:
        run = config.trainer
        self.config, self.learners, self.pool = config, learners, pool
        self.source = Shuffled(questions, config.data.seed, config.data.shuffle)
        self.kl = _kl_controller(config)
        self.checkpoints = Checkpoints(run.folder / "checkpoints", run.checkpoint)
        self.validator = Validator(held_out, config.rollout.evaluation(run.seed), run.folder / "validation")
        self.totals = {"questions": 0.0, "trajectories": 0.0, "seconds": 0.0}
        self.stepper = Stepper(
            config=_step_config(config),
            source=self.source,
            pool=pool,
            learners=learners,
            kl=self.kl,
            sentinel=Sentinel(run.sentinel),
            dump=run.folder / "trajectories" if run.dump_trajectories else None,
        )

    def go(self, resume: str) -> Summary:
        """Resume or start, then train to the last step."""
        run = self.config.trainer
        run.folder.mkdir(parents=True, exist_ok=True)
        if resume == "never":
            self.checkpoints.set_aside()
        done = self._restore(find(resume, self.checkpoints))
        self.pool.update_weights(self.learners.weights(), done)
        tracker = Tracker(run.folder, self.config.tracking, to_dict(self.config), resume_step=done)
        try:
            if run.val_only or (done == 0 and run.val_before_train):
                tracker.log(self._validate(done), done)
            if not run.val_only:
                self._train(done, tracker)
        finally:
            tracker.close()
        return self._summary(done if run.val_only else run.total_steps)

    def _train(self, done: int, tracker: Tracker) -> None:
        run = self.config.trainer
        with tqdm(total=run.total_steps, initial=done, desc="training", unit="step") as bar:
            for step in range(done + 1, run.total_steps + 1):
                metrics = self.stepper.run(step)
                self._count(metrics)
                last = step == run.total_steps
                if last or _due(step, run.test_freq):
                    metrics |= self._validate(step)
                tracker.log(metrics, step)
                bar.set_postfix({"reward": f"{metrics.get('reward/mean', 0):.3f}"})
                bar.update()
                if last or _due(step, run.checkpoint.save_freq):
                    self._save(step, metrics)

    def _validate(self, step: int) -> dict[str, float]:
        with tqdm(total=len(self.validator.questions), desc=f"validating step {step}", unit="question") as bar:
            return self.validator.run(self.pool, step, bar.update)

    def _count(self, metrics: Mapping[str, float]) -> None:
        samples = self.config.rollout.samples
        self.totals["trajectories"] += metrics["env/trajectories"]
        self.totals["questions"] += metrics["env/trajectories"] / samples
        self.totals["seconds"] += metrics["timing_s/step"]

    def _save(self, step: int, metrics: Mapping[str, float]) -> None:
        driver = {
            "source": self.source.state_dict(),
            "kl": self.kl.state_dict(),
            "totals": self.totals,
            "best": metrics.get(self.config.trainer.checkpoint.best_metric or ""),
        }
        self.checkpoints.save(step, driver, self.learners.save, self.learners.export)

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """Load a checkpoint into everything that has state; return the number of steps done."""
        if checkpoint is None:
            return 0
        logger.info("resuming from %s", checkpoint.path)
        self.source.load_state_dict(checkpoint.driver["source"])
        self.kl.load_state_dict(checkpoint.driver["kl"])
        self.totals = dict(checkpoint.driver["totals"])
        self.learners.load(checkpoint.learners)
        return checkpoint.step

    def _summary(self, steps: int) -> Summary:
        totals = self.totals
        return Summary(
            algorithm=self.config.algorithm.estimator,
            steps=steps,
            questions=int(totals["questions"]),
            trajectories=int(totals["trajectories"]),
            seconds=totals["seconds"],
        )


def _step_config(config: TrainConfig) -> StepConfig:
    return StepConfig(
        questions=config.data.batch_size,
        samples=config.rollout.samples,
        sampling=config.rollout.training(config.trainer.seed),
        algorithm=config.algorithm,
        uses_reference=config.uses_reference,
        pad_id=_pad_id(config.model.path),
    )


def _kl_controller(config: TrainConfig) -> KLController:
    algorithm = config.algorithm
    if algorithm.kl_target is None:
        return FixedKLController(algorithm.kl_coef)
    return AdaptiveKLController(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)


def _pad_id(path: str) -> int:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
