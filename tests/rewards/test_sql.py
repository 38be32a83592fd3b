"""DeepRetrieval's families D and D': every tier and edge of the published payments, and ours beside them.

The turns are what the real grammar makes of a text, and the statements run in the real engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.retrieval.engines.sql_support import SPIDER, engine, make_database, needs_spider, spider_rows
from tests.rewards.fakes import FakeGenerator
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.config import build
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.engines.sql import SqlEngine
from verl.rewards.evidence import Evidence, Tools
from verl.rewards.registry import RewardConfig, Scorer
from verl.rewards.sql import KINDS, ExecutionAccuracy
from verl.types import Question, RewardOutcome, SqlResult, Stop, Trajectory, Turn

GOLD = "SELECT name FROM singer WHERE age = 30"
NOTHING = "SELECT name FROM singer WHERE age = 99"
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
MANY = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 900) SELECT x FROM c"


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqlEngine]:
    folder = tmp_path_factory.mktemp("databases")
    make_database(folder / "toy.sqlite")
    made = engine(folder, timeout_s=0.3, max_rows=500, workers=1)
    yield made
    made.close()


def asked(gold: str = GOLD, source: str = "bird") -> Question:
    return Question("bird/train/0", "Who is 30?", (gold,), source, extra={"db_id": "toy", "sql": gold})


def played(text: str, question: Question, reasoning: bool = True) -> Trajectory:
    grammar = DeepRetrievalGrammar(DeepRetrievalConfig(task="sql", reasoning=reasoning))
    action = grammar.parse(question, (), text)
    turn = Turn(
        (), text, finished=True, invalid=action.invalid, answer=action.answer, note=action.note, fault=action.fault
    )
    return Trajectory(question, (1, 2), (turn,), Stop.FINISHED)


def said(value: Any, reasoning: bool = True) -> str:
    return f"{'<think>hm</think>' * reasoning}<answer>{json.dumps({'sql': value})}</answer>"


def score(reward: ExecutionAccuracy, trajectory: Trajectory, sql: Any) -> RewardOutcome:
    return asyncio.run(reward(Evidence(trajectory, (), FakeGenerator(), tools=Tools(sql=sql))))


# An answer, the gold, and what it is paid in all: by bird, spider and bird_no_reason, released and corrected each.
# What is malformed, wrong, or right:
PAID: list[tuple[str, Any, str, tuple[float, float, float], tuple[float, float, float]]] = [
    ("right", GOLD, GOLD, (1.1, 1.1, 1.1), (1.1, 1.1, 1.1)),
    ("right, said otherwise", "SELECT name FROM singer WHERE age < 31", GOLD, (1.1, 1.1, 1.1), (1.1, 1.1, 1.1)),
    ("wrong", "SELECT 1", GOLD, (0.4, 0.0, 0.4), (0.4, 0.0, 0.4)),
    ("wrong and nothing", NOTHING, GOLD, (0.4, 0.0, 0.4), (0.4, 0.0, 0.4)),
    ("no syntax", "SELEC 1", GOLD, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ("incomplete", "SELECT", GOLD, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ("no such table", "SELECT 1 FROM nowhere", GOLD, (0.0, 0.0, 0.2), (0.0, 0.0, 0.2)),
    ("no such column", "SELECT missing FROM singer", GOLD, (0.0, 0.0, 0.2), (0.0, 0.0, 0.2)),
    # Where the variants differ:
    ("nothing, as the gold", NOTHING, NOTHING, (1.1, 1.1, 1.1), (0.0, 0.0, 0.0)),
    ("endless", ENDLESS, GOLD, (0.4, 0.0, 0.4), (0.0, 0.0, 0.0)),
    ("endless, and the gold nothing", ENDLESS, NOTHING, (1.1, 1.1, 1.1), (0.0, 0.0, 0.0)),
    ("a write", "DROP TABLE singer", GOLD, (0.4, 0.0, 0.4), (0.0, 0.0, 0.0)),
    ("a write, and the gold nothing", "DELETE FROM singer", NOTHING, (1.1, 1.1, 1.1), (0.0, 0.0, 0.0)),
    ("a comment", "-- SELECT 1", GOLD, (0.4, 0.0, 0.4), (0.0, 0.0, 0.0)),
    ("a comment, and the gold nothing", "-- SELECT 1", NOTHING, (1.1, 1.1, 1.1), (0.0, 0.0, 0.0)),
    ("too many rows", MANY, GOLD, (0.4, 0.0, 0.4), (0.0, 0.0, 0.0)),
    ("two statements", f"{GOLD}; SELECT 1", GOLD, (0.0, 0.0, 0.2), (0.0, 0.0, 0.0)),
    ("rows twice", f"{GOLD} UNION ALL {GOLD}", GOLD, (1.1, 1.1, 1.1), (0.4, 0.0, 0.4)),
    ("the order", f"{GOLD} ORDER BY name DESC", f"{GOLD} ORDER BY name", (1.1, 1.1, 1.1), (0.4, 0.0, 0.4)),
    ("nearly", "SELECT 0.1 + 0.2", "SELECT 0.3", (0.4, 0.0, 0.4), (1.1, 1.1, 1.1)),
    ("blank", " ", GOLD, (0.4, 0.0, 0.4), (-2.0, -2.0, -2.0)),
    ("blank, and the gold nothing", "", NOTHING, (1.1, 1.1, 1.1), (-2.0, -2.0, -2.0)),
    ("a number", 5, GOLD, (0.0, 0.0, 0.2), (-2.0, -2.0, -2.0)),
    ("null", None, GOLD, (0.0, 0.0, 0.2), (-2.0, -2.0, -2.0)),
    ("a list", [GOLD], GOLD, (0.0, 0.0, 0.2), (-2.0, -2.0, -2.0)),
]
DATASETS = ("bird", "spider", "bird_no_reason")


@pytest.mark.parametrize(("name", "sql", "gold", "released", "corrected"), PAID)
def test_what_a_statement_is_paid(
    tool: SqlEngine, name: str, sql: Any, gold: str, released: tuple[float, ...], corrected: tuple[float, ...]
) -> None:
    for variant, expected in (("released", released), ("corrected", corrected)):
        for dataset, paid in zip(DATASETS, expected, strict=True):
            reasoning = dataset != "bird_no_reason"
            trajectory = played(said(sql, reasoning), asked(gold), reasoning)
            outcome = score(ExecutionAccuracy(dataset, variant), trajectory, tool)  # type: ignore[arg-type]
            assert (outcome.failed, outcome.score) == ("", pytest.approx(paid, abs=1e-12)), (dataset, variant)


MALFORMED = [
    "",
    "SELECT 1",
    f"<think>hm</think>{GOLD}",
    said(GOLD, reasoning=False),
    said(GOLD) * 2,
    '<answer>{"sql": "SELECT 1"}</answer><think>hm</think>',
    '<think>hm</think><answer>{"sql": "SELECT 1"}',
    "<think>hm</think><answer></answer>",
    "<think>hm</think><answer>SELECT 1</answer>",
    '<think>hm</think><answer>```json\n{"sql": "SELECT 1"}\n```</answer>',
    "<think>hm</think><answer>5</answer>",
    "<think>hm</think><answer>null</answer>",
    '<think>hm</think><answer>["SELECT 1"]</answer>',
    '<think>hm</think><answer>{"query": "SELECT 1"}</answer>',
]


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("variant", ["released", "corrected"])
def test_what_cannot_be_read(text: str, variant: Any, tool: SqlEngine) -> None:
    for dataset in ("bird", "spider"):
        outcome = score(ExecutionAccuracy(dataset, variant), played(text, asked()), tool)  # type: ignore[arg-type]
        assert (outcome.score, outcome.failed) == (-2.0, "")
    bare = text.removeprefix("<think>hm</think>")
    if bare.count("<answer>") == 1 and '"sql": "' not in bare:
        outcome = score(ExecutionAccuracy("bird_no_reason", variant), played(bare, asked(), reasoning=False), tool)
        assert (outcome.score, outcome.parts["format"]) == (-2.0, 0.0)


PARTS = [
    (said(GOLD), GOLD, {"format", "tags", "executed", "accuracy", "equal"}),
    (said("SELECT 1"), GOLD, {"format", "tags", "executed", "wrong_answer_ratio"}),
    (said(NOTHING), GOLD, {"format", "tags", "executed", "empty", "wrong_answer_ratio"}),
    (said(NOTHING), NOTHING, {"format", "tags", "executed", "empty", "equal", "wrong_answer_ratio"}),
    (said("SELEC"), GOLD, {"format", "tags", "error_syntax", "wrong_answer_ratio"}),
    (said("SELECT x"), GOLD, {"format", "tags", "error_invalid", "wrong_answer_ratio"}),
    (said("DROP TABLE singer"), GOLD, {"format", "tags", "error_refused", "wrong_answer_ratio"}),
    (said(ENDLESS), NOTHING, {"format", "tags", "error_timeout", "wrong_answer_ratio"}),
    (said(MANY), GOLD, {"format", "tags", "error_too_many_rows", "wrong_answer_ratio"}),
    (said("SELECT 1; SELECT 2"), GOLD, {"format", "tags", "error_several_statements", "wrong_answer_ratio"}),
    (said("--"), GOLD, {"format", "tags", "error_no_statement", "wrong_answer_ratio"}),
    (said(5), GOLD, {"tags", "format_error_ratio"}),
    ("no tags", GOLD, {"format_error_ratio"}),
]


@pytest.mark.parametrize(("text", "gold", "expected"), PARTS)
def test_parts_are_logged_directly(tool: SqlEngine, text: str, gold: str, expected: set[str]) -> None:
    parts = score(ExecutionAccuracy("bird"), played(text, asked(gold)), tool).parts
    assert {name for name, value in parts.items() if value} == expected
    assert set(parts.values()) <= {0.0, 1.0}
    assert set(parts) == {
        *("format", "tags", "executed", "accuracy", "equal", "empty", "format_error_ratio", "wrong_answer_ratio"),
        *(f"error_{kind}" for kind in KINDS),
    }


@pytest.mark.parametrize(
    ("comparison", "sql", "gold", "right"),
    [
        ("bird", f"{GOLD} UNION ALL {GOLD}", GOLD, True),
        ("bird", "SELECT 0.1 + 0.2", "SELECT 0.3", False),
        ("spider", "SELECT age, name FROM singer", "SELECT name, age FROM singer", True),
        ("multiset", "SELECT age, name FROM singer", "SELECT name, age FROM singer", False),
        ("spider", "SELECT id FROM singer WHERE id > = 3", "SELECT id FROM singer WHERE id >= 3", True),
        ("multiset", "SELECT id FROM singer WHERE id > = 3", "SELECT id FROM singer WHERE id >= 3", False),
        ("spider", "SELECT DISTINCT age FROM singer", "SELECT age FROM singer", False),
        # Spider takes any order by for one of the result, we only the outermost.
        ("spider", "SELECT 2 UNION ALL SELECT 1", "SELECT * FROM (SELECT 1 UNION ALL SELECT 2 order by 1)", False),
        ("multiset", "SELECT 2 UNION ALL SELECT 1", "SELECT * FROM (SELECT 1 UNION ALL SELECT 2 order by 1)", True),
    ],
)
def test_published_comparisons(tool: SqlEngine, comparison: Any, sql: str, gold: str, right: bool) -> None:
    outcome = score(ExecutionAccuracy("bird", comparison=comparison), played(said(sql), asked(gold)), tool)
    assert outcome.parts["accuracy"] == float(right)


def test_distinct_can_be_dropped_and_order_ignored(tool: SqlEngine) -> None:
    reward = ExecutionAccuracy("spider", comparison="spider", keep_distinct=False)
    assert (
        score(reward, played(said("SELECT DISTINCT age FROM singer"), asked("SELECT age FROM singer")), tool).score
        == 1.1
    )
    turned = played(said(f"{GOLD} ORDER BY name DESC"), asked(f"{GOLD} ORDER BY name"))
    assert score(ExecutionAccuracy("spider", ordered=False), turned, tool).score == 1.1


@pytest.mark.parametrize(
    ("source", "wrong", "invalid"),
    [("bird", 0.4, 0.0), ("bird_train", 0.4, 0.0), ("bird_wor_test", 0.4, 0.2), ("spider_dev", 0.0, 0.0)],
)
def test_a_question_can_say_whose_payments_it_has(tool: SqlEngine, source: str, wrong: float, invalid: float) -> None:
    for sql, paid in (("SELECT 1", wrong), ("SELECT x", invalid), (GOLD, 1.1)):
        outcome = score(ExecutionAccuracy(), played(said(sql), asked(source=source)), tool)
        assert outcome.score == pytest.approx(paid, abs=1e-12)


def test_tiers_are_set_from_yaml(tool: SqlEngine) -> None:
    params = {"dataset": "spider", "well_formed": 0.5, "correct": 2, "executed": 0.25, "invalid": -0.75, "error": -1,
              "malformed": -3}  # fmt: skip
    settings = {"terms": {"execution_accuracy": 2.0}, "params": {"execution_accuracy": params}}
    scorer = Scorer(build(RewardConfig, settings), FakeGenerator(), tools=Tools(sql=tool))
    texts = [said(GOLD), said("SELECT 1"), said("SELECT x"), said("SELEC"), "nothing"]
    paid = [asyncio.run(scorer(played(text, asked()))).score for text in texts]
    assert paid == [5.0, 1.5, -0.5, -2.0, -6.0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"malformed": 0.0}, "malformed=0.0 is not below 0.0"),
        ({"correct": float("nan")}, "finite"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"keep_distinct": False}, "set comparison=spider"),
        ({"comparison": "set"}, "expected"),
        ({"dataset": "wikisql"}, "expected"),
    ],
)
def test_wrong_parameters_are_named(params: dict[str, Any], message: str) -> None:
    settings = {"terms": {"execution_accuracy": 1.0}, "params": {"execution_accuracy": params}}
    with pytest.raises(ConfigError, match=message):
        Scorer(build(RewardConfig, settings), FakeGenerator(), tools=Tools(sql=FakeSql()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": {"db_id": "toy"}}, "no extra.sql"),
        ({"extra": {"sql": "SELECT 1"}}, "neither extra.db_id nor extra.db_path"),
        ({"source": "wikisql"}, "names neither bird nor spider"),
    ],
)
def test_questions_that_lack_something_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ExecutionAccuracy().validate([asked(), replace(asked(), **changes)])
    ExecutionAccuracy().validate([asked()])


class FakeSql:
    """Returns one result for the gold and one for everything else; an exception is raised."""

    def __init__(self, gold: Any = None, other: Any = None) -> None:
        self.gold, self.other = gold, other

    async def __call__(self, question: Question, sql: str, keep: bool = False) -> SqlResult:
        result = self.gold if sql == question.extra["sql"] else self.other
        if isinstance(result, Exception):
            raise result
        return result


ROWS = SqlResult(((1,),), 1)


@pytest.mark.parametrize("variant", ["released", "corrected"])
@pytest.mark.parametrize(
    ("gold", "other", "cause"),
    [
        (SqlResult(error="invalid", message="no such table: t"), ROWS, "no such table"),
        (SqlResult(error="too_many_rows", message="more than 5"), ROWS, "more than 5"),
        (SqlResult(error="missing_database", message="gone"), ROWS, "gone"),
        (ROWS, SqlResult(error="missing_database", message="gone"), "gone"),
        (ROWS, SqlResult(error="unreadable_database", message="broken"), "broken"),
        (RetrieverError("no process"), ROWS, "no process"),
    ],
)
def test_what_cannot_be_compared_has_no_score(variant: Any, gold: Any, other: Any, cause: str) -> None:
    outcome = score(ExecutionAccuracy("bird", variant), played(said("SELECT 1"), asked()), FakeSql(gold, other))
    assert cause in outcome.failed


def test_a_gold_that_takes_too_long_returned_nothing_as_published() -> None:
    late = FakeSql(SqlResult(error="timeout"), SqlResult())
    trajectory = played(said("SELECT 1"), asked())
    assert score(ExecutionAccuracy("bird", "released"), trajectory, late).score == 1.1
    assert "timeout" in score(ExecutionAccuracy("bird"), trajectory, late).failed


def test_a_process_that_died_is_an_error() -> None:
    died = FakeSql(ROWS, SqlResult(error="crash"))
    outcome = score(ExecutionAccuracy("bird"), played(said("SELECT 1"), asked()), died)
    assert (outcome.score, outcome.parts["error_crash"], outcome.failed) == (0.0, 1.0, "")


def test_other_protocols_and_missing_tools_are_told(tmp_path: Path) -> None:
    searched = Trajectory(asked(), (1,), (Turn((), "x", query="q", finished=True),), Stop.FINISHED)
    assert "search.task=sql" in score(ExecutionAccuracy(), searched, FakeSql()).failed
    assert "no turn" in score(ExecutionAccuracy(), replace(searched, turns=()), FakeSql()).failed
    with pytest.raises(ConfigError, match=r"sql\.databases"):
        Scorer(RewardConfig(terms={"execution_accuracy": 1.0}), FakeGenerator())


@needs_spider
async def test_every_gold_of_real_databases_scores_one() -> None:
    tool = engine(SPIDER / "database")
    reward = ExecutionAccuracy("spider")
    rows = list(spider_rows())

    async def judge(row: dict[str, Any]) -> tuple[RewardOutcome, SqlResult]:
        extra = {"db_id": row["db_id"], "sql": row["query"]}
        question = Question("spider/0", row["question"], (row["query"],), "spider", extra=extra)
        trajectory = played(said(row["query"]), question)
        outcome = await reward(Evidence(trajectory, (), FakeGenerator(), tools=Tools(sql=tool)))
        return outcome, await tool(question, row["query"], keep=True)

    try:
        judged = await asyncio.gather(*map(judge, rows))
    finally:
        await tool.aclose()
    outcomes = [outcome for outcome, _ in judged]
    assert [len(result.rows) for _, result in judged] == [row["gold_rows"] for row in rows]
    assert [row["query"] for row, done in zip(rows, outcomes, strict=True) if done.parts["equal"] != 1.0] == []
    # What returns nothing proves nothing, and is not paid.
    paid = [1.1 if row["gold_rows"] else 0.0 for row in rows]
    assert [done.score for done in outcomes] == paid
    assert sum(done.parts["accuracy"] for done in outcomes) == sum(row["gold_rows"] > 0 for row in rows)
