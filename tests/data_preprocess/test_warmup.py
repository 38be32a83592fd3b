"""Warm-up trajectories: what is written, what is rejected, resuming, the annotator, and published files mended."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_preprocess import warmup_file
from data_preprocess.evidence.decompose import NO_FACTS, Hop, Plan, world_plan
from data_preprocess.evidence.facts import Fact
from data_preprocess.readers.source import SourceConfig
from data_preprocess.warmup import MALFORMED_ROW, REPEATED_ID, WarmupConfig, build, main, read_cases, write
from data_preprocess.warmup_build import NOT_FOUND, NOT_SHOWN, TOO_LONG, Builder
from data_preprocess.warmup_file import normalise
from tests.evaluation.fakes import DOCUMENTS, QUESTIONS, Retriever
from verl.agent.grammar.exsearch import ExSearchConfig, ExSearchGrammar
from verl.errors import DataError, RetrieverError
from verl.records import write_questions

TWO_HOPS = QUESTIONS[1]
PLAN = world_plan(TWO_HOPS)
CONFIG = ExSearchConfig(topk=3, shown=1, max_turns=3)


def builder(config: ExSearchConfig = CONFIG, retriever: Retriever | None = None) -> Builder:
    return Builder(ExSearchGrammar(config), retriever or Retriever())


def line(number: int, place: int) -> str:
    document = DOCUMENTS[place]
    return f"[{number}] Title: {document.title}. Content: {document.text}"


async def test_a_plan_becomes_the_published_conversation() -> None:
    retriever = Retriever()
    built = await builder(retriever=retriever)(TWO_HOPS, PLAN)
    grammar = ExSearchGrammar(CONFIG)
    assert [message["content"] for message in built.messages[1:]] == [
        "<QUERY> mentor of Ann",
        f"<SEARCH> {line(1, 0)}",
        "<FACT> The mentor of Ann is Bob.\n<QUERY> rival of Bob",
        f"<SEARCH> {line(1, 1)}",
        "<FACT> The rival of Bob is Cid.\n<FINAL>",
        grammar.answer_request(TWO_HOPS),
        "Cid",
    ]
    assert built.messages[0] == grammar.prompt_messages(TWO_HOPS)[0]
    assert (retriever.queries, built.documents, built.ranks) == (["mentor of Ann", "rival of Bob"], ("1", "2"), ())


async def test_with_selection_the_holders_of_the_facts_are_chosen() -> None:
    config = replace(CONFIG, select=True, topk=4)
    hop = Hop(("Cid",), (Fact("Bob", "The rival of Bob is Cid."),))
    built = await builder(config)(TWO_HOPS, Plan((hop,)))
    # The retriever puts Cid first and Bob, who holds the fact, third.
    assert built.messages[2]["content"] == f"<SEARCH> {line(1, 1)}"
    ((prompt, choice),) = built.ranks
    assert choice == {"role": "assistant", "content": "[3]"} and line(3, 1) in prompt["content"]
    assert (await builder(replace(CONFIG, topk=4))(TWO_HOPS, Plan((hop,)))).reason == NOT_SHOWN


async def test_other_ways_to_ask_are_tried_in_order() -> None:
    retriever = Retriever()
    hop = Hop(("who?", "Bob"), (Fact("Bob", "The rival of Bob is Cid."),))
    built = await builder(retriever=retriever)(TWO_HOPS, Plan((hop,)))
    assert built.messages[1]["content"] == "<QUERY> Bob" and retriever.queries == ["who?", "Bob"]


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(reason=NO_FACTS), NO_FACTS),
        (Plan(PLAN.hops * 2), TOO_LONG),
        (Plan((Hop(("Ann",), (Fact("Eve", "Eve lives in Rome since 1990."),)),)), NOT_FOUND),
    ],
)
async def test_what_cannot_be_played_is_rejected_with_its_reason(plan: Plan, reason: str) -> None:
    built = await builder()(TWO_HOPS, plan)
    assert built.reason == reason and not built.messages


async def test_a_fact_cannot_write_markers() -> None:
    found = replace(DOCUMENTS[0], text="The tag of Ann is <FINAL> forever.")

    async def search(queries: Sequence[str], topk: int) -> Any:
        (result,) = await Retriever()(queries, topk)
        return [replace(result, documents=(found,), scores=(1.0,))]

    plan = Plan((Hop(("Ann",), (Fact("Ann", found.text),)),))
    built = await Builder(ExSearchGrammar(CONFIG), search)(TWO_HOPS, plan)
    assert [message["content"].count("<FINAL>") for message in built.messages[1:]] == [0, 0, 1, 0, 0]


def config_of(folder: Path, **changes: Any) -> WarmupConfig:
    path = folder / "questions.parquet"
    write_questions(path, QUESTIONS, "test")
    return WarmupConfig(folder / "w.jsonl", SourceConfig(path=str(path)), search=CONFIG, **changes)


class _Client(Retriever):
    """The retriever as the service's client."""

    async def __aenter__(self) -> _Client:
        return self

    async def __aexit__(self, *_: object) -> None: ...


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> _Client:
    client = _Client()

    async def identity(url: str) -> str:
        return "fake"

    module = sys.modules["data_preprocess.warmup"]
    monkeypatch.setattr(module, "RetrieverClient", lambda config: client)
    monkeypatch.setattr(module, "retriever_identity", identity)
    return client


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


async def test_every_row_is_written_or_rejected(tmp_path: Path, served: _Client) -> None:
    summary = await build(config_of(tmp_path))
    assert (summary.rows, summary.trajectories, summary.searches) == (3, 2, 3)
    assert summary.rejected == {"no decomposition": 1}, "the third question is not a chain"
    rows = rows_of(tmp_path / "w.jsonl")
    assert [row["query_id"] for row in rows] == ["toy/test/0", "toy/test/1"]
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": "Bob"}
    assert rows_of(tmp_path / "w.rejected.jsonl") == [{"id": "toy/test/2", "reason": "no decomposition", "detail": ""}]
    assert json.loads((tmp_path / "w.summary.json").read_text())["rejected"] == {"no decomposition": 1}


def test_shuffled_rows_are_the_same_rows_in_an_order_of_the_seed(tmp_path: Path) -> None:
    plain = [{"key": f"k{n}", "id": f"q{n}", "messages": [{}] * 6, "documents": [], "ranks": []} for n in range(20)]
    orders = []
    for shuffle, seed in ((False, 0), (True, 0), (True, 0), (True, 1)):
        config = config_of(tmp_path, shuffle=shuffle, seed=seed)
        write(config, plain, [])
        orders.append([row["query_id"] for row in rows_of(config.output)])
    in_order, first, again, other = orders
    assert in_order == [record["id"] for record in plain]
    assert first == again and sorted(first) == sorted(in_order)
    assert len({tuple(order) for order in (in_order, first, other)}) == 3


async def test_a_dead_service_loses_nothing(tmp_path: Path, served: _Client) -> None:
    served.broken = {"rival of Bob"}
    config = config_of(tmp_path)
    with pytest.raises(Exception, match="1 of 3 questions failed"):
        await build(config)
    served.broken, served.queries = set(), []
    assert (await build(config)).trajectories == 2
    assert served.queries == ["mentor of Ann", "rival of Bob"], "only the failed question is searched for again"
    served.queries = []
    await build(config)
    assert served.queries == []


async def test_nothing_left_is_an_error_that_says_why(tmp_path: Path, served: _Client) -> None:
    config = config_of(tmp_path, min_overlap=1.0)
    served.queries = []
    with pytest.raises(DataError, match=r"none of the 1 rows.*1 \(no decomposition\)"):
        write(config, [{"key": "k", "id": "q", "reason": "no decomposition"}], [])
    assert rows_of(tmp_path / "w.rejected.jsonl")[0]["id"] == "q"


def test_questions_are_drawn_by_the_seed(tmp_path: Path) -> None:
    drawn = {tuple(q.id for q in read_cases(config_of(tmp_path, limit=1, seed=seed)).questions) for seed in range(9)}
    assert len(drawn) > 1
    assert [q.id for q in read_cases(config_of(tmp_path, limit=2, seed=None)).questions] == ["toy/test/0", "toy/test/1"]


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    row = {"_id": "a", "question": "Who?", "answer": "x", "supporting_facts": [], "context": []}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [row, row, {**row, "_id": "b", "answer": ["x"]}])))
    cases = read_cases(WarmupConfig(tmp_path / "w.jsonl", SourceConfig(path=str(path), source="hotpotqa")))
    assert [question.id for question in cases.questions] == ["hotpotqa/train/a"]
    assert [fault["reason"] for fault in cases.faults] == [REPEATED_ID, MALFORMED_ROW]


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"output={tmp_path / 'w.jsonl'}"]) == 2
    assert "source.path is missing" in capsys.readouterr().err
    assert main([f"output={tmp_path / 'w.jsonl'}", "min_overlap=0"]) == 2


def chat(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]}


ASKING = "Tags.\n<USER QUERY> Who is it?\nYour Output:"
RANK = "Pick.\n[1] one\n[2] two\n[3] three"


def test_what_the_released_files_got_wrong_is_mended_and_counted() -> None:
    misspelt = {"messages": [{"role": "user", "content": ASKING}, {"role": "assistant", "content:": "<QUERY> a"}]}
    rows, report = normalise([misspelt, chat(ASKING, "<FINAL>", "Answer: {question}", "Bob"), chat(RANK, "[0] > [2]")])
    assert rows[0] == chat(ASKING, "<QUERY> a")
    assert rows[1] == chat(ASKING, "<FINAL>", "Answer: Who is it?", "Bob")
    assert rows[2] == chat(RANK, "[1] > [3]"), "a 0 shows that this file counts from 0"
    assert report.mended == {"key content:": 1, "literal {question}": 1, "choice counted from 0": 1}
    assert (report.rows, report.kept, dict(report.rejected)) == (3, 3, {})


def test_choices_that_count_from_1_stay() -> None:
    assert normalise([chat(RANK, "[3] > [1]")])[0] == [chat(RANK, "[3] > [1]")]
    rows, report = normalise([chat(RANK, "[3] > [1]"), chat(RANK, "[1]")], zero_based=True)
    assert rows == [chat(RANK, "[2]")] and report.rejected == {"a choice of a document that is not listed": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no messages"),
        (None, "no messages"),
        ({"messages": ["x"]}, "a message that is no object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a message without role or content"),
        (chat("a"), "user and assistant do not alternate"),
        (chat("a", "b", "c"), "the last turn is not the assistant's"),
        (chat("a", " "), "an empty turn of the assistant"),
        (chat("{question}", "b"), "a literal {question}, and no question to put there"),
    ],
)
def test_what_cannot_be_mended_is_left_out_with_its_reason(row: Any, reason: str) -> None:
    rows, report = normalise([row, chat("a", "b")])
    assert rows == [chat("a", "b")] and report.rejected == {reason: 1} and report.rows == 2


def test_a_published_array_becomes_a_file_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "hotpot-traj.all.2.json", tmp_path / "w.jsonl"
    source.write_text(json.dumps([{**chat(ASKING, "<QUERY> a"), "prob": 0.5}, {"messages": []}]))
    assert warmup_file.main(["--input", str(source), "--output", str(output)]) == 0
    assert rows_of(output) == [{**chat(ASKING, "<QUERY> a"), "prob": 0.5}]
    assert "1 of 2 rows kept" in capsys.readouterr().out
    source.write_text("[{}]")
    with pytest.raises(SystemExit):
        warmup_file.main(["--input", str(source), "--output", str(output)])


async def test_a_failing_retriever_is_no_rejection() -> None:
    with pytest.raises(RetrieverError):
        await builder(retriever=Retriever(broken={"mentor of Ann"}))(TWO_HOPS, PLAN)
