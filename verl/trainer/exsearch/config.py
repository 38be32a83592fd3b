"""Everything that self-training by generalised EM is configured by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_preprocess.world.build import WorldConfig
from verl.agent.grammar.exsearch import ExSearchConfig
from verl.agent.protocols import Sampling
from verl.algorithms.weights import Weighting, check_weighting
from verl.retrieval.client import RetrieverClientConfig
from verl.workers.engines import EngineConfig

GoldRule = Literal["best", "first", "any"]


@dataclass(frozen=True)
class SamplingConfig:
    """How trajectories are sampled in an E-step.

    Attributes:
        samples: K, trajectories of a question.
        questions: an iteration takes so many questions, the next ones of a seeded order; null takes all.
        in_flight: trajectories that are played at a time; more than the engine decodes, so that it never waits.
        max_failures: questions of which every trajectory failed after which the E-step gives up; the rest is kept.
        max_failed_share: a larger share of failed trajectories stops the run with the cause.
    """

    samples: int = 8
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = -1
    questions: int | None = None
    in_flight: int = 256
    max_failures: int = 32
    max_failed_share: float = 0.2

    def __post_init__(self) -> None:
        for name in ("samples", "questions", "in_flight", "max_failures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}; the E-step samples from the policy and needs more than 0"
            )
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share={self.max_failed_share}; expected a share from 0 to 1")

    def sampling(self, seed: int) -> Sampling:
        """Return what the agent loop takes."""
        return Sampling(self.temperature, self.top_p, self.top_k, seed=seed)


@dataclass(frozen=True)
class ScoringConfig:
    """How log p(y | x, z) is computed, and which trajectories have one.

    Attributes:
        gold: of several accepted answers the most probable one, the first, or the probability that any is given.
        end_of_turn: score the token that ends the answer's turn too.
        answer_prefix: stands before an answer in its turn; for tokenizers whose words begin with their space.
        max_empty_facts: a trajectory with more searches without recorded evidence is left out.
        max_tokens: a trajectory that is longer with its answer is left out.
        micro_tokens: most tokens of one forward pass, padding included.
        dtype: what the passes compute in.
    """

    gold: GoldRule = "best"
    end_of_turn: bool = False
    answer_prefix: str = ""
    max_empty_facts: int = 2
    max_tokens: int = 8192
    micro_tokens: int = 32768
    dtype: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        if self.max_empty_facts < 0:
            raise ValueError(f"max_empty_facts={self.max_empty_facts}; expected 0 or more")
        for name in ("max_tokens", "micro_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class WeightsConfig:
    """How trajectories become weighted examples.

    Attributes:
        kind: a key of `verl.algorithms.weights.WEIGHTINGS`.
        length_exponent: of `paper`: 0 takes the sum of the answer's log-probabilities, 1 their mean.
        reward: of the kind `reward`: what the predicted answer earns.
        answer: what stands in the last turn of an example, the gold answer or the one that was given.
        merge: equal trajectories of a question become one token row with the sum of their weights, which changes
            nothing but the time that learning takes. The published training file keeps them apart.
        min_weight: rows of less weight are left out, which saves their time; they are counted.
        min_probability: trajectories after which the gold answer is less probable have no weight; they are counted.
            What is normalised over a question would otherwise, where none explains the answer, give its whole weight
            to trajectories that do not, which teaches to guess.
    """

    kind: Weighting = "paper"
    length_exponent: float = 0.0
    reward: Literal["f1", "em"] = "f1"
    answer: Literal["gold", "predicted"] = "gold"
    merge: bool = True
    min_weight: float = 0.0
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        check_weighting(self.kind, 2)
        if not 0 <= self.length_exponent <= 1:
            raise ValueError(f"length_exponent={self.length_exponent}; expected from 0 (sum) to 1 (mean)")
        for name in ("min_weight", "min_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected from 0 to below 1")


@dataclass(frozen=True)
class EvaluationConfig:
    """How a policy is judged between iterations and at the end: greedily unless told otherwise.

    Attributes:
        metric: of the dev questions; early stopping and the choice of the best iteration go by it.
        limit: take the first so many questions of each set.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    metric: Literal["em", "f1", "accuracy", "sub_span", "kilt"] = "em"
    limit: int | None = None
    max_failures: int = 32

    def sampling(self, seed: int) -> Sampling:
        """Return what the agent loop takes."""
        return Sampling(self.temperature, self.top_p, seed=seed)


@dataclass(frozen=True)
class LoopConfig:
    """The outer loop.

    Attributes:
        iterations: E- and M-steps at most.
        patience: stop after so many iterations without a new best on the dev questions; 0 never stops early.
        start_from: the model that an M-step begins with: the newest one, or the one that self-training began with
            (after the warm-up).
    """

    iterations: int = 5
    patience: int = 2
    start_from: Literal["current", "base"] = "current"

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.patience < 0:
            raise ValueError(f"iterations={self.iterations}, patience={self.patience}; expected 0 or more")


@dataclass(frozen=True)
class WorldRun:
    """The embedded world as the task: it is built, indexed and served by the run itself.

    Attributes:
        warmup: training questions of which gold trajectories are made for the warm-up.
        warmup_two_hop: of these, so many have two hops at most; null takes them as they come.
    """

    world: WorldConfig = field(default_factory=WorldConfig)
    warmup: int = 100
    warmup_two_hop: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "warmup_two_hop"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}; expected 0 or more")


@dataclass(frozen=True)
class SelfTrainConfig:
    """Self-training by generalised EM.

    Attributes:
        output: folder of everything that is written.
        policy: folder or hub name of the model to begin with.
        engine: how the policy is served; its model is the one of the moment.
        keep_engine: one engine serves all models and takes their weights, which saves its start; otherwise it is
            closed while something else computes, whose memory it would take.
        train, dev, test: parquets of questions; without a `test` set the dev questions are reported alone.
        warmup: file of trajectories for the warm-up, as `data_preprocess.warmup` writes it or as released; null begins
            with `policy` as it is.
        sft: settings of the warm-up's fine-tuning (keys of `configs/sft.yaml`).
        align: settings of the M-step's fine-tuning.
        world: run on the embedded world; then `train`, `dev`, `test` and `warmup` are its.
    """

    output: Path
    policy: str
    engine: EngineConfig
    seed: int = 0
    keep_engine: bool = False
    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    warmup: Path | None = None
    search: ExSearchConfig = field(default_factory=ExSearchConfig)
    retriever: RetrieverClientConfig = field(default_factory=RetrieverClientConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    sft: Mapping[str, Any] = field(default_factory=dict)
    align: Mapping[str, Any] = field(default_factory=dict)
    world: WorldRun | None = None

    def __post_init__(self) -> None:
        check_weighting(self.weights.kind, self.sampling.samples)
