"""Accuracy by span match and judge: who is asked when, what is paid, and what is reported of the judge."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.rewards.fakes import FakeAnswered, FakeGenerator, FakeJudge, documents, question, trajectory
from verl.errors import ConfigError, GeneratorError
from verl.rewards.evidence import Evidence, Judging, Tools, Verdict, judge_answer
from verl.rewards.registry import RewardConfig, Scorer

FOUND = documents("Louvre")
YES, NO, ABSTAINED = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def counted(verdict: tuple[float, float, float], failed: float = 0.0) -> dict[str, float]:
    return dict(zip(("judged_yes", "judged_no", "judge_abstained"), verdict, strict=True)) | {"judge_failed": failed}


@pytest.mark.parametrize(
    ("judging", "answer", "judged", "correct", "asked", "parts"),
    [
        ("when_needed", "in Paris", False, True, 0, {}),
        ("when_needed", "the capital", True, True, 1, counted(YES)),
        ("when_needed", "Rome", False, False, 1, counted(NO)),
        ("when_needed", "Rome", None, False, 1, counted(ABSTAINED)),
        ("always", "in Paris", True, True, 1, counted(YES) | {"judge_agrees_with_span": 1.0, "judge_agreement": 1.0}),
        ("always", "in Paris", False, True, 1, counted(NO) | {"judge_agrees_with_span": 0.0, "judge_agreement": 0.0}),
        ("always", "in Paris", None, True, 1, counted(ABSTAINED)),
        ("always", "the capital", True, True, 1, counted(YES) | {"judge_agrees_with_span": 0.0}),
        ("always", "Rome", False, False, 1, counted(NO) | {"judge_agrees_with_span": 1.0}),
        ("always", "Rome", None, False, 1, counted(ABSTAINED)),
        ("always", " \n", True, False, 0, {}),
    ],
)
async def test_who_is_asked_what_is_paid_and_what_is_counted(
    judging: Judging, answer: str, judged: bool | None, correct: bool, asked: int, parts: Mapping[str, float]
) -> None:
    judge = FakeJudge(judged)
    scorer = Scorer(RewardConfig({"generation_accuracy": 1.0}, judge=judging), FakeGenerator(answer), judge)
    outcome = await scorer(trajectory(question(), FOUND))
    assert (outcome.score, outcome.correct, judge.asked) == (float(correct), correct, asked)
    assert {name: value for name, value in outcome.parts.items() if name.startswith("judge")} == parts


async def test_a_judge_that_fails_where_the_span_has_settled_it_is_counted_and_costs_nothing() -> None:
    judge = FakeJudge(GeneratorError("judge is down"))
    verdict = await judge_answer(question(), FakeAnswered("in Paris", 1), judge, "always")
    assert verdict == Verdict("in Paris", True, True, None, 1, judge_asked=True, judge_failed=True)
    assert verdict.judge_parts("always") == counted((0.0, 0.0, 0.0), failed=1.0)
    with pytest.raises(GeneratorError, match="judge is down"):
        await judge_answer(question(), FakeAnswered("Rome", 1), judge, "always")


async def test_rates_over_several_answers() -> None:
    # Span yes and judged yes, yes, no; span no and judged yes: it agrees in 2 of 4, and says yes to 2 of 3 spans.
    pairs = [("Paris", True), ("Paris", True), ("Paris", False), ("the capital", True)]
    verdicts = [await judge_answer(question(), FakeAnswered(a, 1), FakeJudge(j), "always") for a, j in pairs]
    parts = [verdict.judge_parts("always") for verdict in verdicts]
    agreement = [part["judge_agreement"] for part in parts if "judge_agreement" in part]
    assert sum(part["judge_agrees_with_span"] for part in parts) / 4 == 0.5
    assert (sum(agreement), len(agreement)) == (2.0, 3)


def test_always_without_a_judge_is_refused() -> None:
    with pytest.raises(ConfigError, match="judge=always, but no judge"):
        Scorer(RewardConfig(judge="always"), FakeGenerator())


@pytest.mark.parametrize("tool", ["likelihood", "sampler", "entailment"])
def test_evidence_without_a_tool_says_how_to_get_it(tool: str) -> None:
    evidence = Evidence(trajectory(question(), FOUND), FOUND, FakeGenerator(), tools=Tools())
    with pytest.raises(ConfigError, match=f"needs {tool}, and there is none; "):
        getattr(evidence, tool)
