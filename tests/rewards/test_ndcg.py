"""NDCG as a reward: judgements, parameters, and its agreement with trec_eval."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from tests.rewards.fakes import FakeGenerator
from verl.config import build
from verl.errors import ConfigError, DataError
from verl.rewards.evidence import Evidence
from verl.rewards.ndcg import Ndcg, judged, ndcg
from verl.rewards.registry import RewardConfig, Scorer, resolve
from verl.types import Document, Question, SearchResult, Stop, Trajectory, Turn


def asked(grades: object = None, *answers: str) -> Question:
    extra = {} if grades is None else {"grades": grades if isinstance(grades, str) else json.dumps(grades)}
    return Question("s/test/0", "?", answers or ("a",), "scifact_train", extra=extra)


def ids(*values: str) -> tuple[Document, ...]:
    return tuple(Document(value, "", "") for value in values)


def found(question: Question, *values: str) -> Trajectory:
    turn = Turn((), "", "q", finished=True, result=SearchResult("q", ids(*values), (1.0,) * len(values)))
    return Trajectory(question, (), (turn,), Stop.FINISHED)


def test_judgements() -> None:
    assert judged(asked(None, "a", "b")) == {"a": 1, "b": 1}
    assert list(judged(asked({"b": 2, "a": 1, "c": 0}, "a", "b")).items()) == [("b", 2), ("a", 1), ("c", 0)]


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ("{", "expected a JSON object of whole grades"),
        ("[1]", "expected a JSON object"),
        ({"a": "1"}, "expected a JSON object"),
        ({"a": True}, "expected a JSON object"),
        ({"a": 0}, "expected one above 0"),
        ({"b": 1}, "a grade for each of the answers"),
    ],
)
def test_judgements_that_are_none(grades: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Ndcg().validate([asked(grades)])
    outcome = asyncio.run(Ndcg()(Evidence(found(asked(grades), "a"), (), FakeGenerator())))
    assert "extra.grades" in outcome.failed and math.isnan(outcome.score)


GRADES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 4), min_size=1).filter(lambda g: max(g.values()))


@given(GRADES, st.permutations("abcdefghij"), st.integers(1, 12))
def test_ours_is_that_of_trec_eval(grades: dict[str, int], order: list[str], k: int) -> None:
    run = {"q": {id: float(-rank) for rank, id in enumerate(order)}}
    expected = pytrec_eval.RelevanceEvaluator({"q": grades}, {f"ndcg_cut.{k}"}).evaluate(run)["q"][f"ndcg_cut_{k}"]
    assert ndcg(grades, ids(*order), k) == pytest.approx(expected, abs=1e-9)


@given(GRADES, st.lists(st.sampled_from("abcdefghij"), max_size=30), st.integers(1, 12))
def test_ours_stays_within_its_bounds(grades: dict[str, int], order: list[str], k: int) -> None:
    value = ndcg(grades, ids(*order), k)
    assert 0 <= value <= 1 + 1e-12
    assert value == pytest.approx(ndcg(grades, ids(*dict.fromkeys(order)), k), abs=0)
    assert ndcg(grades, ids(*order), k, "released") >= 0


def test_parameters_from_yaml() -> None:
    params = {"train_k": {"scifact": 2}, "well_formed": 0.0, "malformed": -1.0, "eval_k": 1, "k": 3}
    config = build(RewardConfig, {"terms": {"ndcg": 1.0}, "params": {"ndcg": params}})
    reward = resolve("ndcg", config)
    assert isinstance(reward, Ndcg)
    cut = {"scifact_train": 2, "scifact_test": 1, "scifact_val": 1, "fever_train": 3, "retrieval_train": 3, "other": 3}
    assert {source: reward.cutoff(source) for source in cut} == cut
    outcome = asyncio.run(Scorer(config, FakeGenerator())(found(asked(), "x", "a")))
    assert outcome.score == pytest.approx(1 / math.log2(3))
    assert asyncio.run(Scorer(config, FakeGenerator())(found(asked(), "x", "y", "a"))).score == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"k": 0}, "k=0; expected a cutoff of at least 1"),
        ({"train_k": {"fever": 0}}, "fever=0"),
        ({"malformed": 0.0}, r"malformed=0\.0 is not below 0\.0"),
        ({"miss": -3.0}, r"not below -3\.0"),
        ({"well_formed": float("inf")}, "expected finite numbers"),
        ({"variant": "fixed"}, "one of 'corrected', 'released'"),
        ({"tiers": []}, "unknown key"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("ndcg", build(RewardConfig, {"terms": {"ndcg": 1.0}, "params": {"ndcg": params}}))


def test_no_query_has_no_score() -> None:
    empty = Trajectory(asked(), (), (), Stop.LENGTH)
    assert "no turn" in asyncio.run(Ndcg()(Evidence(empty, (), FakeGenerator()))).failed
