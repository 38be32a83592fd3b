"""Validation: all questions, the evaluation's own sampling, every generation dumped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl.agent.protocols import Sampling
from verl.trainer.metrics import trajectory_metrics
from verl.trainer.rollouts import Progress, Rollouts, flat
from verl.trainer.sentinel import Sentinel
from verl.trajectories import append_trajectories
from verl.types import Question
from verl.workers.rollout import Sample


@dataclass(frozen=True)
class Validator:
    """Plays the validation questions once each.

    Attributes:
        folder: gets `step_000020.jsonl` with every trajectory and outcome.
        sentinel: judges the failures; an accuracy over the few questions that a dead service left would mislead.
    """

    questions: Sequence[Question]
    sampling: Sampling
    folder: Path
    sentinel: Sentinel

    def run(self, pool: Rollouts, step: int, progress: Progress | None = None) -> dict[str, float]:
        """Return `val/...` metrics: accuracy over all questions and by kind, score, and how the policy searched.

        A question that failed is counted in `val/failed` and left out of the means.

        Raises:
            RunStopped: too many failed.
        """
        samples = list(flat(pool.collect(self.questions, 1, self.sampling, progress)))
        path = self.folder / f"step_{step:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        append_trajectories(path, [(sample.trajectory, sample.outcome) for sample in samples])
        self.sentinel.check_rollouts([sample.outcome for sample in samples])
        return validation_metrics(samples)


def validation_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Summarise scored validation samples."""
    scored = [sample for sample in samples if not sample.outcome.failed]
    metrics = {"val/n": float(len(samples)), "val/failed": float(len(samples) - len(scored))}
    if not scored:
        return metrics
    kinds: dict[str, list[float]] = defaultdict(list)
    for sample in scored:
        kinds["accuracy"].append(float(sample.outcome.correct))
        kinds["score"].append(sample.outcome.score)
        if sample.trajectory.question.kind:
            kinds[f"accuracy/{sample.trajectory.question.kind}"].append(float(sample.outcome.correct))
    metrics |= {f"val/{name}": sum(values) / len(values) for name, values in kinds.items()}
    played = trajectory_metrics([sample.trajectory for sample in scored])
    return metrics | {f"val/{name.removeprefix('env/')}": value for name, value in played.items()}
