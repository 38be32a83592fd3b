"""Semantic perplexity, computed by hand and against a version that clusters by brute force."""

from __future__ import annotations

import asyncio
import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rewards.fakes import FakeEntailment, FakeGenerator, FakeSample, FakeSampler, documents, question, trajectory
from verl.errors import ConfigError, DataError, GeneratorError
from verl.rewards.entailment import EntailmentConfig
from verl.rewards.evidence import Entailment, Tools
from verl.rewards.registry import RewardConfig, Scorer
from verl.rewards.seper import answer_probabilities, clustered_belief, soft_belief

FOUND = documents("Louvre", "France")
ASKED = question(golds=("Paris", "Lutetia"), baseline_documents=3)
LOG2 = math.log(2)
# Mean log-probabilities log(1/2), log(1/4) and log(1/4): probabilities 1/2, 1/4, 1/4.
WITH = (
    FakeSample("Paris", (-LOG2, -LOG2)),
    FakeSample("It is Paris", (-2 * LOG2,)),
    FakeSample("Rome", (-3 * LOG2, -LOG2, -2 * LOG2)),
)
WITHOUT = (FakeSample("Rome", (-1.0,)), FakeSample("Rome ", (-1.0,)), FakeSample("Paris", (-1.0,)))
ENTAILED = {
    ("Where? Paris", "Where? It is Paris"): 0.9,
    ("Where? It is Paris", "Where? Paris"): 0.8,
    ("Where? Paris", "Where? Paris"): 1.0,
    ("Where? Rome", "Where? Lutetia"): 0.1,
    ("Where? Lutetia", "Where? Rome"): 0.3,
}


def scorer(sampler: FakeSampler, entailment: Entailment | None, **params: object) -> Scorer:
    config = RewardConfig({"semantic_perplexity": 1.0}, params={"semantic_perplexity": {"samples": 3, **params}})
    return Scorer(config, FakeGenerator("!"), tools=Tools(sampler=sampler, entailment=entailment))


async def test_the_papers_variant_by_hand() -> None:
    sampler = FakeSampler({2: WITH, 0: WITHOUT})
    outcome = await scorer(sampler, FakeEntailment(ENTAILED))(trajectory(ASKED, FOUND))
    # With: {Paris, It is Paris} entails the gold, 3/4. Without: {Rome, Rome}, {Paris}: 1/3.
    assert outcome.score == pytest.approx(3 / 4 - 1 / 3, abs=1e-12)
    expected = {"seper": 3 / 4, "seper_reference": 1 / 3, "semantic_perplexity_gain": 5 / 12}
    assert outcome.parts == pytest.approx({**expected, "seper_clusters": 2, "documents": 2}, abs=1e-12)
    assert sorted(sampler.asked) == [("q/1", 0, 3), ("q/1", 2, 3)]
    assert outcome.answer == ""


async def test_the_released_variant_by_hand() -> None:
    entailment = FakeEntailment(ENTAILED)
    outcome = await scorer(FakeSampler({2: WITH, 0: WITHOUT}), entailment, variant="released")(trajectory(ASKED, FOUND))
    # Best gold Paris. With: 1/2 * 1 + 1/4 * max(0.8, 0.9) + 0. Without: 1/3 * 1; Lutetia gets 2/3 * 0.3 only.
    assert outcome.parts["seper"] == pytest.approx(0.5 + 0.25 * 0.9, abs=1e-12)
    assert outcome.parts["seper_reference"] == pytest.approx(1 / 3, abs=1e-12)
    assert outcome.score == pytest.approx(0.725 - 1 / 3, abs=1e-12)
    assert "seper_clusters" not in outcome.parts
    assert all(first.startswith("Where? ") and second.startswith("Where? ") for first, second in entailment.asked)
    # Both directions of three and of two answers with two golds, less one each for Paris with itself.
    assert len(entailment.asked) == 11 + 7


async def test_one_direction_is_not_enough_for_a_cluster_and_enough_for_the_gold() -> None:
    entailed = {("Where? Paris, France", "Where? Paris"): 1.0}
    sampler = FakeSampler({2: (FakeSample("Paris, France"), FakeSample("Paris"), FakeSample("Rome")), 0: WITHOUT})
    outcome = await scorer(sampler, FakeEntailment(entailed))(trajectory(ASKED, FOUND))
    # Three clusters; "Paris" does not even entail itself in this table.
    assert (outcome.parts["seper"], outcome.parts["seper_clusters"]) == (pytest.approx(1 / 3, abs=1e-12), 3)


async def test_a_higher_threshold_asks_for_more_certainty() -> None:
    sampler = FakeSampler({2: WITH, 0: WITHOUT})
    outcome = await scorer(sampler, FakeEntailment(ENTAILED), threshold=0.85)(trajectory(ASKED, FOUND))
    # "It is Paris" entails Paris with 0.8 only: a cluster of its own, and not right.
    assert (outcome.parts["seper"], outcome.parts["seper_clusters"]) == (pytest.approx(0.5, abs=1e-12), 3)


async def test_the_bare_question_is_sampled_once() -> None:
    sampler = FakeSampler({2: WITH, 0: WITHOUT, 3: WITHOUT})
    score = scorer(sampler, FakeEntailment(ENTAILED))
    await asyncio.gather(*(score(trajectory(ASKED, FOUND)) for _ in range(4)))
    await score(trajectory(ASKED, FOUND))
    await score(trajectory(question("q/2"), FOUND))
    assert [asked for asked in sampler.asked if asked[1] == 0] == [("q/1", 0, 3), ("q/2", 0, 3)]
    await scorer(sampler, FakeEntailment(ENTAILED), against="baseline")(trajectory(ASKED, FOUND))
    assert sampler.asked[-2:] == [("q/1", 2, 3), ("q/1", 3, 3)]


def test_silence_keeps_its_share() -> None:
    # A blank answer without tokens weighs as much as the others on average: (1/2 + 1/4) / 2.
    found = answer_probabilities((FakeSample("", ()), FakeSample("a", (-LOG2,)), FakeSample("b", (-2 * LOG2,))))
    total = 0.375 + 0.5 + 0.25
    assert found == pytest.approx({"a": 0.5 / total, "": 0.375 / total, "b": 0.25 / total}, abs=1e-12)
    assert list(found) == ["a", "", "b"]
    assert answer_probabilities((FakeSample(" ", ()), FakeSample("", ()))) == {"": 1.0}


async def test_silence_alone_is_no_belief() -> None:
    silent = FakeSampler({2: (FakeSample("", ()),) * 3, 0: (FakeSample("", ()),) * 3})
    entailment = FakeEntailment({})
    for variant in ("paper", "released"):
        outcome = await scorer(silent, entailment, variant=variant)(trajectory(ASKED, FOUND))
        assert (outcome.score, outcome.failed) == (0.0, "")
    assert entailment.asked == []


def test_very_unlikely_answers_do_not_underflow() -> None:
    found = answer_probabilities((FakeSample("a", (-2000.0,)), FakeSample("b", (-2000.0 - LOG2,))))
    assert found == pytest.approx({"a": 2 / 3, "b": 1 / 3}, abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((FakeSample("Paris", ()),) * 3, "sample 'Paris': the generator returned no log-probability"),
        ((FakeSample("Paris", (math.nan,)),) * 3, "log-probability nan"),
        (WITH[:2], "returned 2 samples; expected 3"),
    ],
)
async def test_samples_that_cannot_be_weighed_are_a_failed_outcome(
    samples: tuple[FakeSample, ...], message: str
) -> None:
    outcome = await scorer(FakeSampler({2: samples, 0: WITHOUT}), FakeEntailment({}))(trajectory(ASKED, FOUND))
    assert message in outcome.failed and math.isnan(outcome.score)


async def test_a_dead_generator_is_a_failed_outcome() -> None:
    outcome = await scorer(FakeSampler({2: WITH}), FakeEntailment({}))(trajectory(ASKED, FOUND))
    assert "http://here is down" in outcome.failed
    with pytest.raises(GeneratorError):
        answer_probabilities((FakeSample("x", ()),))


def test_what_is_missing_is_named_before_anything_is_asked() -> None:
    config = RewardConfig({"semantic_perplexity": 1.0})
    sampler = FakeSampler({})
    with pytest.raises(ConfigError, match="reward 'semantic_perplexity' needs sampler, and there is none"):
        Scorer(config, FakeGenerator(), tools=Tools(entailment=FakeEntailment({})))
    with pytest.raises(ConfigError, match=r"needs entailment, .* set the reward's entailment\.model"):
        Scorer(config, FakeGenerator(), tools=Tools(sampler=sampler))
    lexical = RewardConfig({"semantic_perplexity": 1.0}, entailment=EntailmentConfig("same_normalised"))
    Scorer(lexical, FakeGenerator(), tools=Tools(sampler=sampler))
    for params, message in (({"samples": 0}, "samples=0"), ({"threshold": 0.0}, "threshold=0.0")):
        with pytest.raises(ConfigError, match=message):
            scorer(sampler, FakeEntailment({}), **params)
    with pytest.raises(DataError, match="no naive-RAG documents"):
        scorer(sampler, FakeEntailment({}), against="baseline").validate([question(correct=None)])


async def test_the_lexical_fallback_knows_spellings_and_no_paraphrase() -> None:
    lexical = RewardConfig(
        {"semantic_perplexity": 1.0},
        params={"semantic_perplexity": {"samples": 3}},
        entailment=EntailmentConfig("same_normalised"),
    )
    samples = (FakeSample("paris."), FakeSample("the Paris"), FakeSample("Lutetia!"))
    sampler = FakeSampler({2: samples, 0: WITHOUT})
    outcome = await Scorer(lexical, FakeGenerator(), tools=Tools(sampler=sampler))(trajectory(ASKED, FOUND))
    assert outcome.parts["seper"] == pytest.approx(1.0, abs=1e-12)
    assert outcome.parts["seper_clusters"] == 2
    assert outcome.parts["seper_reference"] == pytest.approx(1 / 3, abs=1e-12)


TEXTS = ("a", "b", "c", "d")
meanings = st.lists(st.integers(0, 2), min_size=4, max_size=4)
weights = st.lists(st.floats(0.01, 1), min_size=4, max_size=4)


@given(meanings, weights, st.integers(0, 2), st.permutations(range(4)))
def test_with_consistent_meanings_belief_is_the_mass_of_the_golds_meaning(
    means: list[int], masses: list[float], gold: int, order: list[int]
) -> None:
    """Entailment that is an equivalence: both variants add up the answers of the gold's meaning, in any order."""
    meaning = dict(zip((*TEXTS, "gold"), (*means, gold), strict=True))
    samples = [FakeSample(TEXTS[i], (math.log(masses[i]),)) for i in order]
    probabilities = answer_probabilities(samples)

    def entails(first: str, second: str) -> float:
        return float(meaning[first] == meaning[second])

    wanted = sum(mass for mass, mean in zip(masses, means, strict=True) if mean == gold) / sum(masses)
    belief = clustered_belief(probabilities, ["gold"], entails, 0.5)
    assert belief.value == pytest.approx(wanted, abs=1e-9)
    assert belief.clusters == len(set(means))
    assert soft_belief(probabilities, ["gold"], entails) == pytest.approx(wanted, abs=1e-9)


@given(st.dictionaries(st.sampled_from(list(permutations((*TEXTS, "gold"), 2))), st.floats(0, 1)), weights)
def test_belief_is_a_probability_whatever_entails_what(
    known: dict[tuple[str, str], float], masses: list[float]
) -> None:
    samples = [FakeSample(text, (math.log(mass),)) for text, mass in zip(TEXTS, masses, strict=True)]
    probabilities = answer_probabilities(samples)

    def entails(first: str, second: str) -> float:
        return known.get((first, second), 0.0)

    belief = clustered_belief(probabilities, ["gold"], entails, 0.5)
    assert 0 <= belief.value <= 1 + 1e-12 and 1 <= belief.clusters <= 4
    assert 0 <= soft_belief(probabilities, ["gold"], entails) <= 1 + 1e-12
    assert belief == clustered_belief(answer_probabilities(samples[::-1]), ["gold"], entails, 0.5)
