"""DeepRetrieval's families A and B: every tier and edge of the published rewards, and ours beside them.

The turns are what the real grammar makes of a text, so that form is judged on what it really notes.
"""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rewards.fakes import FakeGenerator
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.config import build
from verl.errors import ConfigError
from verl.rewards.evidence import Evidence
from verl.rewards.rank import FirstHitRank, QueryReward, RetrievalRecall, distinct, first_hit, form_of, id_recall
from verl.rewards.registry import RewardConfig, Scorer
from verl.rewards.text import has_answer
from verl.types import Document, Question, RewardOutcome, SearchResult, Stop, Trajectory, Turn

RECALL = "verl.rewards.rank.RetrievalRecall"
RANK = "verl.rewards.rank.FirstHitRank"
RIGHT = '<think>hm</think><answer>{"query": "q"}</answer>'
TARGETS = tuple(str(number) for number in range(100))
QUESTION = Question("pubmed/test/0", "P: adults", TARGETS, "pubmed")
ASKED = Question("nq/test/0", "Where?", ("Paris", "City of Light"), "nq")


def turn(text: str, reasoning: bool = True, prefill: bool = False, fall_back: bool = False) -> Turn:
    grammar = DeepRetrievalGrammar(DeepRetrievalConfig(reasoning=reasoning, prefill=prefill, fall_back=fall_back))
    action = grammar.parse(QUESTION, (), text)
    return Turn((), text, action.query, finished=True, invalid=action.invalid, note=action.note)


def played(
    found: tuple[Document, ...] | None, text: str = RIGHT, asked: Question = QUESTION, **config: bool
) -> Trajectory:
    said = turn(text, **config)
    result = None if said.query is None or found is None else SearchResult(said.query, found, (1.0,) * len(found))
    last = Turn((), said.text, said.query, finished=True, invalid=said.invalid, note=said.note, result=result)
    return Trajectory(asked, (1, 2), (last,), Stop.FINISHED, found or ())


def score(reward: QueryReward, trajectory: Trajectory) -> RewardOutcome:
    return asyncio.run(reward(Evidence(trajectory, trajectory.documents, FakeGenerator())))


def ids(*values: int | str) -> tuple[Document, ...]:
    return tuple(Document(str(value), "", "") for value in values)


def hit_at(rank: int | None, size: int = 3000) -> tuple[Document, ...]:
    """Return documents of which the one at `rank`, from 1, holds an answer."""
    return tuple(
        Document(str(n), "Paris", "It lies in Paris, France." if n == rank else "Nothing.") for n in range(1, size + 1)
    )


FORMS = [
    ("", 0, -4.0),
    ("no tags at all", 0, -4.0),
    ('<answer>{"query": "q"}</answer>', 0, -4.0),
    (RIGHT * 2, 0, -4.0),
    ('<answer>{"query": "q"}</answer><think>hm</think>', 0, -4.0),
    ('<think>hm</think><answer>{"query": "q"}', 0, -4.0),
    ("<think>hm</think><answer></answer>", 1, 1.0),
    ("<think>hm</think><answer> \n\t</answer>", 1, 1.0),
    ("<think>hm</think><answer>q</answer>", 1, -3.0),
    ('<think>hm</think><answer>```json\n{"query": "q"}\n```</answer>', 1, -3.0),
    ("<think>hm</think><answer>5</answer>", 1, -3.0),
    ("<think>hm</think><answer>null</answer>", 1, -3.0),
    ('<think>hm</think><answer>["q"]</answer>', 1, -3.0),
    ('<think>hm</think><answer>{"Query": "q"}</answer>', 1, -3.0),
    ('<think>hm</think><answer>{"query": 5}</answer>', 1, -3.0),
    ('<think>hm</think><answer>{"query": " "}</answer>', 1, -3.0),
    ('<think>hm</think><answer>{"query": {"query": "q"}}</answer>', 1, -3.0),
]


@pytest.mark.parametrize("family", [RetrievalRecall, FirstHitRank])
@pytest.mark.parametrize(("text", "tags", "released"), FORMS)
def test_what_cannot_be_read(family: type[QueryReward], text: str, tags: int, released: float) -> None:
    paid = {variant: score(family(variant=variant), played(None, text)) for variant in ("released", "corrected")}
    assert (paid["released"].score, paid["corrected"].score) == (released, -4.0)
    for outcome in paid.values():
        assert (outcome.parts["format"], outcome.parts["tags"], outcome.failed) == (0.0, float(tags), "")
        assert outcome.parts["format_error_ratio"] == 1.0
        rest = [value for name, value in outcome.parts.items() if name not in ("tags", "format_error_ratio")]
        assert not any(rest)


@pytest.mark.parametrize(("text", "tags", "released"), FORMS[6:])
def test_the_same_without_reasoning_and_with_a_prefilled_tag(text: str, tags: int, released: float) -> None:
    reward = RetrievalRecall(variant="released")
    answer = text.removeprefix("<think>hm</think>")
    assert score(reward, played(None, answer, reasoning=False)).score == released
    prefilled = played(None, answer.removeprefix("<answer>"), reasoning=False, prefill=True)
    assert score(reward, prefilled).score == released
    assert score(reward, played(None, text.removeprefix("<think>"), prefill=True)).score == released


# recall over 100 targets, what released and corrected pay by tier, and continuously: -2.5 + 8.5 recall
RECALLS = [
    (100, 6.0, 6.0),
    (71, 6.0, 3.535),
    (70, 6.0, 3.45),
    (69, 5.0, 3.365),
    (50, 5.0, 1.75),
    (49, 4.0, 1.665),
    (40, 4.0, 0.9),
    (39, 2.0, 0.815),
    (30, 2.0, 0.05),
    (29, 1.5, -0.035),
    (10, 1.5, -1.65),
    (9, 1.1, -1.735),
    (5, 1.1, -2.075),
    (4, -2.5, -2.16),
    (0, -2.5, -2.5),
]


@pytest.mark.parametrize(("hits", "tiers", "continuous"), RECALLS)
def test_recall(hits: int, tiers: float, continuous: float) -> None:
    trajectory = played(ids(*range(hits), "other"))
    for variant in ("released", "corrected"):
        outcome = score(RetrievalRecall(variant=variant), trajectory)
        assert outcome.score == pytest.approx(tiers, abs=1e-12)
        assert outcome.parts == {
            "recall": hits / 100,
            "format": 1.0,
            "tags": 1.0,
            "format_error_ratio": 0.0,
            "wrong_answer_ratio": float(hits < 5),
            **{f"{tier}_recall_ratio": float(hits >= tier) for tier in (70, 50, 40, 30, 10, 5)},
        }
    graded = score(RetrievalRecall(grading="continuous"), trajectory)
    assert graded.score == pytest.approx(continuous, abs=1e-12)
    assert graded.parts["wrong_answer_ratio"] == float(hits < 5)


@pytest.mark.parametrize("wanted", range(1, 60))
def test_no_tier_is_missed_by_rounding(wanted: int) -> None:
    question = Question("pubmed/test/0", "P", tuple(str(n) for n in range(wanted)), "pubmed")
    for hits in range(wanted + 1):
        paid = score(RetrievalRecall(), played(ids(*range(hits)), asked=question)).score
        reached = [
            pay
            for percent, pay in ((70, 6), (50, 5), (40, 4), (30, 2), (10, 1.5), (5, 1.1))
            if hits * 100 >= percent * wanted
        ]
        assert paid == pytest.approx(reached[0] if reached else -2.5, abs=1e-12)


def test_recall_looks_at_the_first_documents_and_counts_each_target_once() -> None:
    far = played(ids(*(f"x{n}" for n in range(2999)), 0, *range(1, 100)))
    assert score(RetrievalRecall(), far).parts["recall"] == 0.01, "the first 3,000"
    assert score(RetrievalRecall(topk=5000), far).parts["recall"] == 1.0
    assert id_recall(("1", "2", "2", " 1 "), ids("1", "1", "3", "1")) == 0.5
    assert score(RetrievalRecall(), played(())).score == -2.5, "nothing found is a miss, above anything unreadable"


# rank of the first hit, and what families' tables pay for it; SQuAD's differs where there is none
RANKS = [
    (1, 6.0),
    (5, 6.0),
    (6, 5.0),
    (20, 5.0),
    (21, 3.0),
    (50, 3.0),
    (51, 2.0),
    (100, 2.0),
    (101, 1.5),
    (1000, 1.5),
    (1001, 1.1),
    (3000, 1.1),
    (3001, -2.5),
    (None, -2.5),
]


@pytest.mark.parametrize(("rank", "paid"), RANKS)
def test_rank(rank: int | None, paid: float) -> None:
    trajectory = played(hit_at(rank, 3100), asked=ASKED)
    for variant in ("released", "corrected"):
        outcome = score(FirstHitRank(variant=variant), trajectory)
        assert outcome.score == pytest.approx(paid, abs=1e-12)
        seen = rank is not None and rank <= 3000
        expected = {f"hit@{k}": float(seen and rank <= k) for k in (1, 5, 10, 20, 50, 100, 1000, 3000)}
        assert outcome.parts == {
            **expected,
            "format": 1.0,
            "tags": 1.0,
            "format_error_ratio": 0.0,
            "wrong_answer_ratio": float(not seen),
            **({"rank": float(rank)} if seen else {}),
        }


@pytest.mark.parametrize(
    ("text", "released", "corrected"),
    [(FORMS[0][0], -4.0, -4.0), (FORMS[6][0], 1.0, -4.0), (FORMS[8][0], -2.0, -4.0), (RIGHT, -1.5, -1.5)],
)
def test_squad(text: str, released: float, corrected: float) -> None:
    params = {"miss": -2.5, "unreadable": -3.0}
    trajectory = played(hit_at(None, 10), text, ASKED)
    assert score(FirstHitRank("released", **params), trajectory).score == released
    assert score(FirstHitRank(**params), trajectory).score == corrected


def test_a_document_that_comes_again_takes_no_rank() -> None:
    again = hit_at(2, 1) * 5 + hit_at(2, 2)
    trajectory = played(again, asked=ASKED)
    assert score(FirstHitRank("released"), trajectory).parts["rank"] == 7
    assert score(FirstHitRank("corrected"), trajectory).parts["rank"] == 2
    first, second, third = hit_at(None, 3)
    assert distinct((first, second, first, third, second)) == (first, second, third)


def test_only_the_text_counts_as_a_passage() -> None:
    title_alone = (Document("1", "Paris", "A city."), Document("2", "", "the city of\nlight"))
    assert first_hit(ASKED.answers, title_alone) == 2
    assert first_hit(("!", "Paris."), (Document("1", "", "Paris is"),)) is None
    assert first_hit(("par", "is", ""), (Document("1", "", "Paris"), Document("2", "", ""))) is None


WORDS = st.lists(st.sampled_from(["a", "B", "é", "e\u0301", "-", "'s", "\u03a3", "12", "\t", "哮", "."]), max_size=6)


@given(st.lists(WORDS.map(" ".join), max_size=4), st.lists(WORDS.map("".join), min_size=1, max_size=3))
def test_a_hit_is_what_has_answer_says(texts: list[str], answers: list[str]) -> None:
    documents = tuple(Document(str(n), "", text) for n, text in enumerate(texts))
    expected = [rank for rank, text in enumerate(texts, start=1) if has_answer(text, answers)]
    assert first_hit(answers, documents) == (expected[0] if expected else None)


@given(st.text(), st.text())
def test_a_hit_is_what_has_answer_says_of_any_text(text: str, answer: str) -> None:
    document = Document("1", "", text)
    assert (first_hit([answer], [document]) == 1) == has_answer(text, [answer])


def test_what_the_question_itself_found_earns_nothing() -> None:
    trajectory = played(ids(*range(100)), "no tags", fall_back=True)
    assert trajectory.turns[0].result is not None
    outcome = score(RetrievalRecall(), trajectory)
    assert (outcome.score, outcome.parts["recall"], outcome.parts["format"]) == (-4.0, 0.0, 0.0)


def test_length_is_never_rewarded() -> None:
    found = ids(*range(60))
    long = "<think>" + "hm " * 5000 + '</think><answer>{"query": "' + "q OR " * 5000 + 'q"}</answer>'
    for variant in ("released", "corrected"):
        reward = RetrievalRecall(variant)
        assert score(reward, played(found, long)).score == score(reward, played(found)).score
        # Nor does it matter how much is found besides.
        assert score(reward, played((*found, *ids(*(f"x{n}" for n in range(2000)))))).score == 5.0


def test_an_empty_answer_pays_least_in_every_corrected_reward() -> None:
    empty = played(None, "<think>hm</think><answer></answer>")
    for reward in (RetrievalRecall(), RetrievalRecall(grading="continuous"), FirstHitRank(), FirstHitRank(miss=-2.5)):
        assert score(reward, empty).score < score(reward, played(())).score


@pytest.mark.parametrize("term", [RECALL, RANK])
async def test_failures_have_no_score(term: str) -> None:
    scorer = Scorer(RewardConfig({term: 1.0}), FakeGenerator())
    down = Trajectory(QUESTION, (1,), (), Stop.FAILED, error="RetrieverError: pubmed: status 500")
    refused = Trajectory(QUESTION, (1,), (), Stop.LENGTH)
    sql = Trajectory(QUESTION, (1,), (Turn((), "SELECT 1", finished=True, answer="SELECT 1"),), Stop.FINISHED)
    for trajectory, cause in ((down, "status 500"), (refused, "no turn"), (sql, "no search result")):
        outcome = await scorer(trajectory)
        assert cause in outcome.failed and math.isnan(outcome.score)


async def test_by_name_with_parameters_from_yaml() -> None:
    config = build(
        RewardConfig,
        {
            "terms": {RECALL: 1.0},
            "params": {RECALL: {"tiers": [[0.5, 2], [0.25, 1]], "miss": -1, "well_formed": 0, "malformed": -2}},
        },
    )
    scorer = Scorer(config, FakeGenerator())
    paid = [(await scorer(played(ids(*range(hits))))).score for hits in (50, 49, 25, 24)]
    assert paid == [2.0, 1.0, 1.0, -1.0]
    outcome = await scorer(played(ids(*range(50))))
    assert (outcome.parts["50_recall_ratio"], outcome.parts["25_recall_ratio"]) == (1.0, 1.0)
    assert (await scorer(played(None, ""))).score == -2.0


@pytest.mark.parametrize(
    ("term", "params", "message"),
    [
        (RECALL, {"variant": "fixed"}, "one of 'corrected', 'released'"),
        (RECALL, {"tiers": []}, "expected ones above 0"),
        (RECALL, {"tiers": [[0.5, 1], [0.7, 2]]}, "from the highest"),
        (RECALL, {"tiers": [[70, 5]]}, "up to 1"),
        (RECALL, {"tiers": [[0.5, 1, 2]]}, "a list of exactly"),
        (RECALL, {"topk": 0}, "topk=0; expected at least 1"),
        (RECALL, {"miss": float("nan")}, "expected finite numbers"),
        (RECALL, {"malformed": -2.5}, r"malformed=-2\.5 is not below -2\.5"),
        (RANK, {"tiers": [[20, 4], [5, 5]]}, "from the best"),
        (RANK, {"tiers": [[0, 5]]}, "from 1"),
        (RANK, {"tiers": [[5, -9.0]]}, r"malformed=-4\.0 is not below -8\.0"),
        (RANK, {"grading": "continuous"}, "unknown key"),
    ],
)
def test_wrong_parameters_are_refused(term: str, params: dict[str, object], message: str) -> None:
    config = build(RewardConfig, {"terms": {term: 1.0}, "params": {term: params}})
    with pytest.raises(ConfigError, match=message):
        Scorer(config, FakeGenerator())


def test_released_payments_may_be_anything() -> None:
    reward = RetrievalRecall("released", malformed=0.0)
    assert score(reward, played(None, "")).score == 0.0
    assert RetrievalRecall().malformed == -4.0


def test_a_turn_of_another_protocol_without_a_note_has_wrong_tags() -> None:
    assert form_of(Turn((), "<answer>x</answer>", invalid=True)) == "tags"
