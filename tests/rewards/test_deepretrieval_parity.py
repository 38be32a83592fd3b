"""DeepRetrieval's families A, B and C: what the released code pays for every tier and edge, and ours beside it.

The expectations are written down from the published rules. `released` is what `variant: released` has to pay, `ours`
what the default has to pay. Family D (SQL) has its own table; family E was never wired to a data set and is not built.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass

import pytest

from tests.rewards.fakes import FakeGenerator
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.config import build
from verl.rewards.registry import RewardConfig, Scorer
from verl.types import Document, Question, RewardOutcome, SearchResult, Stop, Trajectory, Turn

SQUAD = {"miss": -2.5, "unreadable": -3.0}
"""What SQuAD's published reward differs in."""


def scorer(term: str, variant: str, **params: object) -> Scorer:
    settings = {"terms": {term: 1.0}, "params": {term: {"variant": variant, **params}}}
    return Scorer(build(RewardConfig, settings), FakeGenerator())


def played(asked: Question, said: str, found: tuple[Document, ...], reasoning: bool = True) -> Trajectory:
    """Return what becomes of the policy's words where the engine finds `found` for any query."""
    action = DeepRetrievalGrammar(DeepRetrievalConfig(reasoning=reasoning)).parse(asked, (), said)
    result = None if action.query is None else SearchResult(action.query, found, (1.0,) * len(found))
    turn = Turn(
        (), said, action.query, finished=True, invalid=action.invalid, result=result, note=action.note,
        fault=action.fault,
    )  # fmt: skip
    return Trajectory(asked, (1,), (turn,), Stop.FINISHED, found)


def paid(term: str, variant: str, trajectory: Trajectory, **params: object) -> RewardOutcome:
    outcome = asyncio.run(scorer(term, variant, **params)(trajectory))
    assert not outcome.failed
    return outcome


def ids(*values: object) -> tuple[Document, ...]:
    return tuple(Document(str(value), "", "") for value in values)


# --- the form of an answer, where whatever could be searched for is found first -------------------------------------

ASKED = Question("nq_serini/test/0", "Where?", ("Paris",), "nq_serini")
SOUGHT = Question("scifact_test/test/0", "A claim.", ("7",), "scifact_test")
FOUND = (Document("7", "", "It is Paris."),)
LONG = "q OR " * 20_000 + "q"


@dataclass(frozen=True)
class Pay:
    """Released and ours for families A and B, for SQuAD's numbers, and for family C."""

    ab: tuple[float, float]
    squad: tuple[float, float]
    c: tuple[float, float]


READABLE = Pay((6.0, 6.0), (6.0, 6.0), (1.1, 1.1))
TAGS = Pay((-4.0, -4.0), (-4.0, -4.0), (-2.0, -2.0))
EMPTY = Pay((1.0, -4.0), (1.0, -4.0), (-2.0, -2.0))
NO_QUERY = Pay((-3.0, -4.0), (-2.0, -4.0), (-2.0, -2.0))
NO_TEXT = Pay((-3.0, -4.0), (-2.0, -4.0), (0.0, -2.0))  # family C looks for the key alone, and the search then fails

ANSWERS: dict[str, tuple[str, Pay]] = {
    "a query": ('{"query": "q"}', READABLE),
    "white space around it": (' \n{"query": " q "}\t', READABLE),
    "more keys": ('{"reason": [1, {"a": null}], "query": "q"}', READABLE),
    "key twice, the last counts": ('{"query": 5, "query": "q"}', READABLE),
    "operators, quotes, & and #": (json.dumps({"query": '("a b" OR c) & d=1#x AND \\ %26'}), READABLE),
    "escaped control characters": ('{"query": "a\\u0000\\n\\tb\\u0007"}', READABLE),
    "other scripts": ('{"query": "肺癌 ИЛИ سرطان OR 🫁"}', READABLE),
    "half a character": ('{"query": "a\\ud83d"}', READABLE),
    "100 kB": (json.dumps({"query": LONG}), READABLE),
    "nothing": ("", EMPTY),
    "white space": (" \n\t ", EMPTY),
    "bare words": ("q", NO_QUERY),
    "fenced JSON": ('```json\n{"query": "q"}\n```', NO_QUERY),
    "single quotes": ("{'query': 'q'}", NO_QUERY),
    "trailing comma": ('{"query": "q",}', NO_QUERY),
    "unfinished": ('{"query": "q"', NO_QUERY),
    "two objects": ('{"query": "q"} {"query": "q"}', NO_QUERY),
    "raw control character": ('{"query": "a\nb"}', NO_QUERY),
    "words before the JSON": ('Query: {"query": "q"}', NO_QUERY),
    "nested too deeply": ("[" * 100_000, NO_QUERY),
    "a text": ('"q"', NO_QUERY),
    "a list": ('["q"]', NO_QUERY),
    "a list of the object": ('[{"query": "q"}]', NO_QUERY),
    "an empty list": ("[]", NO_QUERY),
    "an empty object": ("{}", NO_QUERY),
    # The released family C ends the run at the next three with a TypeError; -2 is what it pays other malformed ones.
    "a number": ("5", NO_QUERY),
    "null": ("null", NO_QUERY),
    "true": ("true", NO_QUERY),
    "key missing": ('{"sql": "q"}', NO_QUERY),
    "key capitalised": ('{"Query": "q"}', NO_QUERY),
    "key within another": ('{"answer": {"query": "q"}}', NO_QUERY),
    "blank query": ('{"query": " "}', NO_TEXT),
    "empty query": ('{"query": ""}', NO_TEXT),
    "null as query": ('{"query": null}', NO_TEXT),
    "number as query": ('{"query": 5}', NO_TEXT),
    "list as query": ('{"query": ["q"]}', NO_TEXT),
    "object as query": ('{"query": {"query": "q"}}', NO_TEXT),
}


def check(said: str, pay: Pay, reasoning: bool) -> None:
    for variant, at in (("released", 0), ("corrected", 1)):
        recall = paid("retrieval_recall", variant, played(SOUGHT, said, FOUND, reasoning))
        rank = paid("first_hit_rank", variant, played(ASKED, said, FOUND, reasoning))
        squad = paid("first_hit_rank", variant, played(ASKED, said, FOUND, reasoning), **SQUAD)
        order = paid("ndcg", variant, played(SOUGHT, said, FOUND, reasoning))
        assert (recall.score, rank.score) == (pay.ab[at], pay.ab[at]), variant
        assert (squad.score, order.score) == (pay.squad[at], pytest.approx(pay.c[at])), variant
        for outcome in (recall, rank, squad, order):
            assert outcome.parts["format"] == float(pay is READABLE) == 1 - outcome.parts["format_error_ratio"]
            assert outcome.parts["tags"] == float(pay is not TAGS)
            assert outcome.parts["wrong_answer_ratio"] == 0


@pytest.mark.parametrize("name", ANSWERS)
def test_what_stands_between_the_answer_tags(name: str) -> None:
    inner, pay = ANSWERS[name]
    check(f"<think>hm</think><answer>{inner}</answer>", pay, reasoning=True)
    check(f"<answer>{inner}</answer>", pay, reasoning=False)


A = '<answer>{"query": "q"}</answer>'
AROUND: dict[str, tuple[str, Pay, Pay]] = {
    # name: (the policy's words, with reasoning, without)
    "as asked": (f"<think>hm</think>{A}", READABLE, READABLE),
    "text outside": (f"Well. <think>hm</think> So: {A} Done.", READABLE, READABLE),
    "no thought": (A, TAGS, READABLE),
    "thought not closed": (f"<think>hm {A}", TAGS, READABLE),
    "thought not opened": (f"hm</think>{A}", TAGS, READABLE),
    "thought twice": (f"<think>a</think><think>b</think>{A}", TAGS, READABLE),
    "thought after the answer": (f"{A}<think>hm</think>", TAGS, READABLE),
    "answer within the thought": (f"<think>hm{A}</think>", TAGS, READABLE),
    "thought tags reversed": (f"</think>hm<think>{A}", TAGS, READABLE),
    "answer twice": (f"<think>hm</think>{A}{A}", TAGS, TAGS),
    "answer opened twice": (f"<think>hm</think><answer>{A}", TAGS, TAGS),
    "answer closed twice": (f"<think>hm</think>{A}</answer>", TAGS, TAGS),
    "answer not closed": ('<think>hm</think><answer>{"query": "q"}', TAGS, TAGS),
    "answer not opened": ('<think>hm</think>{"query": "q"}</answer>', TAGS, TAGS),
    "answer tags reversed": ('<think>hm</think></answer>{"query": "q"}<answer>', TAGS, TAGS),
    "a tag in the query": ('<think>hm</think><answer>{"query": "a </answer> b"}</answer>', TAGS, TAGS),
    "other case": (f"<THINK>hm</THINK>{A}", TAGS, READABLE),
    "no tags": ('{"query": "q"}', TAGS, TAGS),
    "nothing": ("", TAGS, TAGS),
    "100 kB without a tag": (LONG, TAGS, TAGS),
}


@pytest.mark.parametrize("name", AROUND)
def test_tags(name: str) -> None:
    said, reasoned, bare = AROUND[name]
    check(said, reasoned, reasoning=True)
    check(said, bare, reasoning=False)


RIGHT = f"<think>hm</think>{A}"
VARIANTS = pytest.mark.parametrize("variant", ["released", "corrected"])


# --- family A: recall of 100 targets --------------------------------------------------------------------------------

REVIEW = Question("pubmed/test/0", "P: adults", tuple(map(str, range(100))), "pubmed")
RECALLS = {
    100: 6.0,
    70: 6.0,
    69: 5.0,
    50: 5.0,
    49: 4.0,
    40: 4.0,
    39: 2.0,
    30: 2.0,
    29: 1.5,
    10: 1.5,
    9: 1.1,
    5: 1.1,
    4: -2.5,
    0: -2.5,
}


@VARIANTS
@pytest.mark.parametrize("hits", RECALLS)
def test_tiers_of_recall(variant: str, hits: int) -> None:
    outcome = paid("retrieval_recall", variant, played(REVIEW, RIGHT, ids("x", *range(hits), *range(hits))))
    assert outcome.score == pytest.approx(RECALLS[hits])
    assert outcome.parts["wrong_answer_ratio"] == float(hits < 5)


@VARIANTS
def test_recall_is_of_the_first_3000(variant: str) -> None:
    behind = ids(*(f"x{n}" for n in range(2_930)), *range(100))
    assert paid("retrieval_recall", variant, played(REVIEW, RIGHT, behind)).parts["recall"] == 0.70


# --- family B: rank of the first passage with an answer -------------------------------------------------------------

# rank: (NQ and TriviaQA, SQuAD)
RANKS = {
    1: (6.0, 6.0),
    5: (6.0, 6.0),
    6: (5.0, 5.0),
    20: (5.0, 5.0),
    21: (3.0, 3.0),
    50: (3.0, 3.0),
    51: (2.0, 2.0),
    100: (2.0, 2.0),
    101: (1.5, 1.5),
    1000: (1.5, 1.5),
    1001: (1.1, 1.1),
    3000: (1.1, 1.1),
    3001: (-2.5, -1.5),
    None: (-2.5, -1.5),
}


@VARIANTS
@pytest.mark.parametrize("rank", RANKS)
def test_tiers_of_rank(variant: str, rank: int | None) -> None:
    found = tuple(Document(str(n), "Paris", "In paris!" if n == rank else "No.") for n in range(1, 3100))
    trajectory = played(ASKED, RIGHT, found)
    usual, squad = RANKS[rank]
    assert paid("first_hit_rank", variant, trajectory).score == pytest.approx(usual)
    outcome = paid("first_hit_rank", variant, trajectory, **SQUAD)
    assert outcome.score == pytest.approx(squad)
    for k in (1, 5, 10, 20, 50, 100, 1000, 3000):  # the released monitor of 50 looked at the wrong tier
        assert outcome.parts[f"hit@{k}"] == float(rank is not None and rank <= k)


# --- family C: NDCG ---------------------------------------------------------------------------------------------------


def judged(source: str, **grades: int) -> Question:
    relevant = tuple(id for id, grade in grades.items() if grade > 0)
    graded = any(grade != 1 for grade in grades.values())
    return Question(f"{source}/x/0", "?", relevant, source, extra={"grades": json.dumps(grades)} if graded else {})


LOG = math.log2
ONE = judged("scifact_test", a=1)
GRADED = judged("nfcorpus_test", a=1, b=2)
DEEP = tuple(f"x{n}" for n in range(9))
# name: (question, ids found, released, ours)
ORDERS: dict[str, tuple[Question, tuple[str, ...], float, float]] = {
    "first": (ONE, ("a", "x"), 1.1, 1.1),
    "second": (ONE, ("x", "a"), 0.1 + 1 / LOG(3), 0.1 + 1 / LOG(3)),
    "third": (ONE, ("x", "y", "a"), 0.6, 0.6),
    "tenth, the last that counts": (ONE, (*DEEP, "a"), 0.1 + 1 / LOG(11), 0.1 + 1 / LOG(11)),
    "eleventh": (ONE, ("y", *DEEP, "a"), 0.0, 0.0),
    "none": (ONE, ("x",), 0.0, 0.0),
    "nothing found": (ONE, (), 0.0, 0.0),
    "twice": (ONE, ("a", "a"), 1.1 + 1 / LOG(3), 1.1),
    "another one twice before it": (ONE, ("x", "x", "a"), 0.6, 0.1 + 1 / LOG(3)),
    "best order, judgements in another": (GRADED, ("b", "a"), 0.1 + (2 + 1 / LOG(3)) / (1 + 2 / LOG(3)), 1.1),
    "order of the judgements": (GRADED, ("a", "b"), 1.1, 0.1 + (1 + 2 / LOG(3)) / (2 + 1 / LOG(3))),
    "linear gain": (GRADED, ("b",), 0.1 + 2 / (1 + 2 / LOG(3)), 0.1 + 2 / (2 + 1 / LOG(3))),
    "grade 0 takes a place in the released ideal": (
        judged("msmarco_beir_test", a=0, b=1), ("b",), 0.1 + LOG(3), 1.1
    ),
    "grade 0 found": (judged("msmarco_beir_test", a=0, b=1), ("a",), 0.0, 0.0),
    "several relevant, one row": (
        judged("scifact_test", a=1, b=1), ("b",), 0.1 + 1 / (1 + 1 / LOG(3)), 0.1 + 1 / (1 + 1 / LOG(3))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_orders(name: str) -> None:
    asked, found, released, ours = ORDERS[name]
    trajectory = played(asked, RIGHT, ids(*found))
    assert paid("ndcg", "released", trajectory).score == pytest.approx(released, abs=1e-12)
    outcome = paid("ndcg", "corrected", trajectory)
    assert outcome.score == pytest.approx(ours, abs=1e-12)
    assert outcome.parts["ndcg"] == pytest.approx(ours and ours - 0.1, abs=1e-12)
    assert outcome.parts["wrong_answer_ratio"] == float(ours == 0)


def test_the_published_example_of_an_ndcg_above_one() -> None:
    trajectory = played(GRADED, RIGHT, ids("b", "a"))
    assert paid("ndcg", "released", trajectory).parts["ndcg"] == pytest.approx(1.163, abs=5e-4)


CUTOFFS = {
    "scifact_train": 50,
    "fever_train": 1000,
    "nfcorpus_train": 1000,
    "fiqa_train": 1000,
    "msmarco_beir_train": 1000,
    "hotpotqa_train": 3000,
    "scifact_dense_train": 1000,
    "fever_dense_train": 1000,
    "nfcorpus_dense_train": 100,
    "hotpotqa_dense_train": 1000,
    "msmarco_beir_dense_train": 1000,
    "msmarco_sparse_train": 10,
    "msmarco_dense_train": 10,
    **{f"{name}_{split}": 10 for name in ("scifact", "hotpotqa", "fever_dense") for split in ("val", "test")},
}


@VARIANTS
@pytest.mark.parametrize("source", CUTOFFS)
def test_cutoffs(variant: str, source: str) -> None:
    k = CUTOFFS[source]
    before = [f"x{n}" for n in range(k)]
    last = paid("ndcg", variant, played(judged(source, a=1), RIGHT, ids(*before[:-1], "a")))
    assert last.score == pytest.approx(0.1 + 1 / LOG(k + 1), abs=1e-12)
    assert paid("ndcg", variant, played(judged(source, a=1), RIGHT, ids(*before, "a"))).score == 0.0


# --- an engine that is down -------------------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize("term", ["retrieval_recall", "first_hit_rank", "ndcg"])
def test_a_search_that_fails_has_no_score(variant: str, term: str) -> None:
    """The released code pays -3 (A, B), -2 (SQuAD) or 0 (C); a failure of a service is no fault of the policy."""
    down = Trajectory(ASKED, (1,), (), Stop.FAILED, error="RetrieverError: status 500")
    outcome = asyncio.run(scorer(term, variant)(down))
    assert "status 500" in outcome.failed and math.isnan(outcome.score)
