"""Validation: all questions, the evaluation's own sampling, every generation dumped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl.agent.protocols import Sampling
from verl.trainer.metrics import part_means, trajectory_metrics
from verl.trainer.rollouts import Progress, Rollouts, flat
from verl.trainer.sentinel import Sentinel
from verl.trajectories import append_trajectories
from verl.types import Question
from verl.workers.rollout import Sample

HEADLINES = ("ndcg", "accuracy", "recall")
"""Parts of a reward that are what its task is measured by."""

_RECALL_AT = (5, 20, 50, 100)


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
        """Return `val/...` metrics, see `validation_metrics`.

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
    """Summarise scored validation samples.

    `val/score` is the mean reward, `val/PART` that of each of its parts (`val/ndcg`, `val/recall`, `val/hit@20`), also
    under the name `val/recall@k` that DeepRetrieval gives `hit@k`; `val/accuracy` also comes by kind of question, and
    `val/test_score/SOURCE` is by source the first of `HEADLINES` that the reward has, else its score. Besides, how the
    policy searched.
    """
    scored = [sample for sample in samples if not sample.outcome.failed]
    metrics = {"val/n": float(len(samples)), "val/failed": float(len(samples) - len(scored))}
    if not scored:
        return metrics
    named: dict[str, list[float]] = defaultdict(list)
    for sample in scored:
        question, parts = sample.trajectory.question, sample.outcome.parts
        named["score"].append(sample.outcome.score)
        named[f"test_score/{question.source}"].append(_headline(sample))
        if question.kind and "accuracy" in parts:
            named[f"accuracy/{question.kind}"].append(parts["accuracy"])
    means = part_means(scored)
    means |= {f"recall@{k}": means[f"hit@{k}"] for k in _RECALL_AT if f"hit@{k}" in means}
    means |= {name: sum(values) / len(values) for name, values in named.items()}
    metrics |= {f"val/{name}": value for name, value in means.items()}
    played = trajectory_metrics([sample.trajectory for sample in scored])
    return metrics | {f"val/{name.removeprefix('env/')}": value for name, value in played.items()}


def _headline(sample: Sample) -> float:
    parts = sample.outcome.parts
    return next((parts[name] for name in HEADLINES if name in parts), sample.outcome.score)
