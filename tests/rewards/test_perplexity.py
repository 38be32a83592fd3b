"""The gain in log-probability of the gold, computed by hand."""

from __future__ import annotations

import asyncio
import math

import pytest

from tests.rewards.fakes import FakeGenerator, FakeLikelihood, documents, question, trajectory
from verl.errors import ConfigError, DataError
from verl.rewards.evidence import Tools
from verl.rewards.registry import RewardConfig, Scorer
from verl.types import Baseline, Question

FOUND = documents("Louvre", "France")
HERE, BASE = ("Louvre", "France"), ("B0", "B1")
ASKED = question(golds=("Paris", "City of Light"), baseline_documents=2)
KNOWN = {
    ("Paris", HERE): (-1.0, -2.0),
    ("City of Light", HERE): (-0.5, -0.5, -0.8),
    ("Paris", BASE): (-3.0, -2.0),
    ("City of Light", BASE): (-6.0, -6.0, -6.0),
    ("Paris", ()): (-4.0, -6.0),
    ("City of Light", ()): (-7.0, -7.0, -7.0),
}


def scorer(likelihood: FakeLikelihood, **params: str) -> Scorer:
    config = RewardConfig({"perplexity_gain": 1.0}, params={"perplexity_gain": params} if params else {})
    return Scorer(config, FakeGenerator("!"), tools=Tools(likelihood=likelihood))


@pytest.mark.parametrize(
    ("params", "after", "before"),
    [
        ({}, -0.6, -2.5),
        ({"golds": "first"}, -1.5, -2.5),
        ({"golds": "mean"}, (-1.5 - 0.6) / 2, (-2.5 - 6.0) / 2),
        ({"against": "no_context"}, -0.6, -5.0),
    ],
)
async def test_gain_by_hand(params: dict[str, str], after: float, before: float) -> None:
    likelihood = FakeLikelihood(KNOWN)
    outcome = await scorer(likelihood, **params)(trajectory(ASKED, FOUND))
    assert outcome.score == pytest.approx(after - before, abs=1e-12)
    assert outcome.parts == pytest.approx(
        {"logprob": after, "logprob_reference": before, "perplexity_gain": after - before, "documents": 2}, abs=1e-12
    )
    # The generator was not asked for an answer: it would have failed.
    assert (outcome.answer, outcome.failed) == ("", "")
    assert len(likelihood.asked) == (2 if params.get("golds") == "first" else 4)


async def test_the_reference_is_asked_once_per_question() -> None:
    likelihood = FakeLikelihood(KNOWN)
    score = scorer(likelihood)
    other = question("q/2", golds=("Paris",), baseline_documents=2)
    outcomes = await asyncio.gather(*(score(trajectory(q, FOUND)) for q in (ASKED, ASKED, other, ASKED)))
    await score(trajectory(ASKED, FOUND))
    assert len({outcome.score for outcome in outcomes if outcome.parts["logprob"] == -0.6}) == 1
    at_reference = [(id, gold) for id, gold, titles in likelihood.asked if titles == BASE]
    assert sorted(at_reference) == [("q/1", "City of Light"), ("q/1", "Paris"), ("q/2", "Paris")]


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [((), "returned no log-probability"), ((-1.0, math.nan), "nan"), ((-math.inf,), "-inf"), ((0.5,), "0.5")],
)
async def test_what_is_no_log_probability_is_a_failed_outcome(logprobs: tuple[float, ...], message: str) -> None:
    likelihood = FakeLikelihood({**KNOWN, ("Paris", BASE): logprobs})
    outcome = await scorer(likelihood)(trajectory(ASKED, FOUND))
    assert message in outcome.failed and "gold 'Paris'" in outcome.failed and math.isnan(outcome.score)


async def test_a_failure_of_the_generator_is_a_failed_outcome_and_tried_again_later() -> None:
    likelihood = FakeLikelihood({key: value for key, value in KNOWN.items() if key != ("Paris", BASE)})
    score = scorer(likelihood)
    outcome = await score(trajectory(ASKED, FOUND))
    assert "http://here is down" in outcome.failed and math.isnan(outcome.score)
    likelihood.known = KNOWN
    assert (await score(trajectory(ASKED, FOUND))).score == pytest.approx(-0.6 + 2.5, abs=1e-12)


@pytest.mark.parametrize("asked", [question(correct=None), question(baseline_documents=0)])
async def test_without_the_documents_of_the_baseline_there_is_no_score(asked: Question) -> None:
    assert asked.baseline is None or asked.baseline == Baseline((), "?", False)
    score = scorer(FakeLikelihood(KNOWN))
    assert "no naive-RAG documents to compare with" in (await score(trajectory(asked, FOUND))).failed
    with pytest.raises(DataError, match="1 of 2 questions: question 'q/1' has no naive-RAG documents"):
        score.validate([ASKED, asked])
    scorer(FakeLikelihood(KNOWN), against="no_context").validate([asked])


def test_without_a_likelihood_it_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match=r"reward 'perplexity_gain' needs likelihood, .* pass Tools\(likelihood="):
        Scorer(RewardConfig({"perplexity_gain": 1.0}), FakeGenerator())
    with pytest.raises(ConfigError, match="did you mean 'baseline'"):
        scorer(FakeLikelihood(KNOWN), against="baselines")
