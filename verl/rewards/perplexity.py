"""What the found documents add to how likely the frozen generator finds the gold answer.

Unlike accuracy this moves with every document that helps a little, so it also tells two wrong answers apart. It needs a
generator that scores a given answer token by token (`Tools.likelihood`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from verl.errors import DataError, GeneratorError
from verl.rewards.evidence import Evidence, Likelihood, failed
from verl.rewards.once import Once, together
from verl.types import Document, Question, RewardOutcome

Against = Literal["baseline", "no_context"]
"""What a context is compared with: the documents of naive RAG, or none at all."""
GoldChoice = Literal["best", "first", "mean"]
QuestionKey = tuple[str, str, tuple[str, ...]]

_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class PerplexityGain:
    """Reward log p(gold | question, documents) - log p(gold | question, reference), each a mean over the gold's tokens.

    Parts: logprob, logprob_reference and perplexity_gain, their difference, in nats per token. The exponential of it is
    the factor by which the perplexity of the gold shrinks. The reference is asked once per question.

    Attributes:
        golds: of several golds, take the likeliest (under each context its own), the first, or the mean over all.
        against: the reference.
    """

    needs: ClassVar[tuple[str, ...]] = ("likelihood",)

    golds: GoldChoice = "best"
    against: Against = "baseline"
    _references: Once[QuestionKey, float] = field(default_factory=Once, init=False, repr=False, compare=False)

    def validate(self, questions: Sequence[Question]) -> None:
        """Check that every question has the documents of its baseline, if they are the reference; else DataError."""
        check_reference(questions, self.against)

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        question, likelihood = evidence.question, evidence.likelihood
        reference = reference_documents(question, self.against)
        if reference is None:
            return failed(missing_reference(question))

        async def before() -> float:
            return await self._logprob(likelihood, question, reference)

        logprob, logprob_reference = await together(
            [
                self._logprob(likelihood, question, evidence.documents),
                self._references(question_key(question), before),
            ]
        )
        gain = logprob - logprob_reference
        parts = {"logprob": logprob, "logprob_reference": logprob_reference, "perplexity_gain": gain}
        return RewardOutcome(gain, parts)

    async def _logprob(self, likelihood: Likelihood, question: Question, documents: Sequence[Document]) -> float:
        golds = question.answers[:1] if self.golds == "first" else question.answers
        found = await together([likelihood(question, documents, gold) for gold in golds])
        means = [
            mean_logprob(values, f"question {question.id!r}, gold {gold!r}")
            for gold, values in zip(golds, found, strict=True)
        ]
        return sum(means) / len(means) if self.golds == "mean" else max(means)


def mean_logprob(logprobs: Sequence[float], of: str) -> float:
    """Return the mean log-probability per token.

    Raises:
        GeneratorError: there are none, or they are no log-probabilities; `of` says whose they are.
    """
    if not logprobs:
        raise GeneratorError(f"{of}: the generator returned no log-probability; expected one per token of the answer")
    bad = [value for value in logprobs if not (math.isfinite(value) and value <= _ROUNDING)]
    if bad:
        raise GeneratorError(f"{of}: the generator returned the log-probability {bad[0]}; expected finite ones up to 0")
    return math.fsum(logprobs) / len(logprobs)


def reference_documents(question: Question, against: Against) -> tuple[Document, ...] | None:
    """Return the documents to compare with; None where those of the baseline are wanted and not known."""
    if against == "no_context":
        return ()
    return (question.baseline.documents if question.baseline else ()) or None


def check_reference(questions: Sequence[Question], against: Against) -> None:
    """Refuse questions whose reference is not known.

    Raises:
        DataError: how many there are, and the first of them.
    """
    missing = [question for question in questions if reference_documents(question, against) is None]
    if missing:
        raise DataError(f"{len(missing)} of {len(questions)} questions: {missing_reference(missing[0])}")


def missing_reference(question: Question) -> str:
    """Return what to do about a question without the documents of its baseline."""
    return (
        f"question {question.id!r} has no naive-RAG documents to compare with; precompute the baseline (published "
        "caches hold answers without documents), or set against=no_context"
    )


def question_key(question: Question) -> QuestionKey:
    """Return what a reference depends on besides the reward's own parameters."""
    return question.id, question.text, question.answers
