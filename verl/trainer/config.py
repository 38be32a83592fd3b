"""Everything a training run is configured by, out of the components' own config classes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from generator_llms.config import GeneratorConfig
from verl.agent.grammar.registry import SearchConfig
from verl.agent.grammar.s3 import S3Config
from verl.agent.protocols import Sampling
from verl.retrieval.client import RetrieverClientConfig
from verl.retrieval.engines.literature import LiteratureConfig
from verl.rewards.registry import RewardConfig
from verl.single_controller.cluster import RayConfig
from verl.single_controller.placement import HardwareConfig
from verl.trainer.checkpoint import CheckpointConfig
from verl.trainer.data import DataConfig
from verl.trainer.estimate import AlgorithmConfig
from verl.trainer.schedule import Mode
from verl.trainer.sentinel import SentinelConfig
from verl.trainer.tracking import TrackingConfig
from verl.workers.actor import ActorConfig
from verl.workers.critic import CriticConfig
from verl.workers.engines import EngineConfig
from verl.workers.model import ModelConfig
from verl.workers.optim import OptimConfig
from verl.workers.reference import ReferenceConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy samples.

    Attributes:
        samples: trajectories of each question (G); group-relative estimators need at least 2.
        temperature, top_p, top_k: while training; the actor's temperature must be the same.
        eval_temperature: while validating; 0 is greedy, and really is.
        in_flight: trajectories that one engine holds at a time.
        mode: when the next rollout starts, see `verl.trainer.schedule`.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    eval_temperature: float = 0.0
    in_flight: int = 128
    mode: Mode = "sync"

    def __post_init__(self) -> None:
        for name in ("samples", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; training needs to explore, so more than 0")
        if not self.eval_temperature >= 0:
            raise ValueError(f"eval_temperature={self.eval_temperature}; expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; expected a share in (0, 1]")

    def training(self, seed: int) -> Sampling:
        """Return the sampling parameters of training rollouts."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=seed)

    def evaluation(self, seed: int) -> Sampling:
        """Return the sampling parameters of validation rollouts."""
        return Sampling(temperature=self.eval_temperature, seed=seed)


@dataclass(frozen=True)
class RunConfig:
    """The run itself.

    Attributes:
        folder: gets checkpoints, metrics, trajectories and the report.
        total_steps: training ends after this many steps; null does not bound them.
        epochs: training ends when so many passes over its questions are made; null does not bound them. Of the two
            bounds the first one that is met ends the run, and one is needed.
        test_freq: validate every so many steps, and always at the end; 0 only at the end.
        val_before_train: validate the untrained policy too.
        val_only: validate and stop; the metrics go to `validation/` and the run's own files stay as they are.
        resume: `auto` continues from the latest checkpoint in `folder`, `never` starts anew, a path continues there.
        max_restarts: times that a run whose worker died is taken up again from its last checkpoint.
        dump_trajectories: write every training trajectory with its outcome to jsonl.
    """

    folder: Path
    seed: int = 42
    total_steps: int | None = 20
    epochs: int | None = None
    test_freq: int = 0
    val_before_train: bool = True
    val_only: bool = False
    resume: str = "auto"
    max_restarts: int = 2
    dump_trajectories: bool = True
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sentinel: SentinelConfig = field(default_factory=SentinelConfig)

    def __post_init__(self) -> None:
        for name in ("total_steps", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if self.total_steps is None and self.epochs is None:
            raise ValueError("total_steps=null, epochs=null; nothing ends the run, set one of them")
        if self.max_restarts < 0 or self.test_freq < 0:
            raise ValueError(f"max_restarts={self.max_restarts}, test_freq={self.test_freq}; expected 0 or more")

    @property
    def last_step(self) -> int:
        """The step that ends the run.

        Raises:
            ValueError: it depends on the number of questions; see `TrainConfig.over`.
        """
        if self.total_steps is None:
            raise ValueError("the run's epochs are not counted in steps yet; call TrainConfig.over first")
        return self.total_steps


@dataclass(frozen=True)
class TrainConfig:
    """A training run. `model` is what actor, critic, reference and engine start from unless they say otherwise.

    `judge` lets a model judge answers that match no gold literally: `judge_generator`, or as published the frozen
    generator itself where that is None. `literature` is the service that is searched in place of the retriever: PubMed
    or ClinicalTrials.gov.
    """

    model: ModelConfig
    data: DataConfig
    trainer: RunConfig
    actor: ActorConfig
    critic: CriticConfig
    reference: ReferenceConfig
    engine: EngineConfig
    search: SearchConfig = field(default_factory=S3Config)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    retriever: RetrieverClientConfig = field(default_factory=RetrieverClientConfig)
    literature: LiteratureConfig | None = None
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    judge: bool = False
    judge_generator: GeneratorConfig | None = None
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def over(self, questions: int) -> TrainConfig:
        """Return the same run with its epochs over so many training questions counted in `trainer.total_steps`.

        The length of the optimizers' schedules follows where it is the run's. One that needs a length of its own to be
        valid, such as a linear one, has to state it, or the run its `total_steps`.
        """
        run = self.trainer
        if run.epochs is None:
            return self
        steps = max(1, run.epochs * questions // self.data.batch_size)
        steps = steps if run.total_steps is None else min(steps, run.total_steps)

        def follow(optim: OptimConfig) -> OptimConfig:
            return replace(optim, total_steps=steps) if optim.total_steps == run.total_steps else optim

        return replace(
            self,
            trainer=replace(run, total_steps=steps),
            actor=replace(self.actor, optim=follow(self.actor.optim)),
            critic=replace(self.critic, optim=follow(self.critic.optim)),
        )

    def recorded(self) -> TrainConfig:
        """Return what goes into files and trackers: without the values of the workers' variables, which may be keys."""
        hidden = dict.fromkeys(self.ray.environment, "***")
        return replace(self, ray=replace(self.ray, environment=hidden))

    @property
    def uses_reference(self) -> bool:
        """Whether a KL term asks for the reference."""
        in_reward = self.algorithm.kl_in_reward and (self.algorithm.kl_coef > 0 or self.algorithm.kl_target is not None)
        return in_reward or self.actor.loss.kl_coef > 0
