"""Methods that gather documents for a question. Each is one callable: question in, documents and their trace out.

A method that talks in turns is a grammar on the one agent loop and needs no class of its own, only a `Searcher` with
that grammar. To add another kind of method, write a class with `__call__` and enter it in `verl.evaluation.collect`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from data_preprocess.readers.mirage import retrieval_query
from verl.agent.grammar.base import Grammar
from verl.agent.loop import Tokenizer, derive_seed, run
from verl.agent.protocols import PolicyEngine, Sampling, Search, bound_to
from verl.errors import RetrieverError
from verl.rewards.recall import title_key
from verl.types import Document, Question, SearchResult, Stop, Trajectory, Turn

_PICO = ("P", "I", "C", "O")


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a method found for one question.

    Attributes:
        trajectory: the trace; its `documents` are what the generator gets. `stop` is FAILED when a service failed.
        response: what the policy wrote and was answered, as text; empty for methods without a policy.
    """

    trajectory: Trajectory
    response: str = ""


class Collector(Protocol):
    """A method. Calls may be concurrent."""

    async def __call__(self, question: Question) -> Gathered:
        """Gather documents for one question.

        Raises:
            RetrieverError: after bounded retries, unless the trace says so itself (`Stop.FAILED`).
        """
        ...


class NaiveRag:
    """The question, without answer options, is the query, and the first `topk` documents are the context.

    Args:
        query_of: makes the query of a question.
    """

    def __init__(self, search: Search, topk: int, query_of: Callable[[Question], str] = retrieval_query) -> None:
        self._search = search
        self._topk = topk
        self._query_of = query_of

    async def __call__(self, question: Question) -> Gathered:
        """Search once."""
        query = self._query_of(question)
        result = await _search_once(bound_to(self._search, question), query, self._topk)
        turn = Turn(segments=(), text="", query=query, finished=True, result=result)
        return Gathered(Trajectory(question, (), (turn,), Stop.FINISHED, result.documents))


def raw_query(question: Question) -> str:
    """Return what DeepRetrieval's baseline searches: of a literature question P OR I OR C OR O, else the question.

    The parts are joined as they stand, as published; a part without text is left out.
    """
    lines = [line.partition(":") for line in question.text.splitlines()]
    if [head for head, _, _ in lines] != list(_PICO):
        return retrieval_query(question)
    return " OR ".join(part.strip() for _, _, part in lines if part.strip())


class Direct:
    """No documents: the generator answers from what it knows (zero-shot, chain of thought)."""

    async def __call__(self, question: Question) -> Gathered:
        """Return an empty context."""
        return Gathered(Trajectory(question, (), (), Stop.FINISHED))


class Oracle:
    """Looks up the gold passages: the ceiling that corpus and generator allow.

    Args:
        passages: passages by title key, from `passages_of`. Titles that are not in the corpus are left out, which the
            recall shows.
    """

    def __init__(self, passages: Mapping[str, tuple[Document, ...]]) -> None:
        self._passages = passages

    async def __call__(self, question: Question) -> Gathered:
        """Return the gold passages in hop order."""
        titles = dict.fromkeys(title_key(title) for title in question.gold_titles)
        documents = tuple(document for title in titles for document in self._passages.get(title, ()))
        return Gathered(Trajectory(question, (), (), Stop.FINISHED, documents))


class Searcher:
    """A policy that plays a search protocol.

    Args:
        sampling: as for `verl.agent.loop.run`. With a seed, each question gets its own one, derived from it and from
            the question's id, so that the outcome does not depend on the order of the questions.
        initial_k: search for the question first and start from so many documents; 0 starts from the question's own
            round-0 documents.
    """

    def __init__(
        self,
        grammar: Grammar,
        engine: PolicyEngine,
        search: Search,
        tokenizer: Tokenizer,
        sampling: Sampling,
        initial_k: int = 0,
    ) -> None:
        self._grammar = grammar
        self._engine = engine
        self._search = search
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._initial_k = initial_k

    async def __call__(self, question: Question) -> Gathered:
        """Play one trajectory."""
        if self._initial_k:
            search = bound_to(self._search, question)
            found = await _search_once(search, retrieval_query(question), self._initial_k)
            question = replace(question, initial_documents=found.documents)
        seed = derive_seed(self._sampling.seed, zlib.crc32(question.id.encode()))
        sampling = replace(self._sampling, seed=seed)
        trajectory = await run(question, self._grammar, self._engine, self._search, self._tokenizer, sampling)
        ids = [token for segment in trajectory.segments for token in segment.ids]
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Gathered(trajectory, text)


async def _search_once(search: Search, query: str, topk: int) -> SearchResult:
    results = await search([query], topk)
    if len(results) != 1:
        raise RetrieverError(f"search returned {len(results)} results for 1 query; expected one per query")
    return results[0]


def passages_of(questions: Iterable[Question], corpus: Iterable[Document]) -> dict[str, tuple[Document, ...]]:
    """Return all passages of the questions' gold titles by title key, read from the corpus in one pass."""
    wanted: Collection[str] = {title_key(title) for question in questions for title in question.gold_titles}
    found: dict[str, tuple[Document, ...]] = {}
    for document in corpus:
        key = title_key(document.title)
        if key in wanted:
            found[key] = (*found.get(key, ()), document)
    return found
