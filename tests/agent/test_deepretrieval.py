"""DeepRetrieval: what counts as a readable answer, and that one turn is all there is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.fakes import EOS, CharTokenizer, DictSearch, ScriptedEngine, docs, question
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar, read_answer
from verl.agent.loop import run
from verl.agent.protocols import Sampling
from verl.types import Question, Stop, Trajectory

CONFIG = DeepRetrievalConfig(topk=2)
SEARCH = {"a": docs("a1", "a2", "a1"), "Who?": docs("w1")}


async def play(config: DeepRetrievalConfig, said: str) -> tuple[Trajectory, str]:
    engine = ScriptedEngine(said)
    grammar = DeepRetrievalGrammar(config)
    asked = question(text="Who?")
    trajectory = await run(asked, grammar, engine, DictSearch(SEARCH), CharTokenizer(), Sampling(temperature=0))
    return trajectory, engine.contexts[0]


def turn(inner: str) -> str:
    return f"<think>hm</think> <answer>{inner}</answer>"


async def test_one_query_is_searched_and_that_is_all() -> None:
    trajectory, _ = await play(CONFIG, turn('{"query": " a "}'))
    assert (trajectory.stop, trajectory.searches, trajectory.valid) == (Stop.FINISHED, 1, True)
    assert trajectory.documents == docs("a1", "a2"), "equal documents once"


async def test_the_first_tag_may_be_prefilled() -> None:
    said = 'hm</think><answer>{"query": "a"}</answer>'
    trajectory, context = await play(replace(CONFIG, prefill=True), said)
    assert context.endswith("<|im_start|>assistant\n<think>") and trajectory.valid
    trajectory, context = await play(replace(CONFIG, prefill=True, reasoning=False), '{"query": "a"}</answer>')
    assert context.endswith("assistant\n<answer>") and trajectory.valid
    assert not (await play(CONFIG, said))[0].valid


async def test_an_unreadable_answer_ends_with_its_reason() -> None:
    trajectory, _ = await play(CONFIG, f"I give up{EOS}")
    assert (trajectory.stop, trajectory.valid, trajectory.documents) == (Stop.FINISHED, False, ())
    assert trajectory.turns[0].note == "<think> occurs 0 times, expected once"
    assert trajectory.turns[0].fault == "tag_missing"
    trajectory, _ = await play(replace(CONFIG, fall_back=True), f"I give up{EOS}")
    assert trajectory.documents == docs("w1") and trajectory.turns[0].invalid, "searched for, and still invalid"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (turn('{"query": "a"}'), ""),
        ("I give up", "tag_missing"),
        (turn('{"query": "a"}') * 2, "tag_repeated"),
        ('<answer>{"query": "a"}</answer><think>hm</think>', "tag_order"),
        (turn(" "), "empty"),
        (turn("```json\n{}\n```"), "not_json"),
        (turn("null"), "not_object"),
        (turn("{}"), "key_missing"),
        (turn('{"query": 5}'), "not_text"),
        (turn('{"query": " "}'), "blank"),
    ],
)
def test_a_rejection_has_a_kind(text: str, fault: str) -> None:
    reading = read_answer(text, "query", reasoning=True)
    assert reading.fault == fault and bool(reading.reason) == bool(fault)


async def test_sql_is_an_answer_and_is_not_searched_for() -> None:
    trajectory, context = await play(replace(CONFIG, task="sql"), turn('{"sql": "SELECT 1"}'))
    assert (trajectory.answer, trajectory.searches, trajectory.valid) == ("SELECT 1", 0, True)
    assert "SQLite" in context


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (turn('{"query": "a"}'), ""),
        ("before " + turn('{"query": "a", "more": [1]}') + " behind", ""),
        (turn("```json\n{}\n```"), "not JSON"),
        (turn("5"), "a JSON int, expected an object"),
        (turn("null"), "a JSON NoneType"),
        (turn('[{"query": "a"}]'), "a JSON list"),
        (turn('{"Query": "a"}'), "'query' is missing"),
        (turn('{"query": {"query": "a"}}'), "'query' is a dict"),
        (turn('{"query": null}'), "'query' is a NoneType"),
        (turn('{"query": "  "}'), "is blank"),
        (turn('{"query": "a", "x": NaN}'), "NaN is not JSON"),
        (turn(""), "not JSON"),
        (turn("[" * 100_000), "not JSON"),
        ('<answer>{"query": "a"}</answer>', "<think> occurs 0 times"),
        (turn('{"query": "a"}') * 2, "<think> occurs 2 times"),
        ('<answer>{"query": "a"}</answer><think>hm</think>', "<answer> stands before"),
        ('<think>hm<answer>{"query": "a"}</answer>', "</think> occurs 0 times"),
    ],
)
def test_the_published_rules_and_a_reason_for_every_rejection(text: str, reason: str) -> None:
    reading = read_answer(text, "query", reasoning=True)
    assert reason in reading.reason and bool(reading.reason) == bool(reason)
    assert reading.value == ("" if reason else "a")


def test_without_reasoning_think_tags_do_not_matter() -> None:
    assert read_answer('<think><answer>{"query": "a"}</answer>', "query", reasoning=False).value == "a"


@given(st.text(max_size=200) | st.from_regex(r"(<think>|</think>|<answer>|</answer>|\{\"query\": ?|\"a\"|\}|x){0,12}"))
def test_reading_is_total(text: str) -> None:
    reading = read_answer(text, "query", reasoning=True)
    assert bool(reading.value) != bool(reading.reason)


@given(st.text(min_size=1).filter(str.strip))
def test_any_query_survives_its_json(query: str) -> None:
    if any(tag in query for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return
    reading = read_answer(turn(json.dumps({"query": query})), "query", reasoning=True)
    assert reading.value == query.encode("utf-8", "replace").decode().strip()


async def test_a_search_may_treat_each_question_apart() -> None:
    class Dated:
        def bound(self, asked: Question) -> DictSearch:
            return DictSearch({"a": docs(asked.id)})

    engine = ScriptedEngine(turn('{"query": "a"}'))
    search = Dated()
    trajectory = await run(question(), DeepRetrievalGrammar(CONFIG), engine, search, CharTokenizer(), Sampling())  # type: ignore[arg-type]
    assert trajectory.documents == docs(trajectory.question.id)
