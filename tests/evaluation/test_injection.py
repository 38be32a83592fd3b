"""The answer-injection filter: what it takes out, what it leaves alone, and what a model may do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.agent.grammar.base import Message
from verl.errors import GeneratorError
from verl.evaluation.injection import ModelFilter, Stripped, filter_prompt, strip_answers, tidy
from verl.rewards.text import has_answer
from verl.types import Question


def question(text: str, *answers: str) -> Question:
    return Question("nq/test/0", text, answers, "nq")


@pytest.mark.parametrize(
    ("text", "answers", "query", "left", "injected"),
    [
        ("capital of France?", ["Paris"], "capital France", "capital France", ()),
        ("capital of France?", ["Paris"], "(capital AND France) AND Paris", "(capital AND France)", ("Paris",)),
        ("capital of France?", ["Paris"], "(Paris OR capital) AND France", "(capital) AND France", ("Paris",)),
        ("capital of France?", ["Paris"], 'France AND ("Paris")', "France", ("Paris",)),
        ("capital of France?", ["Paris"], "PARIS and paris", "and", ("PARIS", "paris")),
        ("capital of France?", ["Paris"], "parisian life", "parisian life", ()),
        ("where is Paris?", ["Paris", "France"], "Paris France", "Paris", ("France",)),
        ("who?", ["José"], "JOSE\u0301 wrote it", "wrote it", ("JOSÉ",)),
        ("who?", ["New York", "York"], "New York, York, old", ", , old", ("New York", "York")),
        ("who?", ["U.S."], "the U.S. army", "the army", ("U.S.",)),
        ("who?", ["Ann"], "Ann", "", ("Ann",)),
        ("who?", ["x", "a b"], "a x b c", "c", ("x", "a b")),
        ("who?", ["Ann"], "x AND NOT Ann OR y", "x OR y", ("Ann",)),
        ("who?", ["", "  "], "Ann (", "Ann (", ()),
        ("trial?", ["NCT00000001"], "asthma OR NCT00000001", "asthma", ("NCT00000001",)),
    ],
)
def test_answers_that_the_question_lacks_are_taken_out(
    text: str, answers: list[str], query: str, left: str, injected: tuple[str, ...]
) -> None:
    assert strip_answers(question(text, *answers), query) == Stripped(left, injected)


@given(st.text(max_size=60), st.lists(st.text(max_size=8), min_size=1, max_size=3))
def test_no_answer_is_left_and_an_untouched_query_is_as_it_was(query: str, answers: list[str]) -> None:
    asked = question("?", *answers)
    stripped = strip_answers(asked, query)
    given_away = [answer for answer in answers if not has_answer("?", [answer])]
    assert bool(stripped.injected) == has_answer(query, given_away)
    assert not has_answer(stripped.query, given_away)
    if not stripped.injected:
        assert stripped.query == query


@given(st.text(alphabet='ab ()"ANDORT', max_size=40))
def test_tidying_ends_and_is_done_once(query: str) -> None:
    assert tidy(tidy(query)) == tidy(query)


def by_model(reply: str, query: str = "capital Paris France") -> Stripped:
    asked: list[Sequence[Message]] = []

    async def complete(messages: Sequence[Message]) -> str:
        asked.append(messages)
        return reply

    stripped = asyncio.run(ModelFilter(complete)(question("capital of France?", "Paris"), query))
    assert "capital of France?" in asked[0][0]["content"] and query in asked[0][0]["content"]
    return stripped


def test_a_model_takes_words_out() -> None:
    assert by_model('So: <answer>{"query": "capital France"}</answer>') == Stripped("capital France", ("paris",))
    assert by_model('<answer>{"query": "capital Paris France"}</answer>') == Stripped("capital Paris France")
    assert by_model('<answer>{"query": ""}</answer>', "Paris") == Stripped("", ("paris",))


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("capital France", "cannot be read"),
        ('<answer>{"query": 3}</answer>', "cannot be read"),
        ('<answer>{"query": "capital of France"}</answer>', "added: of"),
        ('<answer>{"query": "capital capital"}</answer>', "added: capital"),
    ],
)
def test_a_model_that_does_something_else_is_a_failure(reply: str, why: str) -> None:
    with pytest.raises(GeneratorError, match=why):
        by_model(reply)


def test_the_prompt_shows_all_answers() -> None:
    assert "- Paris\n- Lutetia\n" in filter_prompt(question("?", "Paris", "Lutetia"), "q")
