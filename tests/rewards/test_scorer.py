"""The scorer and its rewards: hand-computed scores, failures that are never scores, and configuration errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import yaml

from tests.rewards.fakes import (
    FakeGenerator,
    FakeJudge,
    FakeLikelihood,
    FakeSampler,
    documents,
    question,
    trajectory,
)
from verl.config import build
from verl.errors import ConfigError, DataError, GeneratorError
from verl.rewards import registry
from verl.rewards.entailment import EntailmentConfig
from verl.rewards.evidence import Evidence, Tools
from verl.rewards.form import SearchCost
from verl.rewards.gain import gain
from verl.rewards.recall import answer_in_context, gold_recall
from verl.rewards.registry import RewardConfig, Scorer, resolve
from verl.rewards.seper import SemanticPerplexity
from verl.types import Document, Question, RewardOutcome, Stop

FOUND = documents("Louvre", "Seine", "France", "Rome")


async def half(evidence: Evidence) -> RewardOutcome:
    """A custom reward without parts."""
    return RewardOutcome(0.5)


async def undefined(evidence: Evidence) -> RewardOutcome:
    return RewardOutcome(math.nan)


class Counting:
    """A custom reward as a class; wants the generator's answer too."""

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        verdict = await evidence.verdict()
        return RewardOutcome(float(len(verdict.answer)), {"length": float(len(verdict.answer))})


@dataclass(frozen=True)
class LongAnswer:
    """A custom reward with parameters that asks a tool and checks the data set."""

    needs: ClassVar[tuple[str, ...]] = ("likelihood",)

    at_least: int
    unit: Literal["words", "characters"] = "words"

    def __post_init__(self) -> None:
        if self.at_least < 1:
            raise ValueError(f"at_least={self.at_least}; expected 1 or more")

    def validate(self, questions: Sequence[Question]) -> None:
        if any(not question.kind for question in questions):
            raise DataError("a question has no kind")

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        answer = (await evidence.verdict()).answer
        length = len(answer.split()) if self.unit == "words" else len(answer)
        logprobs = await evidence.likelihood(evidence.question, evidence.documents, answer)
        return RewardOutcome(float(length >= self.at_least), {"length": float(length), "tokens": float(len(logprobs))})


NOT_A_REWARD = 3


@pytest.mark.parametrize(
    ("accurate", "baseline", "paper", "released"),
    # The table of the specification: reward = GBR + accuracy in the released code.
    [(1, 0, 1, 2), (1, 1, 0, 1), (0, 0, 0, 0), (0, 1, -1, -1)],
)
async def test_gain_by_the_published_table(accurate: int, baseline: int, paper: float, released: float) -> None:
    assert (gain(accurate, baseline, "paper"), gain(accurate, baseline, "released")) == (paper, released)
    for variant, expected in (("paper", paper), ("released", released)):
        generator = FakeGenerator("in Paris" if accurate else "Rome")
        outcome = await Scorer(RewardConfig(gain=variant), generator)(
            trajectory(question(correct=bool(baseline)), FOUND)
        )
        assert outcome.score == expected
        assert (outcome.correct, outcome.failed) == (bool(accurate), "")
        assert outcome.parts == {
            "accuracy": accurate,
            "baseline_accuracy": baseline,
            "gain": accurate - baseline,
            "documents": 4,
            "documents_dropped": 0,
        }


@pytest.mark.parametrize(
    ("answer", "verdict", "accurate", "asked"),
    [
        ("Paris", False, 1.0, 0),
        ("the French capital", True, 1.0, 1),
        ("Rome", False, 0.0, 1),
        ("Rome", None, 0.0, 1),
        ("  ", True, 0.0, 0),
    ],
    ids=["span", "judge yes", "judge no", "abstention", "empty answer"],
)
async def test_the_judge_is_asked_only_without_a_span_match(
    answer: str, verdict: bool | None, accurate: float, asked: int
) -> None:
    judge = FakeJudge(verdict)
    scorer = Scorer(RewardConfig({"generation_accuracy": 1.0}), FakeGenerator(answer), judge)
    outcome = await scorer(trajectory(question(), FOUND))
    assert (outcome.score, judge.asked) == (accurate, asked)


async def test_equal_documents_cuts_what_the_generator_gets() -> None:
    generator = FakeGenerator(fits=1)
    outcome = await Scorer(RewardConfig(equal_documents=3), generator)(trajectory(question(), FOUND))
    assert generator.seen == [("q/1", FOUND[:3])]
    assert (outcome.parts["documents"], outcome.parts["documents_dropped"]) == (3, 2)


async def test_a_failed_trajectory_is_a_failed_outcome_and_asks_nobody() -> None:
    generator = FakeGenerator()
    lost = trajectory(question(), FOUND, Stop.FAILED, "retriever is down")
    outcome = await Scorer(RewardConfig(), generator)(lost)
    assert "retriever is down" in outcome.failed and math.isnan(outcome.score) and generator.seen == []


@pytest.mark.parametrize("terms", [{"gain": 1.0}, {"recall_of_gold": 1.0, "em": 1.0}])
async def test_a_failing_generator_is_a_failed_outcome(terms: dict[str, float]) -> None:
    outcome = await Scorer(RewardConfig(terms), FakeGenerator("!"))(trajectory(question(), FOUND))
    assert "http://here" in outcome.failed and math.isnan(outcome.score) and not outcome.correct


async def test_a_failing_judge_is_a_failed_outcome() -> None:
    scorer = Scorer(RewardConfig(), FakeGenerator("Rome"), FakeJudge(GeneratorError("judge is down")))
    outcome = await scorer(trajectory(question(), FOUND))
    assert outcome.failed == "judge is down" and math.isnan(outcome.score)


async def test_a_cause_without_words_is_still_a_failure() -> None:
    scorer = Scorer(RewardConfig(), FakeGenerator("Rome"), FakeJudge(GeneratorError()))
    assert (await scorer(trajectory(question(), FOUND))).failed


async def test_a_missing_baseline_is_a_failed_outcome() -> None:
    outcome = await Scorer(RewardConfig(), FakeGenerator())(trajectory(question(correct=None), FOUND))
    assert "baseline" in outcome.failed and math.isnan(outcome.score)


async def test_a_weighted_sum_asks_the_generator_once() -> None:
    generator = FakeGenerator("in Paris")
    terms = {"generation_accuracy": 1.0, "em": 2.0, "f1": 3.0, "recall_of_gold": 0.5, "answer_in_context": 1.0}
    terms |= {f"{__name__}.half": 0.2, f"{__name__}.Counting": 0.01}
    outcome = await Scorer(RewardConfig(terms), generator)(trajectory(question(), FOUND))
    # accuracy 1, em 0, f1 of "in paris" with "paris" 2/3, recall 2/2, no gold in the context, 0.5, 8 characters
    assert outcome.score == pytest.approx(1 + 0 + 3 * 2 / 3 + 0.5 + 0 + 0.1 + 0.08, abs=1e-12)
    assert outcome.parts[f"{__name__}.half"] == 0.5 and outcome.parts["length"] == 8
    assert len(generator.seen) == 1 and outcome.answer == "in Paris"


async def test_a_reward_of_documents_alone_asks_nobody() -> None:
    generator = FakeGenerator()
    outcome = await Scorer(RewardConfig({"recall_of_gold": 1.0}), generator)(trajectory(question(), FOUND))
    assert (outcome.score, outcome.answer, generator.seen) == (1.0, "", [])


async def test_a_score_that_is_no_number_is_a_failure() -> None:
    outcome = await Scorer(RewardConfig({f"{__name__}.undefined": 1.0}), FakeGenerator())(trajectory(question(), FOUND))
    assert "undefined" in outcome.failed


@pytest.mark.parametrize(
    ("gold_titles", "found", "expected"),
    [
        (("France", "Louvre"), ("Louvre",), 0.5),
        (("France", "France"), ("france",), 1.0),
        (("The The",), ("the the",), 1.0),
        (("The The",), ("A An",), 0.0),
        (("France",), (), 0.0),
        ((), ("France",), None),
    ],
)
def test_recall_of_gold_titles(gold_titles: tuple[str, ...], found: tuple[str, ...], expected: float | None) -> None:
    assert gold_recall(question(gold_titles=gold_titles), documents(*found)) == expected


def test_answer_in_context_reads_titles_and_texts_but_not_across_them() -> None:
    asked = question(golds=("New York",))
    assert answer_in_context(asked, [Document("1", "New York", "x")])
    assert answer_in_context(asked, [Document("1", "x", "It is in New York.")])
    assert not answer_in_context(asked, [Document("1", "New", "York"), Document("2", "x", "New Yorker")])
    assert not answer_in_context(asked, [])


async def test_recall_without_gold_titles_is_a_failed_outcome() -> None:
    scorer = Scorer(RewardConfig({"recall_of_gold": 1.0}), FakeGenerator())
    assert "gold titles" in (await scorer(trajectory(question(gold_titles=()), FOUND))).failed


GOOD = question("q/good")


@pytest.mark.parametrize(
    ("config", "bad", "message"),
    [
        (RewardConfig(), question("q/bad", correct=None), "1 of 2 questions have no naive-RAG baseline, first 'q/bad'"),
        (RewardConfig({"recall_of_gold": 1.0}), question("q/bad", gold_titles=()), "no gold titles, the first is"),
        (RewardConfig(equal_documents=3), question("q/bad", baseline_documents=8), "saw 8 documents"),
    ],
)
def test_validation_names_the_question(config: RewardConfig, bad: Question, message: str) -> None:
    scorer = Scorer(config, FakeGenerator())
    scorer.validate([GOOD])
    with pytest.raises(DataError, match=message):
        scorer.validate([GOOD, bad])


def test_validation_accepts_baselines_without_documents_and_rewards_without_needs() -> None:
    Scorer(RewardConfig(equal_documents=3), FakeGenerator()).validate([question(baseline_documents=0)])
    Scorer(RewardConfig({"em": 1.0}), FakeGenerator()).validate([question(correct=None, gold_titles=())])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gian", "did you mean 'gain'"),
        ("recall", "did you mean 'recall_of_gold'"),
        ("no.such.module", "cannot be imported"),
        (f"{__name__}.missing", "cannot be imported"),
        (f"{__name__}.NOT_A_REWARD", "is a int"),
    ],
)
def test_an_unknown_reward_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name, RewardConfig())


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"terms": {}}, "terms is empty"),
        ({"terms": {"gain": float("inf")}}, "finite"),
        ({"equal_documents": 0}, "equal_documents=0"),
        ({"gain": "papr"}, "did you mean 'paper'"),
        ({"term": {"gain": 1.0}}, "did you mean 'terms'"),
        ({"params": {"gian": {}}}, "params.gian belongs to no term; did you mean 'gain'"),
        ({"judge": "allways"}, "did you mean 'always'"),
        ({"entailment": {"modle": "x"}}, "did you mean 'entailment.model'"),
    ],
)
def test_a_wrong_setting_is_refused(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(RewardConfig, mapping)


LONG = f"{__name__}.LongAnswer"


def with_params(params: dict[str, object]) -> RewardConfig:
    return build(RewardConfig, {"terms": {LONG: 2.0}, "params": {LONG: params}})


@pytest.mark.parametrize(
    ("params", "score", "length"),
    [({"at_least": 2}, 2.0, 2.0), ({"at_least": 3}, 0.0, 2.0), ({"at_least": 3, "unit": "characters"}, 2.0, 8.0)],
)
async def test_a_custom_class_gets_its_parameters_and_its_tool(
    params: dict[str, object], score: float, length: float
) -> None:
    likelihood = FakeLikelihood({("in Paris", ("Louvre", "Seine", "France", "Rome")): (-1.0, -1.0, -1.0)})
    scorer = Scorer(with_params(params), FakeGenerator("in Paris"), tools=Tools(likelihood=likelihood))
    outcome = await scorer(trajectory(question(), FOUND))
    assert (outcome.score, outcome.parts["length"], outcome.parts["tokens"]) == (score, length, 3.0)
    scorer.validate([question(kind="1-hop")])
    with pytest.raises(DataError, match="no kind"):
        scorer.validate([question()])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_params({"at_leest": 2}), r"unknown key 'params\..*LongAnswer\.at_leest'; did you mean .*at_least'"),
        (with_params({"at_least": "2"}), "expected int"),
        (with_params({"at_least": 0}), r"params\..*LongAnswer: at_least=0; expected 1 or more"),
        (with_params({}), "missing required key .*at_least"),
        (with_params({"at_least": 1}), r"LongAnswer' needs likelihood, and there is none; pass Tools\("),
        (RewardConfig({"em": 1.0}, params={"em": {"strict": True}}), "'em' takes no parameters; drop them"),
        (RewardConfig({"gain": 1.0}, params={"gain": {"variant": "paper"}}), "set by the key gain"),
        (
            RewardConfig({f"{__name__}.Counting": 1.0}, params={f"{__name__}.Counting": {"x": 1}}),
            "Counting' takes no parameters; .* make the reward a frozen dataclass",
        ),
    ],
)
def test_wrong_parameters_and_missing_tools_are_named(config: RewardConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scorer(config, FakeGenerator())


async def test_sub_span_holds_inside_of_words() -> None:
    terms = {"sub_span": 1.0, "em": 0.0}
    outcome = await Scorer(RewardConfig(terms), FakeGenerator("Parisian"))(trajectory(question(), FOUND))
    assert (outcome.score, outcome.parts["sub_span"], outcome.parts["em"], outcome.correct) == (1.0, 1.0, 0.0, False)


def test_every_reward_is_in_the_table_of_the_module() -> None:
    table = [line.split("|")[1].strip(" `") for line in registry.__doc__.splitlines() if line.startswith("| `")]
    assert table == list(registry.REWARDS)


def test_settings_come_from_plain_yaml() -> None:
    config = build(RewardConfig, {"terms": {"gain": 1, "em": 0.1}, "gain": "paper", "equal_documents": 3})
    assert config == RewardConfig({"gain": 1.0, "em": 0.1}, "paper", 3)
    text = """
    terms: {semantic_perplexity: 1, search_cost: 0.05}
    params: {semantic_perplexity: {variant: released, samples: 4}, search_cost: {free: 1}}
    judge: always
    entailment: {model: some/nli, batch_size: 8}
    """
    config = build(RewardConfig, yaml.safe_load(text))
    tools = Tools(sampler=FakeSampler({}))
    Scorer(config, FakeGenerator(), FakeJudge(True), tools)
    assert resolve("semantic_perplexity", config) == SemanticPerplexity("released", 4)
    assert resolve("search_cost", config) == SearchCost(free=1)
    assert config.entailment == EntailmentConfig(model="some/nli", batch_size=8)
