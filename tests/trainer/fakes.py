"""Samples made by hand, and a pool, learners and a source that write down how they are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from verl.agent.protocols import Sampling
from verl.batch import Batch, TrainBatch
from verl.types import Document, Question, RewardOutcome, Role, SearchResult, Segment, Stop, Trajectory, Turn
from verl.workers.rollout import Sample

PROMPT = (7, 8)
OBSERVATION = (9, 9, 9)


def question(name: str = "A", kind: str = "1-hop", gold: Sequence[str] = ("T1",)) -> Question:
    """A question whose gold passages have the given titles."""
    return Question(f"world/{name}", f"Who is {name}?", (name,), "world", gold_titles=tuple(gold), kind=kind)


def documents(*titles: str) -> tuple[Document, ...]:
    """One short passage per title."""
    return tuple(Document(title, title, f"about {title}") for title in titles)


def turn(
    tokens: int = 3, logprob: float = -1.0, found: Sequence[str] | None = None, version: int = 0, **parsed: object
) -> Turn:
    """A turn of `tokens` sampled tokens; with `found`, a search that returned passages of these titles."""
    segments = [Segment(tuple(range(10, 10 + tokens)), Role.POLICY, (logprob,) * tokens, version)]
    result = None
    if found is not None:
        segments.append(Segment(OBSERVATION, Role.ENVIRONMENT))
        result = SearchResult("query", documents(*found), (1.0,) * len(found))
    return Turn(tuple(segments), "text", result=result, **parsed)  # type: ignore[arg-type]


def trajectory(
    asked: Question | None = None, turns: Sequence[Turn] | None = None, stop: Stop = Stop.FINISHED, *titles: str
) -> Trajectory:
    """A trajectory that ends with passages of the given titles; one turn unless told otherwise."""
    played = (turn(finished=True),) if turns is None else tuple(turns)
    return Trajectory(asked or question(), PROMPT, played, stop, documents(*titles))


def sample(
    score: float = 1.0,
    asked: Question | None = None,
    failed: str = "",
    turns: Sequence[Turn] | None = None,
    parts: Mapping[str, float] | None = None,
    seconds: float = 1.0,
) -> Sample:
    """A scored trajectory, or one that failed with the given cause."""
    if failed:
        broken = Trajectory(asked or question(), PROMPT, tuple(turns or ()), Stop.FAILED, error=failed)
        return Sample(broken, RewardOutcome(math.nan, failed=failed), 0.0, 0.0, seconds)
    # Parts as of a generator that was right where the score is positive, unless told otherwise.
    given = {"accuracy": float(score > 0)} if parts is None else parts
    outcome = RewardOutcome(score, given, correct=score > 0)
    return Sample(trajectory(asked, turns), outcome, 0.25 * seconds, 0.5 * seconds, seconds)


Play = Callable[[Question, int], Sample]
"""From a question and the number of the sample to what came of it."""


class Source:
    """Hands out questions Q0, Q1, ... or cycles through the given names."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.taken: list[str] = []
        self.asked_for: list[int] = []

    def state_dict(self) -> dict[str, int]:
        """How many questions were taken."""
        return {"taken": len(self.taken)}

    def take(self, count: int) -> list[Question]:
        """Return the next questions."""
        self.asked_for.append(count)
        start = len(self.taken)
        numbers = range(start, start + count)
        names = [self.names[n % len(self.names)] if self.names else f"Q{n}" for n in numbers]
        self.taken += names
        return [question(name) for name in names]


class Pool:
    """Plays questions by a function, and writes down what it was told."""

    def __init__(self, play: Play, calls: list[str] | None = None, version: int = 0) -> None:
        self.play = play
        self.calls = calls if calls is not None else []
        self.version = version
        self.samplings: list[Sampling] = []

    def collect(
        self, questions: Sequence[Question], samples: int, sampling: Sampling, progress: object = None
    ) -> list[list[Sample]]:
        """Play."""
        self.calls.append("collect")
        self.samplings.append(sampling)
        return [[self.play(asked, k) for k in range(samples)] for asked in questions]

    def publish(self, version: int) -> None:
        """Take note of the version."""
        self.calls.append(f"publish {version}")
        self.version = version


class Learners:
    """Log-probabilities that are given constants, and updates that do nothing but write themselves down."""

    def __init__(
        self,
        calls: list[str] | None = None,
        old: float = -1.0,
        ref: float = -1.5,
        value: float = 0.5,
        stats: Mapping[str, float] | None = None,
    ) -> None:
        self.calls = calls if calls is not None else []
        self.old, self.ref, self.value = old, ref, value
        self.stats = dict(stats or {"actor/updates": 1.0, "actor/skipped_updates": 0.0})
        self.batches: list[TrainBatch] = []

    def actor_log_probs(self, batch: Batch) -> Tensor:
        """The same for every action token."""
        return self._constant("old", batch, self.old)

    def ref_log_probs(self, batch: Batch) -> Tensor:
        """The same for every action token."""
        return self._constant("ref", batch, self.ref)

    def values(self, batch: Batch) -> Tensor:
        """The same for every action token."""
        return self._constant("values", batch, self.value)

    def update_actor(self, batch: TrainBatch) -> Mapping[str, float]:
        """Keep the batch."""
        self.calls.append("update_actor")
        self.batches.append(batch)
        return self.stats

    def update_critic(self, batch: TrainBatch) -> Mapping[str, float]:
        """Report one update."""
        self.calls.append("update_critic")
        return {"critic/updates": 1.0, "critic/skipped_updates": 0.0, "critic/vf_loss": 0.25}

    def _constant(self, name: str, batch: Batch, value: float) -> Tensor:
        self.calls.append(name)
        return torch.where(batch.action_mask, value, 0.0)
