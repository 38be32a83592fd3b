"""Rewards for the form of a trajectory, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rewards.fakes import FakeGenerator, documents, question, trajectory
from verl.config import build
from verl.errors import ConfigError
from verl.rewards.registry import RewardConfig, Scorer
from verl.types import SearchResult, Stop, Trajectory, Turn

FOUND = documents("Louvre")
SEARCH = Turn((), "", query="q", result=SearchResult("q", FOUND, (1.0,)))
INVALID = Turn((), "", invalid=True)
DONE = Turn((), "", finished=True)


def played(*turns: Turn, stop: Stop = Stop.FINISHED) -> Trajectory:
    return replace(trajectory(question(), FOUND, stop), turns=turns)


@pytest.mark.parametrize(
    ("term", "params", "turns", "stop", "score", "part"),
    [
        ("valid_format", {}, (SEARCH, DONE), Stop.FINISHED, 1.0, 1.0),
        ("valid_format", {}, (SEARCH, INVALID, DONE), Stop.FINISHED, 0.0, 0.0),
        ("valid_format", {}, (SEARCH, SEARCH), Stop.TURN_LIMIT, 0.0, 0.0),
        ("invalid_turns", {}, (INVALID, SEARCH, INVALID, DONE), Stop.FINISHED, -2.0, 2.0),
        ("invalid_turns", {}, (SEARCH, DONE), Stop.FINISHED, 0.0, 0.0),
        ("searches", {}, (SEARCH, SEARCH, DONE), Stop.FINISHED, -2.0, 2.0),
        ("searches", {"cost": 0.25, "free": 1}, (SEARCH, SEARCH, SEARCH), Stop.TURN_LIMIT, -0.5, 3.0),
        ("searches", {"cost": 0.25, "free": 4}, (SEARCH, SEARCH), Stop.FINISHED, 0.0, 2.0),
    ],
)
async def test_form(
    term: str, params: dict[str, float], turns: tuple[Turn, ...], stop: Stop, score: float, part: float
) -> None:
    name = "search_cost" if term == "searches" else term
    generator = FakeGenerator()
    config = RewardConfig({name: 1.0}, params={name: params} if params else {})
    outcome = await Scorer(config, generator)(played(*turns, stop=stop))
    assert (outcome.score, outcome.parts[term], generator.seen) == (score, part, [])


async def test_a_weighted_sum_with_costs() -> None:
    terms = {"generation_accuracy": 1.0, "search_cost": 0.1, "invalid_turns": 0.5, "valid_format": 0.2, "em": 0.0}
    outcome = await Scorer(RewardConfig(terms), FakeGenerator("in Paris"))(played(SEARCH, INVALID, SEARCH, DONE))
    assert outcome.score == pytest.approx(1.0 - 0.1 * 2 - 0.5 * 1 + 0.0, abs=1e-12)
    # A weight of 0 measures without paying.
    assert (outcome.parts["em"], outcome.parts["searches"]) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cost": -0.1}, r"params\.search_cost: cost=-0\.1; expected a finite number, 0 or more"),
        ({"cost": float("nan")}, "cost=nan"),
        ({"free": -1}, "free=-1"),
        ({"costs": 0.1}, r"unknown key 'params\.search_cost\.costs'; did you mean 'params\.search_cost\.cost'"),
        ({"cost": "much"}, "expected float"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, object], message: str) -> None:
    config = build(RewardConfig, {"terms": {"search_cost": 1.0}, "params": {"search_cost": params}})
    with pytest.raises(ConfigError, match=message):
        Scorer(config, FakeGenerator())
