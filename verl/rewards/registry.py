"""Rewards by name, weighted sums of them, and the scorer that turns a trajectory into a `RewardOutcome`.

To add a reward: write `async def my_reward(evidence: Evidence) -> RewardOutcome` and either enter it in `REWARDS` or
name it in the configuration by its dotted path, `terms: {my_package.my_module.my_reward: 1.0}`.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from verl.errors import ConfigError, DataError, GeneratorError
from verl.rewards.accuracy import em, generation_accuracy, token_f1
from verl.rewards.evidence import Answer, Evidence, Judge, failed
from verl.rewards.gain import Gain, GainVariant
from verl.rewards.recall import RecallOfGold, context_holds_answer
from verl.typed import nearest
from verl.types import Question, RewardOutcome, Stop, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """What is rewarded.

    Attributes:
        terms: weight of each reward, by its name in `REWARDS` or its dotted path; the score is the weighted sum.
        gain: which variant of GBR the term `gain` is.
        equal_documents: cut the searcher's documents to the first so many, the number that the baseline saw; None
            gives the generator all of them.
    """

    terms: Mapping[str, float] = field(default_factory=lambda: {"gain": 1.0})
    gain: GainVariant = "released"
    equal_documents: int | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(f"terms is empty; expected at least one of {', '.join(REWARDS)}")
        for name, weight in self.terms.items():
            if not math.isfinite(weight):
                raise ValueError(f"terms.{name}={weight}; expected a finite weight")
        if self.equal_documents is not None and self.equal_documents < 1:
            raise ValueError(f"equal_documents={self.equal_documents}; expected at least 1, or null for all")


class Reward(Protocol):
    """A small function or object; one that needs columns of the data set also has `validate(questions)`."""

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        """Return the score with its named parts; `failed` where there is nothing to judge.

        Raises:
            GeneratorError: the generator or the judge could not answer; the scorer turns it into a failed outcome.
        """
        ...


REWARDS: dict[str, Callable[[RewardConfig], Reward]] = {
    "gain": lambda config: Gain(config.gain),
    "generation_accuracy": lambda config: generation_accuracy,
    "em": lambda config: em,
    "f1": lambda config: token_f1,
    "recall_of_gold": lambda config: RecallOfGold(),
    "answer_in_context": lambda config: context_holds_answer,
}


def resolve(name: str, config: RewardConfig) -> Reward:
    """Return the reward called `name`, a key of `REWARDS` or the dotted path of an async function (or of a class).

    Raises:
        ConfigError: there is no such reward.
    """
    if name in REWARDS:
        return REWARDS[name](config)
    if "." not in name:
        raise ConfigError(
            f"unknown reward {name!r}; did you mean {nearest(name, list(REWARDS))!r}? Rewards: {', '.join(REWARDS)}, "
            "or the dotted path of your own"
        )
    found = _imported(name)
    reward = found() if isinstance(found, type) else found
    if not callable(reward):
        raise ConfigError(f"reward {name!r} is a {type(found).__name__}; expected an async function of an Evidence")
    return reward


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """The weighted sum of several rewards; it fails as soon as one of them does."""

    terms: tuple[tuple[str, float, Reward], ...]

    def validate(self, questions: Sequence[Question]) -> None:
        """Let every term check the questions it will be asked about.

        Raises:
            DataError: a term misses a column.
        """
        for _, _, reward in self.terms:
            check = getattr(reward, "validate", None)
            if check is not None:
                check(questions)

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        score, parts = 0.0, {}
        for name, weight, reward in self.terms:
            outcome = await reward(evidence)
            if outcome.failed:
                return outcome
            if not math.isfinite(outcome.score):
                return failed(f"reward {name!r} returned the score {outcome.score}; expected a finite number")
            score += weight * outcome.score
            parts |= dict(outcome.parts) or {name: outcome.score}
        return RewardOutcome(score, parts)


def combine(config: RewardConfig) -> WeightedSum:
    """Build the weighted sum that `config.terms` describes.

    Raises:
        ConfigError: unknown reward.
    """
    return WeightedSum(tuple((name, weight, resolve(name, config)) for name, weight in config.terms.items()))


class Scorer:
    """Scores one trajectory; call it the moment a trajectory ends, as many at once as there are.

    Args:
        config: what is rewarded.
        answer: the frozen generator.
        judge: asked where the span match says no; None leaves it at the span match.
    """

    def __init__(self, config: RewardConfig, answer: Answer, judge: Judge | None = None) -> None:
        self.config = config
        self._reward = combine(config)
        self._answer = answer
        self._judge = judge

    def validate(self, questions: Sequence[Question]) -> None:
        """Check, before any process starts, that the data set has what the rewards need.

        Raises:
            DataError: a missing column, or baselines of another number of documents than `equal_documents`.
        """
        self._reward.validate(questions)
        wanted = self.config.equal_documents
        for question in questions:
            # Published caches hold no documents with their baselines; there is nothing to compare then.
            documents = question.baseline.documents if question.baseline else ()
            if wanted is not None and documents and len(documents) != wanted:
                raise DataError(
                    f"the baseline of question {question.id!r} saw {len(documents)} documents but equal_documents is "
                    f"{wanted}; set equal_documents={len(documents)} or precompute the baseline again"
                )

    async def __call__(self, trajectory: Trajectory) -> RewardOutcome:
        """Return the outcome; a failure of the trajectory, the generator or the judge is an outcome, never a score."""
        if trajectory.stop is Stop.FAILED:
            return failed(f"trajectory failed: {trajectory.error or 'no cause given'}")
        documents = trajectory.documents[: self.config.equal_documents]
        evidence = Evidence(trajectory, documents, self._answer, self._judge)
        try:
            outcome = await self._reward(evidence)
            if outcome.failed:
                return outcome
            return await _completed(outcome, evidence)
        except GeneratorError as error:
            logger.warning("no score for question %r: %s", trajectory.question.id, error)
            return failed(str(error) or repr(error))


async def _completed(outcome: RewardOutcome, evidence: Evidence) -> RewardOutcome:
    """Add what every scored trajectory reports: its documents and, if it was asked, the generator's answer."""
    parts = {**outcome.parts, "documents": float(len(evidence.documents))}
    if not evidence.asked:
        return replace(outcome, parts=parts)
    verdict = await evidence.verdict()
    parts["documents_dropped"] = float(len(evidence.documents) - verdict.documents_used)
    return replace(outcome, parts=parts, answer=verdict.answer, correct=verdict.correct)


def _imported(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as cause:
        raise ConfigError(
            f"reward {path!r} cannot be imported: {cause}; expected package.module.name, importable from here"
        ) from cause
