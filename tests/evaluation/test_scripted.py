"""The policy that knows the gold titles: what it says, over a real loop with a retriever of a few documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.evaluation.fakes import DOCUMENTS, QUESTIONS, Retriever, question
from verl.agent.grammar.s3 import S3Config, S3Grammar
from verl.agent.protocols import Sampling
from verl.errors import DataError
from verl.evaluation.collectors import Gathered, Searcher
from verl.evaluation.remote_engine import Transcript
from verl.evaluation.scripted import TitleOracle
from verl.types import Document, Question, SearchResult, Stop


class Titles:
    """Finds a document by its whole title, and otherwise only what `by_question` says."""

    def __init__(self, documents: Sequence[Document], by_question: str = "") -> None:
        self.documents = documents
        self.by_question = by_question

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        return [self._found(query) for query in queries]

    def _found(self, query: str) -> SearchResult:
        found = tuple(d for d in self.documents if query == d.title or (self.by_question and query.endswith("?")))
        return SearchResult(query, found, (1.0,) * len(found))


async def play(asked: Question, search: object, config: S3Config | None = None) -> Gathered:
    tokenizer = Transcript()
    engine = TitleOracle([asked], tokenizer)
    searcher = Searcher(S3Grammar(config or S3Config()), engine, search, tokenizer, Sampling(0.0))  # type: ignore[arg-type]
    return await searcher(asked)


def titles(gathered: Gathered) -> list[str]:
    return [document.title for document in gathered.trajectory.documents]


@pytest.mark.parametrize("prompt", ["published", "compact"])
async def test_missing_titles_are_searched_for_one_after_the_other(prompt: str) -> None:
    gathered = await play(QUESTIONS[1], Retriever(), S3Config(topk=1, prompt=prompt))  # type: ignore[arg-type]
    assert [turn.query for turn in gathered.trajectory.turns] == ["Ann", "Bob", None]
    assert titles(gathered) == ["Ann", "Bob"]
    assert gathered.trajectory.stop is Stop.FINISHED and gathered.trajectory.valid


async def test_only_gold_passages_are_selected_and_round_0_counts() -> None:
    asked = replace(QUESTIONS[1], initial_documents=(DOCUMENTS[3], DOCUMENTS[1]))
    gathered = await play(asked, Retriever(), S3Config(topk=4))
    assert [turn.query for turn in gathered.trajectory.turns] == ["Ann", None], "Bob was there from the start"
    assert titles(gathered) == ["Bob", "Ann"]


async def test_a_title_that_is_not_found_is_tried_with_the_question_and_then_given_up() -> None:
    asked = question(0, "Who is it?", "Bob", gold=["Ann", "Nobody"])
    gathered = await play(asked, Titles(DOCUMENTS))
    assert [turn.query for turn in gathered.trajectory.turns] == ["Ann", "Nobody", "Nobody Who is it?", None]
    assert titles(gathered) == ["Ann"]
    late = await play(question(0, "Who is it?", "Bob", gold=["Dee (a)"]), Titles([Document("9", "dee, A", "x")], "?"))
    assert titles(late) == ["dee, A"], "spellings of one title are one"


async def test_a_title_may_hold_parentheses_quotes_and_tags() -> None:
    odd = Document("9", 'A "B" (C) <b>', "text (with more).")
    gathered = await play(question(0, "What?", "x", gold=[odd.title]), Titles([odd, DOCUMENTS[0]]))
    assert titles(gathered) == [odd.title]


async def test_what_it_does_not_know_is_a_failure_and_no_context() -> None:
    with pytest.raises(DataError, match="no question names its gold passages"):
        TitleOracle([question(0, "Who?", "x")], Transcript())
    tokenizer = Transcript()
    engine = TitleOracle([QUESTIONS[0]], tokenizer)
    searcher = Searcher(S3Grammar(S3Config()), engine, Retriever(), tokenizer, Sampling(0.0))
    failed = (await searcher(QUESTIONS[1])).trajectory
    assert failed.stop is Stop.FAILED and "knows no question 'Who is the rival of the mentor of Ann?'" in failed.error
