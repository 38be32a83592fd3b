"""Semantic perplexity: how much of its belief the frozen generator puts into the gold answer, in whatever words.

Source: Dai et al. 2025, "SePer: Measure Retrieval Utility Through The Lens Of Semantic Perplexity Reduction". Answers
are sampled; each carries a probability, its length-normalised likelihood divided by the sum of them all. Belief in the
gold is the probability of the answers that mean the same as it, and the reward is what the found documents add to it.

Two variants, which differ in how meaning is compared:

* `paper`: answers that entail each other are one cluster, whose probability is the sum of its members'. Belief is the
  probability of all clusters whose likeliest answer entails a gold.
* `released` (the code that came with s3): no clusters. Belief is the sum over answers of probability times entailment,
  the larger of both directions, as a probability, not a decision; the best gold counts.

Texts are compared with the question before them, because "1984" alone says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import ClassVar, Literal

from verl.errors import GeneratorError
from verl.rewards.evidence import Entailment, Evidence, Sample, Sampler, failed
from verl.rewards.once import Once, together
from verl.rewards.perplexity import (
    Against,
    QuestionKey,
    check_reference,
    mean_logprob,
    missing_reference,
    question_key,
    reference_documents,
)
from verl.types import Document, Question, RewardOutcome

SeperVariant = Literal["paper", "released"]
Entails = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Belief:
    """Probability of the gold's meaning, in [0, 1], and the number of meanings among the samples (0: not counted)."""

    value: float
    clusters: int = 0


@dataclass(frozen=True, slots=True)
class SemanticPerplexity:
    """Reward the belief in the gold with the found documents minus that without.

    Parts: seper and seper_reference, the two beliefs, semantic_perplexity_gain, their difference, and for the variant
    of the paper seper_clusters. The reference is sampled once per question.

    Attributes:
        samples: answers sampled from each context.
        threshold: probability from which on a text counts as entailed (variant `paper`).
        against: the reference; the paper has none but the bare question.
    """

    needs: ClassVar[tuple[str, ...]] = ("sampler", "entailment")

    variant: SeperVariant = "paper"
    samples: int = 10
    threshold: float = 0.5
    against: Against = "no_context"
    _references: Once[QuestionKey, Belief] = field(default_factory=Once, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}; expected at least 1")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}; expected a probability above 0")

    def validate(self, questions: Sequence[Question]) -> None:
        """Check that every question has the documents of its baseline, if they are the reference; else DataError."""
        check_reference(questions, self.against)

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        question, sampler, entailment = evidence.question, evidence.sampler, evidence.entailment
        reference = reference_documents(question, self.against)
        if reference is None:
            return failed(missing_reference(question))

        async def before() -> Belief:
            return await self._belief(sampler, entailment, question, reference)

        belief, belief_before = await together(
            [
                self._belief(sampler, entailment, question, evidence.documents),
                self._references(question_key(question), before),
            ]
        )
        gain = belief.value - belief_before.value
        parts = {"seper": belief.value, "seper_reference": belief_before.value, "semantic_perplexity_gain": gain}
        if belief.clusters:
            parts["seper_clusters"] = float(belief.clusters)
        return RewardOutcome(gain, parts)

    async def _belief(
        self, sampler: Sampler, entailment: Entailment, question: Question, documents: Sequence[Document]
    ) -> Belief:
        samples = await sampler(question, documents, self.samples)
        if len(samples) != self.samples:
            raise GeneratorError(
                f"question {question.id!r}: the generator returned {len(samples)} samples; expected {self.samples}"
            )
        probabilities = answer_probabilities(samples)
        golds = [gold.strip() for gold in question.answers if gold.strip()]
        texts = [text for text in probabilities if text]
        with_golds = [(text, gold) for text in texts for gold in golds]
        if self.variant == "released":
            pairs = with_golds + [(gold, text) for text, gold in with_golds]
            return Belief(soft_belief(probabilities, golds, await _entails(question, pairs, entailment)))
        pairs = with_golds + list(permutations(texts, 2))
        return clustered_belief(probabilities, golds, await _entails(question, pairs, entailment), self.threshold)


def answer_probabilities(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the probability of each distinct answer, the likeliest first; they sum to 1.

    A sample weighs exp(mean log-probability of its tokens). One that is blank and has no tokens weighs what the others
    do on average: silence is an answer too, and it must not make the others likelier.

    Raises:
        GeneratorError: a sample comes without log-probabilities.
    """
    texts = [sample.text.strip() for sample in samples]
    means = [
        mean_logprob(sample.logprobs, f"sample {text!r}") if text or sample.logprobs else None
        for sample, text in zip(samples, texts, strict=True)
    ]
    known = [mean for mean in means if mean is not None]
    top = max(known, default=0.0)
    usual = math.fsum(math.exp(mean - top) for mean in known) / len(known) if known else 1.0
    weights = [usual if mean is None else math.exp(mean - top) for mean in means]
    summed: dict[str, float] = {}
    for text, weight in zip(texts, weights, strict=True):
        summed[text] = summed.get(text, 0.0) + weight / math.fsum(weights)
    return dict(sorted(summed.items(), key=lambda item: (-item[1], item[0])))


def clustered_belief(
    probabilities: Mapping[str, float], golds: Sequence[str], entails: Entails, threshold: float
) -> Belief:
    """Return the probability of the clusters that entail a gold.

    Args:
        probabilities: by answer, the likeliest first. Each joins the first cluster with whose likeliest answer it
            entails each other, so the outcome does not depend on the order in which answers were sampled.
    """
    clusters: dict[str, float] = {}
    for text, probability in probabilities.items():
        alike = (head for head in clusters if entails(head, text) >= threshold and entails(text, head) >= threshold)
        head = next(alike, text)
        clusters[head] = clusters.get(head, 0.0) + probability
    right = [mass for head, mass in clusters.items() if any(entails(head, gold) >= threshold for gold in golds)]
    return Belief(math.fsum(right), len(clusters))


def soft_belief(probabilities: Mapping[str, float], golds: Sequence[str], entails: Entails) -> float:
    """Return the sum of probability times entailment, in the better direction, for the best gold."""
    beliefs = [
        math.fsum(mass * max(entails(text, gold), entails(gold, text)) for text, mass in probabilities.items())
        for gold in golds
    ]
    return max(beliefs, default=0.0)


async def _entails(question: Question, pairs: Sequence[tuple[str, str]], entailment: Entailment) -> Entails:
    """Ask about all pairs at once; what was not asked, because a side is blank, is not entailed."""
    distinct = list(dict.fromkeys(pairs))
    asked = [(f"{question.text} {first}", f"{question.text} {second}") for first, second in distinct]
    known = dict(zip(distinct, await entailment(asked) if asked else (), strict=True))
    return lambda first, second: known.get((first, second), 0.0)
