"""One training step, straight down."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from verl.agent.collate import collate, weight_versions
from verl.agent.loop import derive_seed
from verl.agent.protocols import Sampling
from verl.algorithms.kl import KLController
from verl.algorithms.masked import masked_mean
from verl.batch import Batch, TrainBatch
from verl.trainer.estimate import AlgorithmConfig, estimate
from verl.trainer.metrics import policy_tokens, rollout_metrics
from verl.trainer.rollouts import Progress, Rollouts, flat
from verl.trainer.schedule import Mode, schedule
from verl.trainer.sentinel import RunStopped, Sentinel
from verl.trajectories import append_trajectories
from verl.types import Question
from verl.workers.rollout import Sample


class Learners(Protocol):
    """Actor, reference and critic over however many processes they are sharded; all tensors are on the CPU here."""

    def actor_log_probs(self, batch: Batch) -> Tensor:
        """Return (B, S) float32."""
        ...

    def ref_log_probs(self, batch: Batch) -> Tensor:
        """Return (B, S) float32."""
        ...

    def values(self, batch: Batch) -> Tensor:
        """Return (B, S) float32."""
        ...

    def update_actor(self, batch: TrainBatch) -> Mapping[str, float]:
        """Improve the policy; return stats named `actor/...`."""
        ...

    def update_critic(self, batch: TrainBatch) -> Mapping[str, float]:
        """Improve the critic; return stats named `critic/...`."""
        ...


class QuestionSource(Protocol):
    """Where training questions come from."""

    def take(self, count: int) -> list[Question]:
        """Return the next `count` questions."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Return the position, JSON-safe."""
        ...


@dataclass(frozen=True)
class StepConfig:
    """What one step does.

    Attributes:
        questions: N, questions of a step (the published batch size).
        samples: G, trajectories of each question.
        sampling: how the policy samples while training.
        uses_reference: a KL term needs the reference's log-probabilities.
        pad_id: padding token.
        mode: when the next rollout starts.
        last_step: no rollout starts for a step after it.
    """

    questions: int
    samples: int
    sampling: Sampling
    algorithm: AlgorithmConfig
    uses_reference: bool
    pad_id: int
    mode: Mode = "sync"
    last_step: int = 1


class Stopwatch:
    """Seconds by stage; what no stage covers is idle."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        """Return `timing_s/<stage>`, `timing_s/idle` and `timing_s/step`; the parts add up to the step."""
        total = time.perf_counter() - self._began
        parts = {f"timing_s/{stage}": seconds for stage, seconds in self.seconds.items()}
        return parts | {"timing_s/idle": total - sum(self.seconds.values()), "timing_s/step": total}

    def per_token(self, tokens: int) -> dict[str, float]:
        """Return `timing_per_token_ms/<stage>`, over the `tokens` of the batch, prompts and observations included."""
        return {f"timing_per_token_ms/{stage}": 1000 * s / max(tokens, 1) for stage, s in self.seconds.items()}


@dataclass
class Stepper:
    """Everything a step touches; `run` is the step."""

    config: StepConfig
    source: QuestionSource
    pool: Rollouts
    learners: Learners
    kl: KLController
    sentinel: Sentinel
    dump: Path | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.schedule = schedule(config.mode, self._samples, self.source.state_dict, config.last_step)

    def run(self, step: int) -> dict[str, float]:
        """Do step number `step` (from 1) and return its metrics.

        Raises:
            RunStopped: too many trajectories failed, too many updates were skipped, or nothing was left to learn from.
        """
        config, watch, version = self.config, Stopwatch(), self.pool.version
        with watch("rollout"):
            everything, samples, rollout_seconds = self.schedule.take(step)
        self._dump(step, everything)
        self._check(step, everything, samples)
        with watch("collate"):
            batch = collate([sample.trajectory for sample in samples], config.pad_id)
            scores = torch.tensor([sample.outcome.score for sample in samples], dtype=torch.float32)
        with watch("old_log_prob"):
            old = self.learners.actor_log_probs(batch)
        with watch("ref"):
            ref = self.learners.ref_log_probs(batch) if config.uses_reference else None
        with watch("values"):
            values = self.learners.values(batch) if config.algorithm.needs_critic else None
        with watch("adv"):
            train, metrics = estimate(config.algorithm, batch, scores, old, ref, values, self.kl.coef)
        with watch("update_critic"):
            metrics |= self.learners.update_critic(train) if config.algorithm.needs_critic else {}
        if step > config.algorithm.critic_warmup:
            with watch("update_actor"):
                metrics |= self.learners.update_actor(train)
            with watch("sync"):
                self.schedule.settle()
                self.pool.publish(step)
            self._adapt_kl(metrics, len(samples))
        metrics |= rollout_metrics(everything) | _mismatch(batch, old, samples, version)
        metrics |= (
            _throughput(everything, rollout_seconds) | watch.metrics() | watch.per_token(int(batch.lengths.sum()))
        )
        self.sentinel.check_updates(metrics)
        return metrics

    def _samples(self, step: int) -> tuple[list[Sample], list[Sample], float]:
        """Roll out until the step is full; return all samples, those that are learned from, and the seconds.

        With dynamic sampling further questions are drawn in the place of those whose group teaches nothing, up to the
        configured number of draws.
        """
        config, began = self.config, time.perf_counter()
        everything: list[Sample] = []
        kept: list[list[Sample]] = []
        for draw in range(max(1, config.algorithm.dynamic_sampling)):
            missing = config.questions - len(kept)
            if not missing:
                break
            sampling = _seeded(config.sampling, step, draw)
            groups = self.pool.collect(self.source.take(missing), config.samples, sampling, self.progress)
            everything += flat(groups)
            kept += [group for group in map(self._learnable, groups) if group]
        return everything, list(flat(kept)), time.perf_counter() - began

    def _learnable(self, group: list[Sample]) -> list[Sample]:
        """Return what of a question's samples is learned from.

        Failed ones never are. A group-relative estimator cannot judge one that the failures left alone, and dynamic
        sampling drops groups whose scores are all equal, because they carry no gradient (DAPO, Yu et al. 2025).
        """
        algorithm = self.config.algorithm
        scored = [sample for sample in group if not sample.outcome.failed]
        if algorithm.compares_samples and len(scored) == 1 < len(group):
            return []
        if algorithm.dynamic_sampling and len({sample.outcome.score for sample in scored}) < 2:
            return []
        return scored

    def _check(self, step: int, everything: Sequence[Sample], learned: Sequence[Sample]) -> None:
        self.sentinel.check_rollouts([sample.outcome for sample in everything])
        if not learned:
            raise RunStopped(
                f"step {step}: none of {len(everything)} trajectories can be learned from, because no group was left "
                "whose rewards differ; raise algorithm.dynamic_sampling or rollout.temperature"
            )

    def _adapt_kl(self, metrics: Mapping[str, float], count: int) -> None:
        """Let the controller see the KL of `count` trajectories; while only the critic learns, there is none to see."""
        kl = metrics.get("critic/kl", math.nan)
        if math.isfinite(kl):
            self.kl.update(kl, count)

    def _dump(self, step: int, samples: list[Sample]) -> None:
        """Write the step's trajectories with their outcomes, whether or not the run goes on."""
        if self.dump is None:
            return
        path = self.dump / f"step_{step:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        append_trajectories(path, [(sample.trajectory, sample.outcome) for sample in samples])


def _throughput(samples: Sequence[Sample], rollout_seconds: float) -> dict[str, float]:
    """Say what the rollout spent its time on; waits are means per trajectory and shares, because they overlap."""
    turns = [turn for sample in samples for turn in sample.trajectory.turns]
    seconds = max(sum(sample.seconds for sample in samples), 1e-9)
    searching = sum(sample.search_seconds for sample in samples)
    scoring = sum(sample.reward_seconds for sample in samples)
    return {
        "rollout/search_wait_s": searching / len(samples),
        "rollout/reward_wait_s": scoring / len(samples),
        "rollout/search_wait_share": searching / seconds,
        "rollout/reward_wait_share": scoring / seconds,
        "rollout/tokens_per_second": sum(policy_tokens(sample.trajectory) for sample in samples)
        / max(rollout_seconds, 1e-9),
        "rollout/seconds": rollout_seconds,
        "rollout/dropped_documents": float(sum(turn.dropped for turn in turns)),
    }


def _seeded(sampling: Sampling, step: int, draw: int) -> Sampling:
    """Give each step and draw its own seed, so that a resumed run samples what an unbroken one would have."""
    return replace(sampling, seed=derive_seed(sampling.seed, step * 1000 + draw))


def _mismatch(batch: Batch, old: Tensor, samples: Sequence[Sample], version: int) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the engine's, and how old the sampling weights were."""
    difference = (old - batch.rollout_logprobs).abs()
    versions = weight_versions([sample.trajectory for sample in samples])
    age = torch.where(batch.action_mask, version - versions, 0).float()
    return {
        "rollout/logprob_diff_mean": masked_mean(difference, batch.action_mask).item(),
        "rollout/logprob_diff_max": torch.where(batch.action_mask, difference, 0.0).max().item(),
        "rollout/staleness": masked_mean(age, batch.action_mask).item(),
    }
